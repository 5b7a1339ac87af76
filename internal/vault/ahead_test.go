package vault_test

import (
	"context"
	"errors"
	"net/http"
	"slices"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/google/uuid"

	"github.com/orgkeys/orgkeys/internal/orgkey"
	"github.com/orgkeys/orgkeys/internal/vault"
)

// ahead makes a key that waits in Transit.
func ahead(t *testing.T, c *vault.Client, use orgkey.Use) (string, orgkey.Public) {
	t.Helper()
	name := uuid.NewString()
	public, err := c.Keystore().CreateAhead(t.Context(), use, name)
	if err != nil {
		t.Fatal(err)
	}
	return name, public
}

// What the pool relies on: of several deletions of a key at once, Transit answers
// exactly one with 204, whichever client each comes from.
func TestTransitAnswersOneOfSeveralDeletionsWith204(t *testing.T) {
	c := open(t)
	rounds := 20
	for range rounds {
		name, _ := ahead(t, c, orgkey.UsePlain)
		const n = 8
		var won, lost atomic.Int64
		var at sync.WaitGroup
		start := make(chan struct{})
		for range n {
			client := root(t)
			at.Go(func() {
				<-start
				answer, err := client.Logical().DeleteRawWithContext(context.Background(), "orgkeys/keys/"+name)
				switch {
				case err == nil && answer.StatusCode == http.StatusNoContent:
					won.Add(1)
				case status(err) == http.StatusBadRequest:
					lost.Add(1)
				default:
					t.Errorf("a deletion was answered with %v, %v", answer, err)
				}
			})
		}
		close(start)
		at.Wait()
		if won.Load() != 1 || lost.Load() != n-1 {
			t.Fatalf("%d deletions were answered with 204, %d with 400", won.Load(), lost.Load())
		}
	}
}

// Several takers of one key, as after a database was restored or altered: each may
// export it, and one of them may release it.
func TestAPoolKeyBelongsToTheTakerWhoseDeletionRemovedIt(t *testing.T) {
	for range 5 {
		clients := []*vault.Client{open(t), open(t), open(t)}
		name, public := ahead(t, clients[0], orgkey.UsePlain)
		var exported, own atomic.Int64
		var at sync.WaitGroup
		for _, c := range clients {
			k := c.Keystore().TakenPlain(name, public)
			at.Go(func() {
				der, err := k.Export(context.Background())
				if err == nil {
					exported.Add(1)
				}
				clear(der)
				if k.Destroy(context.Background()) == nil {
					own.Add(1)
				}
			})
		}
		at.Wait()
		if exported.Load() == 0 || own.Load() != 1 {
			t.Fatalf("%d takers exported the key, %d may release it", exported.Load(), own.Load())
		}
	}
	if left := keysInVault(t); len(left) > 0 {
		t.Errorf("Transit holds %v", left)
	}
}

func TestASealablePoolKeyBelongsToTheTakerWhoseDeletionRemovedIt(t *testing.T) {
	a, b := open(t), open(t)
	name, public := ahead(t, a, orgkey.UseSealed)
	first, second := a.Keystore().TakenSealed(name, public), b.Keystore().TakenSealed(name, public)
	if err := first.Destroy(t.Context()); err != nil {
		t.Error(err)
	}
	if err := first.Destroy(t.Context()); err != nil {
		t.Errorf("once more: %v", err)
	}
	if err := second.Destroy(t.Context()); err == nil {
		t.Error("two takers may release one key")
	}
}

// A deletion whose answer was lost may have been somebody else's.
func TestAPoolKeyWhoseDeletionIsInDoubtIsDestroyedAndNobodys(t *testing.T) {
	for what, status := range map[string]int{"broken connection": 0, "502": http.StatusBadGateway, "200": http.StatusOK} {
		t.Run(what, func(t *testing.T) {
			proxy, c := through(t)
			name, public := ahead(t, c, orgkey.UsePlain)
			k := c.Keystore().TakenPlain(name, public)
			deletions := atomic.Int64{}
			proxy.After(func(r *http.Response) error {
				if r.Request.Method != http.MethodDelete || deletions.Add(1) > 1 {
					return nil
				}
				if status == 0 {
					return errors.New("lost")
				}
				r.StatusCode = status
				return nil
			})
			if err := k.Destroy(t.Context()); err == nil {
				t.Error("it may be released")
			}
			if left := keysInVault(t); slices.Contains(left, any(name)) {
				t.Errorf("Transit holds %v", left)
			}
		})
	}
}

// TestReaperLeavesThePool, in either mount, however old its keys are, and takes them
// once their rows are gone, as after a restored database.
func TestReaperLeavesThePool(t *testing.T) {
	c := open(t, young)
	plain, _ := ahead(t, c, orgkey.UsePlain)
	sealed, _ := ahead(t, c, orgkey.UseSealed)
	inPool := func(_ context.Context, names []string) (map[string]bool, error) {
		return map[string]bool{plain: true, sealed: true}, nil
	}
	if n, err := c.Reap(t.Context(), inPool); n != 0 || err != nil {
		t.Errorf("it deleted %d, %v", n, err)
	}
	reaped := 0
	eventually(t, func() error { // until Vault's clock has moved by a second
		n, err := c.Reap(t.Context(), nobodyLives)
		if reaped += n; err == nil && reaped != 2 {
			err = errors.New("it has not deleted both")
		}
		return err
	})
}

func TestCheckKnowsThePool(t *testing.T) {
	c := open(t, young)
	name, _ := ahead(t, c, orgkey.UseSealed)
	defer func() {
		if err := c.Keystore().Discard(t.Context(), orgkey.UseSealed, name); err != nil {
			t.Error(err)
		}
	}()
	knowing := open(t, young, func(config *vault.Config) {
		config.Live = func(context.Context, []string) (map[string]bool, error) { return map[string]bool{name: true}, nil }
	})
	eventually(t, func() error { // until Vault's clock has moved by a second
		if problems(c) == "" {
			return errors.New("a client that knows no pool does not find the key")
		}
		return nil
	})
	if p := problems(knowing); p != "" {
		t.Errorf("the check at start finds: %s", p)
	}
}
