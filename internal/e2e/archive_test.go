package e2e

import (
	"context"
	"maps"
	mathrand "math/rand/v2"
	"net/http"
	"path"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/orgkeys/orgkeys/internal/e2e/harness"
)

// TestAKillDuringADeletionLeavesNoPrivateKeyInVaultsStorage: what Vault has of a key that the
// service had deleted when it died is erased after its restart, and the requests that come then get other keys.
func TestAKillDuringADeletionLeavesNoPrivateKeyInVaultsStorage(t *testing.T) {
	t.Parallel()
	for name, pool := range map[string]int{"made for the request": 0, "made ahead": 2} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			v, proxy, settings := onItsOwnVault(t)
			issuer := harness.NewIssuer(t)
			s := harness.Start(t, settings, onItsPort(t), poolOf(pool), shortLife(t, 3*time.Second), harness.TrustedBy(issuer))
			random := mathrand.New(mathrand.NewPCG(*seed, 38))
			var left []string
			die := func(mount string, exactly bool) {
				died := make(chan struct{})
				proxy.Before(func(w http.ResponseWriter, r *http.Request) bool {
					key, ours := strings.CutPrefix(r.URL.Path, "/v1/"+mount+"/keys/")
					if r.Method != http.MethodDelete || !ours || path.Base(key) != key {
						return true
					}
					if private, err := v.HoldsPrivateKey(t.Context(), key); err != nil || !private {
						if err != nil {
							t.Error(err)
						}
						return true // a recipient's
					}
					proxy.Before(nil)
					if !exactly {
						go func() {
							time.Sleep(time.Duration(random.IntN(5000)) * time.Microsecond)
							s.Kill()
							close(died)
						}()
						return true
					}
					restore, err := v.KeepArchive(key)
					if err == nil {
						proxy.Forward(r)
						err = restore()
					}
					if err != nil {
						t.Error(err)
					}
					left = append(left, key)
					s.Kill()
					close(died)
					panic(http.ErrAbortHandler)
				})
				whole := make(chan error, 1)
				if mount == "orgkeys" {
					_, err := askForKey(t, s, func(org string) string { return issuer.Token(t, harness.Claims{"org_id": org, "org_role": "OWNER"}) })
					whole <- err
				} else {
					org := harness.Org()
					m := mint(t, s, org, `{}`)
					e := enrollment(t, s.API, m.Token, newRecipient(t), 2*time.Minute)
					go func() { _, err := e.Fetch(context.WithoutCancel(t.Context())); whole <- err }()
				}
				<-died
				s.Start(t)
				if err := <-whole; err != nil && mount != "orgkeys" {
					t.Errorf("the node gets no key: %v", err)
				}
			}
			orphans := func() []string {
				t.Helper()
				names, err := v.Orphans(context.WithoutCancel(t.Context()))
				must(t, err)
				return names
			}
			seen := map[string]bool{}
			for _, mount := range []string{"orgkeys", "orgkeys-sealed"} {
				if pool > 0 {
					filled(t, s, pool)
				}
				die(mount, true)
				if mount == "orgkeys" && !slices.Equal(orphans(), left) {
					t.Fatalf("Vault's storage has the archives of %v, want %v", orphans(), left)
				}
			}
			kills := 2
			if long() {
				kills = 150
			}
			for range kills {
				die("orgkeys", false)
				for _, name := range orphans() {
					seen[name] = !slices.Contains(left, name)
				}
			}
			maps.DeleteFunc(seen, func(_ string, random bool) bool { return !random })
			t.Logf("%d of %d random kills left an archive without its key", len(seen), kills)
			harness.Eventually(t, 2*time.Minute, "no archive holds a key that was deleted", func() bool { return len(orphans()) == 0 })
			for _, name := range left {
				if held, err := v.HoldsPrivateKey(context.WithoutCancel(t.Context()), name); err != nil || held {
					t.Errorf("the archive of key %s still holds it: %v", name, err)
				}
			}
			harness.Eventually(t, 2*time.Minute, "Vault holds the pool and nothing else", func() bool { return len(inTransit(t, v)) == pool })
		})
	}
}
