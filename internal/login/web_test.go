package login

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// Browsers are sent to nothing but pages that are reached over TLS, whatever the metadata names.
func TestBrowsersAreSentToPages(t *testing.T) {
	t.Parallel()
	var issuer, authorization, end string
	provider := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		fmt.Fprintf(w, `{"issuer":%q,"authorization_endpoint":%q,"end_session_endpoint":%q,"token_endpoint":%q,"jwks_uri":%q}`, issuer, authorization, end, issuer+"/token", issuer+"/jwks")
	}))
	defer provider.Close()
	issuer = provider.URL
	for _, hostile := range []string{"file:///usr/bin/calc", "javascript:alert(1)", "http://id.example/auth", "//id.example/auth", "-e", "%"} {
		authorization, end = hostile, issuer+"/end"
		w := &Web{Provider: Provider{Issuer: issuer, ClientID: "console"}}
		if address, err := w.Begin(t.Context(), Attempt{"s", "n", "v"}); !errors.Is(err, ErrProvider) {
			t.Errorf("signing in leads to %q, %v", address, err)
		}
		opened := false
		if _, err := w.ByBrowser(t.Context(), func(string) { opened = true }); !errors.Is(err, ErrProvider) || opened {
			t.Errorf("a command line opens %q: %v, %v", hostile, opened, err)
		}
		authorization, end = issuer+"/auth", hostile
		w = &Web{Provider: Provider{Issuer: issuer, ClientID: "console"}}
		if address, err := w.LogOut(t.Context()); !errors.Is(err, ErrProvider) || address != "" {
			t.Errorf("signing out leads to %q, %v", address, err)
		}
	}
	for given, want := range map[string]string{"": "", issuer + "/end?x=1": issuer + "/end?client_id=console&x=1", "https://id.example/end": "https://id.example/end?client_id=console"} {
		authorization, end = issuer+"/auth", given
		w := &Web{Provider: Provider{Issuer: issuer, ClientID: "console"}}
		if address, err := w.LogOut(t.Context()); err != nil || address != want {
			t.Errorf("signing out at %q leads to %q, %v", given, address, err)
		}
	}
}

// A provider whose metadata fails for a while signs people in with what was read before.
func TestMetadataOutlivesAFailedRefresh(t *testing.T) {
	t.Parallel()
	var down, silent atomic.Bool
	down.Store(true)
	var waiting atomic.Int32
	speak := make(chan struct{})
	var issuer string
	provider := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		if silent.Load() {
			waiting.Add(1)
			<-speak
		}
		if down.Load() {
			w.WriteHeader(http.StatusBadGateway)
			return
		}
		w.Header().Set("Content-Type", "application/json")
		fmt.Fprintf(w, `{"issuer":%q,"authorization_endpoint":%q,"token_endpoint":%q,"jwks_uri":%q}`, issuer, issuer+"/auth", issuer+"/token", issuer+"/jwks")
	}))
	defer provider.Close()
	defer close(speak) // before the provider waits for its answers
	issuer = provider.URL
	w := &Web{Provider: Provider{Issuer: issuer, ClientID: "console"}, Redirect: "http://localhost/console/callback"}
	begin := func() error {
		w.mu.Lock()
		w.until = time.Time{} // what was found, or failed, is old
		w.mu.Unlock()
		address, err := w.Begin(t.Context(), Attempt{"s", "n", "v"})
		if err == nil && !strings.HasPrefix(address, issuer+"/auth?") {
			t.Errorf("browsers are sent to %s", address)
		}
		return err
	}
	if err := begin(); !errors.Is(err, ErrProvider) {
		t.Errorf("without metadata: %v", err)
	}
	down.Store(false)
	if err := begin(); err != nil {
		t.Fatal(err)
	}
	down.Store(true)
	if err := begin(); err != nil {
		t.Errorf("one failed refresh: %v", err)
	}
	settled := func() bool {
		w.mu.Lock()
		defer w.mu.Unlock()
		return w.asking == nil
	}
	for deadline := time.Now().Add(20 * time.Second); !settled(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("the refresh does not end")
		}
	}
	w.mu.Lock()
	again := time.Until(w.until)
	w.mu.Unlock()
	if again > failureLife || again < 0 {
		t.Errorf("the next refresh is in %v", again)
	}
	// Nor does anybody wait for a provider that says nothing, which is asked once.
	silent.Store(true)
	for range 3 {
		if err := begin(); err != nil {
			t.Errorf("while a refresh takes long: %v", err)
		}
	}
	for deadline := time.Now().Add(20 * time.Second); waiting.Load() < 1; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("no refresh was tried")
		}
	}
	if n := waiting.Load(); n != 1 {
		t.Errorf("the provider is asked %d times at once", n)
	}

	// What a browser brings is in no message in full.
	for _, q := range []url.Values{{"error": {strings.Repeat("x", 5000)}, "error_description": {strings.Repeat("\n", 5000)}}, {"iss": {strings.Repeat("y", 5000)}}} {
		if _, err := w.Finish(t.Context(), Attempt{}, q); err == nil || len(err.Error()) > 1000 {
			t.Errorf("%.10q ends in %d characters", q, len(err.Error()))
		}
	}
}

// A provider that was never reached, and says nothing, holds nobody up for long: whoever
// gives up is gone at once, and the others hear of it soon.
func TestASilentProviderHoldsNobodyUp(t *testing.T) {
	t.Parallel()
	var asked atomic.Int32
	speak := make(chan struct{})
	provider := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) {
		asked.Add(1)
		<-speak
	}))
	defer provider.Close()
	defer close(speak)
	w := &Web{Provider: Provider{Issuer: provider.URL, ClientID: "console"}}
	start := time.Now()
	var people sync.WaitGroup
	for n := range 8 {
		people.Go(func() {
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			most := 15 * time.Second
			if n%2 == 0 {
				time.AfterFunc(100*time.Millisecond, cancel)
				most = 3 * time.Second
			}
			if _, err := w.Begin(ctx, Attempt{"s", "n", "v"}); !errors.Is(err, ErrProvider) || n%2 == 0 && !errors.Is(err, context.Canceled) {
				t.Errorf("%d: %v", n, err)
			}
			if took := time.Since(start); took > most {
				t.Errorf("%d waits for %v", n, took)
			}
		})
	}
	people.Wait()
	if n := asked.Load(); n != 1 {
		t.Errorf("the provider is asked %d times", n)
	}
}
