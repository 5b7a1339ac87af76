package authn

import (
	"errors"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/orgkeys/orgkeys/internal/authz"
	"github.com/orgkeys/orgkeys/internal/org"
)

func openIssuer(t *testing.T, dir string) *DevIssuer {
	t.Helper()
	d, err := OpenDevIssuer(dir)
	if err != nil {
		t.Fatal(err)
	}
	return d
}

func devVerifier(t *testing.T, d *DevIssuer) *Verifier {
	t.Helper()
	return must(New(nil, must(d.Issuer())))
}

func TestDevelopmentTokens(t *testing.T) {
	dir := t.TempDir()
	v := devVerifier(t, openIssuer(t, dir))
	// Another process: it opens the same directory.
	token := must(openIssuer(t, dir).Issue("alice", "org-1", []authz.Role{authz.Administrator, authz.User}, time.Hour))
	caller, err := v.Authenticate(t.Context(), bearerHeader(token))
	want := authz.Caller{
		Kind: authz.Person, Subject: "alice", Org: "org-1", Roles: []authz.Role{authz.Administrator, authz.User},
	}
	if err != nil || !reflect.DeepEqual(caller, want) {
		t.Errorf("Authenticate = %+v, %v, want %+v", caller, err, want)
	}
	v.now = func() time.Time { return time.Now().Add(time.Hour) }
	checkRefused(t, v, token, ReasonExpired)

	checkRefused(t, devVerifier(t, openIssuer(t, t.TempDir())), token, ReasonUnknownKey)
}

func TestDevelopmentTokensThatAreNotIssued(t *testing.T) {
	d := openIssuer(t, t.TempDir())
	owner := []authz.Role{authz.Owner}
	for _, tt := range []struct {
		name, subject string
		org           org.ID
		roles         []authz.Role
		ttl           time.Duration
	}{
		{"no subject", "", "org-1", owner, time.Hour},
		{"subject with a line break", "a\n", "org-1", owner, time.Hour},
		{"subject with invalid UTF-8", "a\xff", "org-1", owner, time.Hour},
		{"no organization", "alice", "", owner, time.Hour},
		{"no role", "alice", "org-1", nil, time.Hour},
		{"unknown role", "alice", "org-1", []authz.Role{authz.Owner, "ROOT"}, time.Hour},
		{"no time", "alice", "org-1", owner, 0},
		{"negative time", "alice", "org-1", owner, -time.Hour},
		{"more than a day", "alice", "org-1", owner, MaxDevTTL + time.Second},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if token, err := d.Issue(tt.subject, tt.org, tt.roles, tt.ttl); err == nil {
				t.Errorf("issued %q", token)
			}
		})
	}
}

func TestDevelopmentKeyFile(t *testing.T) {
	dir := t.TempDir()
	openIssuer(t, dir)
	entries, err := os.ReadDir(dir)
	if err != nil || len(entries) != 1 {
		t.Fatalf("the directory holds %v, %v, want the key alone", entries, err)
	}
	info, err := entries[0].Info()
	if err != nil || info.Mode() != 0o600 {
		t.Errorf("mode %v, %v, want 0600", info.Mode(), err)
	}
	path := filepath.Join(dir, devKeyFile)
	for _, mode := range []os.FileMode{0o640, 0o604, 0o620, 0o602, 0o644, 0o666} {
		if err := os.Chmod(path, mode); err != nil {
			t.Fatal(err)
		}
		if _, err := OpenDevIssuer(dir); err == nil {
			t.Errorf("accepted with mode %v", mode)
		}
	}
}

// TestDamagedDevelopmentKey: a damaged key is not replaced in silence.
func TestDamagedDevelopmentKey(t *testing.T) {
	for name, content := range map[string]string{
		"empty":       "",
		"not PEM":     "hello",
		"another PEM": "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n",
		"not PKCS#8":  "-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n",
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			path := filepath.Join(dir, devKeyFile)
			if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
				t.Fatal(err)
			}
			if _, err := OpenDevIssuer(dir); err == nil {
				t.Error("accepted")
			}
			if b, err := os.ReadFile(path); err != nil || string(b) != content {
				t.Errorf("the file holds %q now, %v", b, err)
			}
		})
	}
}

func TestDevelopmentKeyNeedsItsDirectory(t *testing.T) {
	_, err := OpenDevIssuer(filepath.Join(t.TempDir(), "missing"))
	if !errors.Is(err, os.ErrNotExist) {
		t.Errorf("error %v", err)
	}
}

// TestOpeningAtTheSameTimeGivesOneKey: the race of two processes, in one.
func TestOpeningAtTheSameTimeGivesOneKey(t *testing.T) {
	dir := t.TempDir()
	var mu sync.Mutex
	keyIDs := make(map[string]bool)
	var group sync.WaitGroup
	for range 20 {
		group.Go(func() {
			d, err := OpenDevIssuer(dir)
			if err != nil {
				t.Error(err)
				return
			}
			mu.Lock()
			defer mu.Unlock()
			keyIDs[d.keyID] = true
		})
	}
	group.Wait()
	if len(keyIDs) != 1 {
		t.Errorf("%d keys, want 1", len(keyIDs))
	}
	if entries, err := os.ReadDir(dir); err != nil || len(entries) != 1 || strings.HasPrefix(entries[0].Name(), ".") {
		t.Errorf("left behind: %v, %v", entries, err)
	}
}
