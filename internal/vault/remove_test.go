package vault_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	mathrand "math/rand/v2"
	"net/http"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/uuid"

	"github.com/orgkeys/orgkeys/internal/orgkey"
	"github.com/orgkeys/orgkeys/internal/vault"
	"github.com/orgkeys/orgkeys/internal/vault/vaulttest"
)

// storedAs returns the files of Vault's storage that hold a key of Transit, as its policy or
// its archive.
func storedAs(t testing.TB, kind, name string) []string {
	t.Helper()
	files, err := server.Stored(kind, name)
	if err != nil {
		t.Fatal(err)
	}
	return files
}

// undeletable has Vault's storage fail to delete the archive of a key, until it is restored.
func undeletable(t testing.TB, name string) (restore func()) {
	t.Helper()
	restored, err := server.KeepArchive(name)
	if err != nil {
		t.Fatal(err)
	}
	return func() {
		if err := restored(); err != nil {
			t.Error(err)
		}
	}
}

// interrupted reports an error unless an answer to a deletion is that of one that removed
// key name and not its archive.
func interrupted(t testing.TB, name, said string) error {
	t.Helper()
	if left := storedAs(t, "policy", name); len(left) > 0 {
		return fmt.Errorf("Vault has not deleted the key: %v, %s", left, said)
	}
	if !strings.Contains(said, "error deleting key") || !strings.Contains(said, "archive: failed to remove") {
		return fmt.Errorf("Vault answered the deletion with %s", said)
	}
	if held, err := server.HoldsPrivateKey(context.WithoutCancel(t.Context()), name); err != nil || !held {
		return fmt.Errorf("its archive holds a private key: %t, %w", held, err)
	}
	return nil
}

// interruptDeletion has Vault's storage fail the first deletion that comes through proxy, when Vault has deleted
// the key and not its archive. It returns how many were answered, and what proxy does before a call.
func interruptDeletion(t *testing.T, proxy *vaulttest.Proxy, name string) (answered *atomic.Int64, before func(http.ResponseWriter, *http.Request) bool) {
	t.Helper()
	answered = new(atomic.Int64)
	var restore func()
	var first sync.Once
	before = func(_ http.ResponseWriter, r *http.Request) bool {
		if r.Method == http.MethodDelete {
			first.Do(func() { restore = undeletable(t, name) })
		}
		return true
	}
	proxy.Before(before)
	proxy.After(func(r *http.Response) error {
		if r.Request.Method != http.MethodDelete || answered.Add(1) > 1 {
			return nil
		}
		body, err := io.ReadAll(r.Body)
		r.Body = io.NopCloser(bytes.NewReader(body))
		restore()
		if err = errors.Join(err, interrupted(t, name, string(body))); err != nil {
			t.Error(err)
		}
		return nil
	})
	return answered, before
}

// leaveArchive leaves the archive of a key, as the death of a process does that has it deleted.
func leaveArchive(t *testing.T, mount string) (name string) {
	t.Helper()
	name = uuid.NewString()
	logical, place := root(t).Logical(), mount+"/keys/"+name
	if err := errors.Join(second(logical.WriteWithContext(t.Context(), place, map[string]any{"type": "rsa-2048", "exportable": true})),
		second(logical.WriteWithContext(t.Context(), place+"/config", map[string]any{"deletion_allowed": true}))); err != nil {
		t.Fatal(err)
	}
	restore := undeletable(t, name)
	_, err := logical.DeleteWithContext(t.Context(), place)
	restore()
	if err := interrupted(t, name, fmt.Sprint(err)); err != nil {
		t.Fatal(err)
	}
	return name
}

// erased reports an error unless Vault's storage holds nothing of key name, or a blank.
func erased(t testing.TB, mount, name string) error {
	t.Helper()
	if len(storedAs(t, "policy", name)) == 0 {
		if left := storedAs(t, "archive", name); len(left) > 0 {
			return fmt.Errorf("key %s left its archive: %v", name, left)
		}
		return nil
	}
	k, err := root(t).Logical().ReadWithContext(context.WithoutCancel(t.Context()), mount+"/keys/"+name)
	if err != nil {
		return err
	}
	if k.Data["type"] != "aes256-gcm96" || k.Data["exportable"] != false || k.Data["deletion_allowed"] != false {
		return fmt.Errorf("there is a key %v", k.Data)
	}
	versions, err := server.Archived(context.WithoutCancel(t.Context()), name)
	if err != nil {
		return err
	}
	if len(versions) != 2 || len(versions[1].Key) != 32 || versions[0].RSA != nil || versions[1].RSA != nil {
		return fmt.Errorf("the archive of key %s has %d versions, and not a blank alone", name, len(versions))
	}
	return nil
}

// TestAnInterruptedDeletionLeavesNoPrivateKeyInVaultsStorage, whoever deletes.
func TestAnInterruptedDeletionLeavesNoPrivateKeyInVaultsStorage(t *testing.T) {
	ctx := t.Context()
	for what, d := range map[string]struct {
		mount  string
		make   func(t *testing.T, c *vault.Client) (name string, remove func() error)
		failed bool // nobody may have the key
	}{
		"key": {"orgkeys", func(t *testing.T, c *vault.Client) (string, func() error) {
			name := uuid.NewString()
			k, err := c.Keystore().Create(ctx, name)
			if err != nil {
				t.Fatal(err)
			}
			return name, func() error { return k.Destroy(ctx) }
		}, false},
		"key of a caller who is gone": {"orgkeys", func(t *testing.T, c *vault.Client) (string, func() error) {
			name := uuid.NewString()
			k, err := c.Keystore().Create(ctx, name)
			if err != nil {
				t.Fatal(err)
			}
			ended, cancel := context.WithCancel(ctx)
			cancel()
			return name, func() error { return k.Destroy(ended) }
		}, false},
		"sealed key": {"orgkeys-sealed", func(t *testing.T, c *vault.Client) (string, func() error) {
			name := uuid.NewString()
			k, err := c.Keystore().CreateSealed(ctx, name)
			if err != nil {
				t.Fatal(err)
			}
			return name, func() error { return k.Destroy(ctx) }
		}, false},
		"what a dead process may have left": {"orgkeys-sealed", func(t *testing.T, c *vault.Client) (string, func() error) {
			name := uuid.NewString()
			if _, err := c.Keystore().CreateSealed(ctx, name); err != nil {
				t.Fatal(err)
			}
			ended, cancel := context.WithCancel(ctx)
			cancel()
			return name, func() error { return c.Keystore().DestroySealed(ended, name) }
		}, false},
		"pool key": {"orgkeys", func(t *testing.T, c *vault.Client) (string, func() error) {
			name, public := ahead(t, c, orgkey.UsePlain)
			return name, func() error { return c.Keystore().TakenPlain(name, public).Destroy(ctx) }
		}, true},
		"sealed pool key": {"orgkeys-sealed", func(t *testing.T, c *vault.Client) (string, func() error) {
			name, public := ahead(t, c, orgkey.UseSealed)
			return name, func() error { return c.Keystore().TakenSealed(name, public).Destroy(ctx) }
		}, true},
		"pool key that nobody takes": {"orgkeys", func(t *testing.T, c *vault.Client) (string, func() error) {
			name, _ := ahead(t, c, orgkey.UsePlain)
			return name, func() error { return c.Keystore().Discard(ctx, orgkey.UsePlain, name) }
		}, false},
		"key that a crash left": {"orgkeys", func(t *testing.T, c *vault.Client) (string, func() error) {
			name := uuid.NewString()
			leave(t, name)
			if err := second(root(t).Logical().WriteWithContext(ctx, "orgkeys/keys/"+name+"/config", map[string]any{"deletion_allowed": true})); err != nil {
				t.Fatal(err)
			}
			return name, func() error {
				var err error
				eventually(t, func() error { // until Vault's clock has moved by a second
					n := 0
					if n, err = c.Reap(ctx, nobodyLives); n == 0 && err == nil {
						return errors.New("it deletes nothing")
					}
					return nil
				})
				return err
			}
		}, false},
	} {
		t.Run(what, func(t *testing.T) {
			proxy, c := through(t, func(c *vault.Config) { c.ReapGrace = time.Nanosecond })
			name, remove := d.make(t, c)
			answered, _ := interruptDeletion(t, proxy, name)
			if err := remove(); (err != nil) != d.failed {
				t.Errorf("removing it: %v", err)
			}
			if answered.Load() == 0 {
				t.Error("no deletion was interrupted")
			}
			if err := erased(t, d.mount, name); err != nil {
				t.Error(err)
			}
			reapBlanks(t)
			if left := append(storedAs(t, "archive", name), storedAs(t, "policy", name)...); len(left) > 0 {
				t.Errorf("Vault's storage has %v", left)
			}
		})
	}
}

// reapBlanks reaps until there is no key.
func reapBlanks(t testing.TB) {
	t.Helper()
	c := open(t, young)
	eventually(t, func() error {
		if _, err := c.Reap(t.Context(), nobodyLives); err != nil {
			return err
		}
		if left := append(namesIn(t, "orgkeys"), namesIn(t, "orgkeys-sealed")...); len(left) > 0 {
			return fmt.Errorf("Transit still holds %v", left)
		}
		return nil
	})
}

// TestABlankIsNobodysKey: whoever comes too late for a key that was deleted, and has a blank in
// its place, has neither the blank nor the right to release what it exported before.
func TestABlankIsNobodysKey(t *testing.T) {
	for use, mount := range map[orgkey.Use]string{orgkey.UsePlain: "orgkeys", orgkey.UseSealed: "orgkeys-sealed"} {
		t.Run(string(use), func(t *testing.T) {
			proxy, interrupted := through(t)
			late := open(t, func(c *vault.Config) { c.ReapGrace = time.Nanosecond })
			name, public := ahead(t, late, use)
			// Both have taken the key, as after a failover, and the one who is late has exported it.
			destroy := func(c *vault.Client) func() error {
				if use == orgkey.UseSealed {
					return func() error { return c.Keystore().TakenSealed(name, public).Destroy(t.Context()) }
				}
				k := c.Keystore().TakenPlain(name, public)
				der, err := k.Export(t.Context())
				if err != nil {
					t.Fatal(err)
				}
				clear(der)
				return func() error { return k.Destroy(t.Context()) }
			}
			first, then := destroy(interrupted), destroy(late)
			interruptDeletion(t, proxy, name)
			if err := first(); err == nil {
				t.Error("who does not know whether it deleted the key may release it")
			}
			is := func(when string) {
				t.Helper()
				if err := erased(t, mount, name); err != nil || len(storedAs(t, "policy", name)) == 0 {
					t.Errorf("%s: no blank is there, %v", when, err)
				}
			}
			is("after the interrupted deletion")
			for range 2 {
				if err := then(); err == nil || first() == nil {
					t.Error("who deleted a blank may release the key")
				}
			}
			is("after further deletions")
			if err := late.Keystore().Discard(t.Context(), use, name); err != nil {
				t.Error(err)
			}
			is("after it was discarded")
			if n, err := late.Reap(t.Context(), nobodyLives); n != 0 || err != nil {
				t.Errorf("the reaper deleted %d, %v", n, err)
			}
			is("when it is young, after the reaper came")
			if use == orgkey.UsePlain {
				if _, err := late.Keystore().TakenPlain(name, public).Export(t.Context()); err == nil {
					t.Error("a blank is exported")
				}
				if _, err := late.Keystore().Create(t.Context(), name); !errors.Is(err, vault.ErrNotFresh) {
					t.Errorf("creating a key over a blank: %v", err)
				}
			} else if _, err := late.Keystore().TakenSealed(name, public).Seal(t.Context(), &recipient(t).PublicKey); err == nil {
				t.Error("a blank is exported")
			}
			reapBlanks(t)
		})
	}
}

// TestErasingAnArchiveSparesAKey: what Vault says does not exist, and does after all, stays as it is.
func TestErasingAnArchiveSparesAKey(t *testing.T) {
	proxy, c := through(t)
	name, public := ahead(t, c, orgkey.UsePlain)
	proxy.Before(func(w http.ResponseWriter, r *http.Request) bool {
		switch {
		case r.Method == http.MethodDelete:
			w.WriteHeader(http.StatusBadRequest)
			fmt.Fprint(w, `{"errors":["could not delete key; not found"]}`)
		case r.Method == http.MethodGet && strings.HasSuffix(r.URL.Path, name):
			w.WriteHeader(http.StatusNotFound)
			fmt.Fprint(w, `{"errors":[]}`)
		default:
			return true
		}
		return false
	})
	if err := c.Keystore().Discard(t.Context(), orgkey.UsePlain, name); err == nil {
		t.Error("a key that is there counts as gone")
	}
	proxy.Before(nil)
	k := c.Keystore().TakenPlain(name, public)
	der, err := k.Export(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	clear(der)
	if err := k.Destroy(t.Context()); err != nil {
		t.Error(err)
	}
}

// TestAnArchiveInDoubtIsErasedLater: a key whose deletion was interrupted by a Vault that then
// was away is not released, and its archive is erased once Vault is back.
func TestAnArchiveInDoubtIsErasedLater(t *testing.T) {
	proxy, c := through(t)
	name := uuid.NewString()
	k, err := c.Keystore().Create(t.Context(), name)
	if err != nil {
		t.Fatal(err)
	}
	_, interrupt := interruptDeletion(t, proxy, name)
	var away atomic.Bool
	spoil := func(r *http.Request) bool { return away.Load() || r.Method == http.MethodDelete && away.Swap(true) }
	proxy.Before(func(w http.ResponseWriter, r *http.Request) bool {
		if spoil(r) {
			w.WriteHeader(http.StatusBadGateway)
			return false
		}
		return interrupt(w, r)
	})
	if err := k.Destroy(t.Context()); !errors.Is(err, orgkey.ErrUnavailable) {
		t.Errorf("destroying it: %v", err)
	}
	if erased(t, "orgkeys", name) == nil {
		t.Fatal("the deletion was not interrupted")
	}
	if _, err := c.Reap(t.Context(), nobodyLives); err == nil {
		t.Error("reaping without a Vault succeeds")
	}
	proxy.Before(nil)
	if _, err := c.Reap(t.Context(), nobodyLives); err != nil {
		t.Error(err)
	}
	if err := erased(t, "orgkeys", name); err != nil {
		t.Error(err)
	}
	if err := k.Destroy(t.Context()); err != nil {
		t.Errorf("destroying it again: %v", err)
	}
	reapBlanks(t)
}

// traces are the names that dead processes left.
type traces struct {
	all       []orgkey.Trace
	forgotten []string
	failing   error
}

func (tr *traces) Traces(context.Context) ([]orgkey.Trace, error) { return tr.all, tr.failing }

func (tr *traces) ForgetTraces(_ context.Context, names []string) error {
	tr.forgotten = append(tr.forgotten, names...)
	return nil
}

// TestReaperErasesWhatDeadProcessesLeft, and nothing else.
func TestReaperErasesWhatDeadProcessesLeft(t *testing.T) {
	plain, sealed, nothing := leaveArchive(t, "orgkeys"), leaveArchive(t, "orgkeys-sealed"), uuid.NewString()
	left := &traces{all: []orgkey.Trace{{Name: plain, Use: orgkey.UsePlain}, {Name: sealed, Use: orgkey.UseSealed}, {Name: nothing, Use: orgkey.UsePlain}, {Name: "../seal", Use: orgkey.UsePlain}}}
	proxy, c := through(t, func(c *vault.Config) { c.Traces = left })
	there, public := ahead(t, c, orgkey.UsePlain)
	left.all = append(left.all, orgkey.Trace{Name: there, Use: orgkey.UsePlain})
	proxy.Before(func(w http.ResponseWriter, r *http.Request) bool {
		if strings.HasSuffix(r.URL.Path, sealed) {
			w.WriteHeader(http.StatusServiceUnavailable)
			return false
		}
		return true
	})
	if _, err := c.Reap(t.Context(), nobodyLives); !errors.Is(err, orgkey.ErrUnavailable) {
		t.Errorf("without an answer about one of them: %v", err)
	}
	if want := []string{plain, nothing, "../seal"}; !slices.Equal(left.forgotten, want) {
		t.Errorf("it has followed %v, want %v", left.forgotten, want)
	}
	proxy.Before(nil)
	if n, err := c.Reap(t.Context(), nobodyLives); n != 0 || err != nil {
		t.Errorf("it reaped %d, %v", n, err)
	}
	if !slices.Contains(left.forgotten, sealed) || slices.Contains(left.forgotten, there) {
		t.Errorf("it has followed %v", left.forgotten)
	}
	if err := errors.Join(erased(t, "orgkeys", plain), erased(t, "orgkeys-sealed", sealed), erased(t, "orgkeys", nothing)); err != nil {
		t.Error(err)
	}
	k := c.Keystore().TakenPlain(there, public)
	der, err := k.Export(t.Context())
	if err != nil {
		t.Errorf("a key that is there: %v", err)
	}
	clear(der)
	if err := k.Destroy(t.Context()); err != nil {
		t.Error(err)
	}
	left.failing = errors.New("the database is away")
	if _, err := c.Reap(t.Context(), nobodyLives); !errors.Is(err, left.failing) {
		t.Errorf("without a database: %v", err)
	}
	reapBlanks(t)
}

// TestDeletionsCutOffAtAnyMoment: connections end while Vault deletes, as they do.
func TestDeletionsCutOffAtAnyMoment(t *testing.T) {
	rounds := 25
	if os.Getenv("ORGKEYS_TEST_LONG") != "" {
		rounds = 400
	}
	proxy, c := through(t)
	random := mathrand.New(mathrand.NewPCG(1, 7))
	unknown := 0
	for range rounds {
		name := uuid.NewString()
		k, err := c.Keystore().Create(t.Context(), name)
		if err != nil {
			t.Fatal(err)
		}
		patience := 500*time.Microsecond + time.Duration(random.IntN(9000))*time.Microsecond
		var cut atomic.Bool
		proxy.Before(func(_ http.ResponseWriter, r *http.Request) bool {
			if r.Method != http.MethodDelete || cut.Swap(true) {
				return true
			}
			ctx, cancel := context.WithTimeout(r.Context(), patience)
			defer cancel()
			proxy.Forward(r.WithContext(ctx))
			panic(http.ErrAbortHandler)
		})
		if err := k.Destroy(t.Context()); err != nil {
			t.Errorf("destroying it: %v", err)
		}
		if err := erased(t, "orgkeys", name); err != nil {
			t.Error(err)
		}
		if len(storedAs(t, "policy", name)) > 0 {
			unknown++
		}
	}
	t.Logf("%d deletions were cut off; of %d it was not known what they left", rounds, unknown)
	reapBlanks(t)
}
