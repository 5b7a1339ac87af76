package vault_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/uuid"

	"github.com/orgkeys/orgkeys/internal/orgkey"
	"github.com/orgkeys/orgkeys/internal/vault"
)

type sealedItem = orgkey.Sealed

// item is a value that opens nowhere, for calls that only need one.
var item = sealedItem{Binding: orgkey.Binding{Org: "acme", ID: "id"}, Ciphertext: []byte("vault:v1:AAAA")}

// leave makes a key in Transit as a crash right after its creation leaves it.
func leave(t *testing.T, name string) {
	t.Helper()
	if _, err := root(t).Logical().WriteWithContext(t.Context(), "orgkeys/keys/"+name, map[string]any{"type": "rsa-2048", "exportable": true}); err != nil {
		t.Fatal(err)
	}
}

// young reaps without a grace.
func young(c *vault.Config) { c.ReapGrace, c.BlankAge = time.Nanosecond, time.Nanosecond }

func TestReaperDeletesOnlyWhatHasNoLiveReservation(t *testing.T) {
	dead, live, foreign := uuid.NewString(), uuid.NewString(), "somebody-elses"
	for _, name := range []string{dead, live, foreign} {
		leave(t, name)
	}
	defer forget(t, foreign)
	defer forget(t, live)
	alive := func(_ context.Context, names []string) (map[string]bool, error) {
		if slices.Contains(names, foreign) {
			t.Error("it asks for a key whose name is not the service's")
		}
		return map[string]bool{live: true}, nil
	}
	c := open(t, young)
	eventually(t, func() error { // until Vault's clock has moved by a second
		if p := problems(c); !strings.Contains(p, "2 keys that a crash left behind") {
			return fmt.Errorf("the check at start finds: %s", p)
		}
		return nil
	})
	if n, err := open(t).Reap(t.Context(), alive); n != 0 || err != nil {
		t.Errorf("within the grace it deleted %d, %v", n, err)
	}
	if n, err := c.Reap(t.Context(), alive); n != 1 || err != nil {
		t.Errorf("it deleted %d, %v", n, err)
	}
	left := keysInVault(t)
	if len(left) != 2 || !slices.Contains(left, any(live)) || !slices.Contains(left, any(foreign)) {
		t.Errorf("Transit holds %v", left)
	}
}

func TestReaperLeavesEverythingWhenItCannotAskForReservations(t *testing.T) {
	name := uuid.NewString()
	leave(t, name)
	defer forget(t, name)
	c := open(t, young)
	failed := errors.New("the database is away")
	if n, err := c.Reap(t.Context(), func(context.Context, []string) (map[string]bool, error) { return nil, failed }); n != 0 || !errors.Is(err, failed) {
		t.Errorf("it deleted %d, %v", n, err)
	}
}

func TestReapersOfSeveralReplicas(t *testing.T) {
	for range 4 {
		leave(t, uuid.NewString())
	}
	reapers := []*vault.Client{open(t, young), open(t, young), open(t, young)}
	eventually(t, func() error {
		var wg sync.WaitGroup
		var broken atomic.Pointer[error]
		for _, c := range reapers {
			wg.Go(func() {
				if _, err := c.Reap(t.Context(), nobodyLives); err != nil {
					broken.Store(&err)
				}
			})
		}
		wg.Wait()
		if err := broken.Load(); err != nil {
			t.Fatal(*err)
		}
		if left := keysInVault(t); len(left) > 0 {
			return fmt.Errorf("Transit still holds %v", left)
		}
		return nil
	})
}

func TestCheckTellsOfKeysLeftBehind(t *testing.T) {
	name := uuid.NewString()
	leave(t, name)
	defer forget(t, name)
	c := open(t, young)
	eventually(t, func() error {
		for _, f := range c.Check(t.Context()) {
			if strings.Contains(f.Problem, "1 keys that a crash left behind") && !f.Fatal {
				return nil
			}
		}
		return errors.New("it does not")
	})
}
