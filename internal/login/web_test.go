package login

import (
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"sync/atomic"
	"testing"
	"time"
)

// A provider whose metadata fails for a while signs people in with what was read before.
func TestMetadataOutlivesAFailedRefresh(t *testing.T) {
	t.Parallel()
	var down atomic.Bool
	down.Store(true)
	var issuer string
	provider := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		if down.Load() {
			w.WriteHeader(http.StatusBadGateway)
			return
		}
		w.Header().Set("Content-Type", "application/json")
		fmt.Fprintf(w, `{"issuer":%q,"authorization_endpoint":%q,"token_endpoint":%q,"jwks_uri":%q}`, issuer, issuer+"/auth", issuer+"/token", issuer+"/jwks")
	}))
	defer provider.Close()
	issuer = provider.URL
	w := &Web{Provider: Provider{Issuer: issuer, ClientID: "console"}, Redirect: "http://localhost/console/callback"}
	begin := func() error {
		w.until = time.Time{} // what was found, or failed, is old
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
	if again := time.Until(w.until); again > failureLife {
		t.Errorf("the next refresh is in %v", again)
	}

	// What a browser brings is in no message in full.
	for _, q := range []url.Values{{"error": {strings.Repeat("x", 5000)}, "error_description": {strings.Repeat("\n", 5000)}}, {"iss": {strings.Repeat("y", 5000)}}} {
		if _, err := w.Finish(t.Context(), Attempt{}, q); err == nil || len(err.Error()) > 1000 {
			t.Errorf("%.10q ends in %d characters", q, len(err.Error()))
		}
	}
}
