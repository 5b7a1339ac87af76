//go:build cgo

package hsm

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/miekg/pkcs11"

	"github.com/orgkeys/orgkeys/internal/orgkey"
)

func slotOf(token *Token) uint {
	token.mu.Lock()
	defer token.mu.Unlock()
	return token.life.slot
}

func renewals(token *Token) int {
	token.mu.Lock()
	defer token.mu.Unlock()
	return token.renewals
}

// losses are the ways in which the library loses what it was given, behind a Token's back.
func losses() map[string]func(*Token) error {
	return map[string]func(*Token) error{
		"all sessions closed": func(token *Token) error { return token.lib.CloseAllSessions(slotOf(token)) },
		"logged out": func(token *Token) error {
			return token.life.anchor.do(func(h pkcs11.SessionHandle) error { return token.lib.Logout(h) })
		},
		"library finalised": func(token *Token) error { return token.lib.Ctx.Finalize() },
		"library finalised and initialised again": func(token *Token) error {
			return errors.Join(token.lib.Finalize(), token.lib.initialize(token.cfg.InitArgs))
		},
		// The old numbers are valid again, and belong to others.
		"handles given to others": func(token *Token) error {
			slot := slotOf(token)
			err := errors.Join(token.lib.Finalize(), token.lib.initialize(token.cfg.InitArgs))
			for range 20 {
				_, opened := token.lib.OpenSession(slot, pkcs11.CKF_SERIAL_SESSION|pkcs11.CKF_RW_SESSION)
				err = errors.Join(err, opened)
			}
			return err
		},
		"one session closed": func(token *Token) error {
			return errors.Join(token.lib.CloseSession(token.life.generate.all[0].handle), token.lib.CloseSession(token.life.seal.all[0].handle))
		},
		"anchor closed": func(token *Token) error { return token.lib.CloseSession(token.life.anchor.handle) },
	}
}

func TestRecoversWithoutAnError(t *testing.T) {
	cfg := freshToken(t)
	for loss, lose := range losses() {
		for what, use := range map[string]func(*Token, orgkey.Sealed) error{
			"generating": func(token *Token, _ orgkey.Sealed) error { return generateOne(bounded(t), token) },
			"sealing": func(token *Token, item orgkey.Sealed) error {
				_, err := token.Seal(bounded(t), item.Binding, []byte("another"))
				return err
			},
			"opening": func(token *Token, item orgkey.Sealed) error {
				_, err := token.Open(bounded(t), []orgkey.Sealed{item})
				return err
			},
			"health": func(token *Token, _ orgkey.Sealed) error { return token.Healthy(bounded(t)) },
		} {
			t.Run(loss+", then "+what, func(t *testing.T) {
				cfg.Generations, cfg.Sealings = 1, 1
				token := open(t, cfg)
				item := orgkey.Sealed{Binding: orgkey.Binding{Org: "acme", ID: "one"}}
				var err error
				if item.Ciphertext, err = token.Seal(bounded(t), item.Binding, []byte("value")); err != nil {
					t.Fatal(err)
				}
				if err := lose(token); err != nil {
					t.Fatalf("losing: %v", err)
				}
				if err := use(token, item); err != nil {
					t.Errorf("%s: %v", what, err)
				}
				opened, err := token.Open(bounded(t), []orgkey.Sealed{item})
				if err != nil || !bytes.Equal(opened[0], []byte("value")) {
					t.Errorf("afterwards an older record does not open: %v", err)
				}
				if what != "health" && loss != "one session closed" && loss != "anchor closed" && renewals(token) == 0 {
					t.Error("nothing was renewed: the test has not lost anything")
				}
			})
		}
	}
}

// closeBetweenCalls closes all sessions while no call is in the library: with
// one in it, SoftHSM crashes, which no caller can help.
func closeBetweenCalls(token *Token) error {
	token.mu.Lock()
	l := token.life
	token.mu.Unlock()
	for _, s := range l.seal.all {
		s.turn <- struct{}{}
		defer func() { <-s.turn }()
	}
	return token.lib.CloseAllSessions(l.slot)
}

// A generation that holds a key when the library loses its sessions gives it
// up at once: what the loss ended waits for it, and everybody for that.
func TestALossDuringAGenerationHoldsUpNobody(t *testing.T) {
	for name, exported := range map[string]bool{"exported": true, "not exported yet": false} {
		t.Run(name, func(t *testing.T) {
			token := open(t, freshToken(t))
			key, err := token.Create(t.Context(), uuid.NewString())
			if err != nil {
				t.Fatal(err)
			}
			if exported {
				der, err := key.Export(t.Context())
				if err != nil {
					t.Fatal(err)
				}
				clear(der)
			}
			if err := closeBetweenCalls(token); err != nil {
				t.Fatal(err)
			}
			started := time.Now()
			other := make(chan error, 1)
			go func() {
				_, err := token.Seal(t.Context(), orgkey.Binding{Org: "acme", ID: "other"}, []byte("value"))
				other <- err
			}()
			rest := func() error { return key.Destroy(t.Context()) }
			if !exported {
				rest = func() error {
					if err := take(t.Context(), key); err == nil {
						return errors.New("a key was given out whose session had been lost")
					}
					return nil
				}
			}
			done, sealed := besideSealing(t.Context(), token, rest)
			if err := errors.Join(done, sealed, <-other); err != nil {
				t.Errorf("who was under way: %v", err)
			}
			if err := generateOne(t.Context(), token); err != nil {
				t.Errorf("the next generation: %v", err)
			}
			if took := time.Since(started); took > 4*time.Second {
				t.Errorf("it took %s", took)
			}
		})
	}
}

// One renewal serves all who notice, and nobody's request fails.
func TestRecoversUnderLoad(t *testing.T) {
	token := open(t, freshToken(t))
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	item := orgkey.Sealed{Binding: orgkey.Binding{Org: "acme", ID: "one"}}
	var err error
	if item.Ciphertext, err = token.Seal(ctx, item.Binding, []byte("value")); err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	var served [8]atomic.Int64
	for i := range served {
		wg.Go(func() {
			for ctx.Err() == nil {
				opened, err := token.Open(t.Context(), []orgkey.Sealed{item})
				if err != nil || string(opened[0]) != "value" {
					t.Errorf("opening under load: %v", err)
					return
				}
				served[i].Add(1)
			}
		})
	}
	deadline := time.Now().Add(time.Minute)
	waitForAll := func() { // each has begun and finished a request
		for i := range served {
			for since := served[i].Load(); served[i].Load() < since+2 && !t.Failed(); {
				if time.Now().After(deadline) {
					t.Fatal("a caller waits for ever")
				}
				time.Sleep(time.Millisecond)
			}
		}
	}
	for range 5 {
		if err := closeBetweenCalls(token); err != nil {
			t.Fatalf("losing: %v", err)
		}
		waitForAll()
	}
	stop()
	wg.Wait()
	if got := renewals(token); got != 5 {
		t.Errorf("%d renewals for 5 losses", got)
	}
}

// A key whose session is lost is gone with it: it is not exported, and Destroy
// confirms that nothing is left.
func TestKeyThatIsLost(t *testing.T) {
	cfg := freshToken(t)
	for loss, lose := range losses() {
		if loss == "anchor closed" {
			continue // the key's own session goes on
		}
		if loss == "logged out" && strings.HasPrefix(os.Getenv(kind), "NSS") {
			continue // NSS's session keys outlast the login
		}
		t.Run(loss, func(t *testing.T) {
			cfg.Generations = 1
			token := open(t, cfg)
			name := uuid.NewString()
			key, err := token.Create(bounded(t), name)
			if err != nil {
				t.Fatal(err)
			}
			if err := lose(token); err != nil {
				t.Fatalf("losing: %v", err)
			}
			if der, err := key.Export(bounded(t)); !errors.Is(err, orgkey.ErrUnavailable) || der != nil {
				t.Errorf("Export: %v, want ErrUnavailable", err)
			}
			if err := key.Destroy(bounded(t)); err != nil {
				t.Errorf("Destroy: %v", err)
			}
			if n := objects(t, token, pkcs11.NewAttribute(pkcs11.CKA_ID, name)); n != 0 {
				t.Errorf("%d objects have the key's name", n)
			}
			if err := generateOne(bounded(t), token); err != nil {
				t.Errorf("the next key: %v", err)
			}
		})
	}
}

// The token's directory goes away and comes back: prompt errors meanwhile, and
// service again without a restart.
func TestTokenRemovedAndPutBack(t *testing.T) {
	cfg := softHSM(t)
	token := open(t, cfg)
	item := orgkey.Sealed{Binding: orgkey.Binding{Org: "acme", ID: "one"}}
	var err error
	if item.Ciphertext, err = token.Seal(bounded(t), item.Binding, []byte("value")); err != nil {
		t.Fatal(err)
	}
	tokens := filepath.Join(filepath.Dir(cfg.PINFile), softHSMTokens)
	if err := os.Rename(tokens, tokens+".away"); err != nil {
		t.Fatal(err)
	}
	if err := token.lib.CloseAllSessions(slotOf(token)); err != nil {
		t.Fatal(err)
	}
	for what, err := range map[string]error{
		"sealing":    func() error { _, err := token.Seal(bounded(t), item.Binding, nil); return err }(),
		"opening":    func() error { _, err := token.Open(bounded(t), []orgkey.Sealed{item}); return err }(),
		"generating": generateOne(bounded(t), token),
		"health":     token.Healthy(bounded(t)),
	} {
		if !errors.Is(err, orgkey.ErrUnavailable) || errors.Is(err, orgkey.ErrSealBroken) {
			t.Errorf("%s without the token: %v, want ErrUnavailable", what, err)
		}
	}
	if err := os.Rename(tokens+".away", tokens); err != nil {
		t.Fatal(err)
	}
	for deadline := time.Now().Add(time.Minute); token.Healthy(bounded(t)) != nil; {
		if time.Now().After(deadline) {
			t.Fatal("does not come back")
		}
		time.Sleep(10 * time.Millisecond)
	}
	if _, err := token.Open(bounded(t), []orgkey.Sealed{item}); err != nil {
		t.Errorf("afterwards: %v", err)
	}
}

// Another token under the same label would seal what the first cannot open.
func TestTokenExchanged(t *testing.T) {
	cfg := freshToken(t)
	token := open(t, cfg)
	if err := token.life.anchor.do(func(h pkcs11.SessionHandle) error {
		removeSealingKey(t, token.lib, h)
		_, err := generateSealingKey(token.lib, h, token.format, sealKeyLabel, token.sealID, true)
		return err
	}); err != nil {
		t.Fatal(err)
	}
	if err := token.lib.CloseAllSessions(slotOf(token)); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if _, err := token.Seal(bounded(t), orgkey.Binding{Org: "acme"}, []byte("value")); !errors.Is(err, errSealingKey) || !errors.Is(err, orgkey.ErrUnavailable) {
			t.Errorf("Seal: %v, want errSealingKey", err)
		}
	}
}

func TestWaitingForASessionEndsWithTheRequest(t *testing.T) {
	cfg := freshToken(t)
	cfg.Generations = 2
	token := open(t, cfg)
	if token.Capacity() != 2 {
		t.Errorf("Capacity is %d", token.Capacity())
	}
	var held []orgkey.BackendKey
	for range 2 {
		key, err := token.Create(bounded(t), uuid.NewString())
		if err != nil {
			t.Fatal(err)
		}
		held = append(held, key)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if _, err := token.Create(ctx, uuid.NewString()); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("Create with every session taken: %v, want context.DeadlineExceeded", err)
	}
	if _, err := token.Seal(bounded(t), orgkey.Binding{Org: "acme"}, []byte("value")); err != nil {
		t.Errorf("sealing waits for generations: %v", err)
	}
	for _, key := range held {
		if err := key.Destroy(bounded(t)); err != nil {
			t.Error(err)
		}
	}
	if err := generateOne(bounded(t), token); err != nil {
		t.Errorf("with sessions free again: %v", err)
	}
}

// Requests that end at every stage of a generation, and afterwards each session
// is back and no object is left.
func TestAbandonedGenerationsLeaveNothing(t *testing.T) {
	cfg := freshToken(t)
	cfg.Generations = 2
	token := open(t, cfg)
	for i := range 20 {
		ctx, cancel := context.WithTimeout(t.Context(), time.Duration(i)*10*time.Millisecond)
		key, err := token.Create(ctx, uuid.NewString())
		if err == nil {
			_, _ = key.Export(ctx)
			err = key.Destroy(ctx)
		} else if errors.Is(err, context.DeadlineExceeded) {
			err = nil
		}
		cancel()
		if err != nil {
			t.Errorf("deadline %d: %v", i, err)
		}
	}
	ctx := bounded(t)
	for range 2 {
		s, err := token.life.generate.take(ctx)
		if err != nil {
			t.Fatalf("a session is missing: %v", err)
		}
		defer token.life.generate.put(s)
	}
	if n := privateKeys(t, token); n != 0 {
		t.Errorf("%d private keys are left", n)
	}
	if n := renewals(token); n != 0 {
		t.Errorf("%d renewals", n)
	}
}

// Destroy does not take the library's word for it: as long as anything has the
// key's name, it is not destroyed.
func TestDestroyLooksForWhatIsLeft(t *testing.T) {
	token := open(t, freshToken(t))
	name := uuid.NewString()
	key, err := token.Create(bounded(t), name)
	if err != nil {
		t.Fatal(err)
	}
	// A token object, which outlives the life that Destroy ends on the way.
	if err := token.life.anchor.do(func(h pkcs11.SessionHandle) (err error) {
		_, err = token.lib.GenerateKey(h, []*pkcs11.Mechanism{pkcs11.NewMechanism(pkcs11.CKM_AES_KEY_GEN, nil)}, []*pkcs11.Attribute{
			pkcs11.NewAttribute(pkcs11.CKA_ID, name),
			pkcs11.NewAttribute(pkcs11.CKA_TOKEN, true),
			pkcs11.NewAttribute(pkcs11.CKA_VALUE_LEN, 32),
		})
		return err
	}); err != nil {
		t.Fatal(err)
	}
	if err := key.Destroy(bounded(t)); !errors.Is(err, errPresent) {
		t.Errorf("Destroy: %v, want errPresent", err)
	}
}

// A key that is held for too long does not keep a life from ending, and is gone with it.
func TestKeyHeldForTooLong(t *testing.T) {
	cfg := freshToken(t)
	token := open(t, cfg)
	token.limits.held = 50 * time.Millisecond
	key, err := token.Create(bounded(t), uuid.NewString())
	if err != nil {
		t.Fatal(err)
	}
	token.renew(token.life, errors.New("for the test"))
	if err := token.Healthy(bounded(t)); err != nil {
		t.Fatal(err)
	}
	if _, err := key.Export(bounded(t)); !errors.Is(err, orgkey.ErrUnavailable) {
		t.Errorf("Export: %v, want ErrUnavailable", err)
	}
	if err := key.Destroy(bounded(t)); err != nil {
		t.Errorf("Destroy: %v", err)
	}
	if renewals(token) != 1 {
		t.Errorf("%d renewals, want 1", renewals(token))
	}
}

// A library with a call in it is never finalised.
func TestCallThatDoesNotReturn(t *testing.T) {
	token := open(t, softHSM(t))
	token.limits.held = 20 * time.Millisecond
	old := token.life
	s := old.seal.all[0]
	s.turn <- struct{}{} // as a call does that hangs
	token.renew(old, errors.New("for the test"))
	if err := token.Healthy(bounded(t)); !errors.Is(err, orgkey.ErrUnavailable) {
		t.Errorf("Healthy: %v, want ErrUnavailable", err)
	}
	if _, err := token.lib.GetSessionInfo(old.anchor.handle); err != nil {
		t.Errorf("the library was finalised: %v", err)
	}
	<-s.turn // the call returns
	for deadline := time.Now().Add(time.Minute); token.Healthy(bounded(t)) != nil; {
		if time.Now().After(deadline) {
			t.Fatal("does not come back")
		}
		time.Sleep(10 * time.Millisecond)
	}
}

func TestRecycles(t *testing.T) {
	cfg := freshToken(t)
	cfg.RecycleKeys, cfg.Generations = 2, 2
	token := open(t, cfg)
	item := orgkey.Sealed{Binding: orgkey.Binding{Org: "acme", ID: "one"}}
	var err error
	if item.Ciphertext, err = token.Seal(bounded(t), item.Binding, []byte("value")); err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(t.Context())
	var sealers, makers sync.WaitGroup
	for range 4 {
		sealers.Go(func() {
			for ctx.Err() == nil {
				if _, err := token.Open(t.Context(), []orgkey.Sealed{item}); err != nil {
					t.Errorf("opening: %v", err)
					return
				}
			}
		})
	}
	const keys = 12
	for range 3 {
		makers.Go(func() {
			for range keys / 3 {
				if err := generateOne(bounded(t), token); err != nil {
					t.Errorf("generating: %v", err)
				}
			}
		})
	}
	makers.Wait()
	stop()
	sealers.Wait()
	// At most RecycleKeys-1 keys, and what ran beside them, are above the limit.
	if n := renewals(token); n < keys/(cfg.RecycleKeys+cfg.Generations)-1 {
		t.Errorf("%d keys, recycled %d times", keys, n)
	}
}

func TestRecyclesByAge(t *testing.T) {
	cfg := freshToken(t)
	cfg.RecycleAge = time.Nanosecond
	token := open(t, cfg)
	before := bytes.Clone(token.life.wrapping)
	if err := generateOne(bounded(t), token); err != nil {
		t.Fatal(err)
	}
	if renewals(token) != 1 {
		t.Errorf("%d renewals, want 1", renewals(token))
	}
	if bytes.Equal(before, token.life.wrapping) {
		t.Error("the wrapping key is the same")
	}
}

func TestClosedTokenIsUnavailable(t *testing.T) {
	token, err := Open(t.Context(), freshToken(t))
	if err != nil {
		t.Fatal(err)
	}
	key, err := token.Create(bounded(t), uuid.NewString())
	if err != nil {
		t.Fatal(err)
	}
	token.limits.closing = 50 * time.Millisecond
	if err := token.Close(); err != nil {
		t.Fatalf("Close: %v", err)
	}
	for what, err := range map[string]error{
		"Create":  generateOne(bounded(t), token),
		"Healthy": token.Healthy(bounded(t)),
		"Seal":    func() error { _, err := token.Seal(bounded(t), orgkey.Binding{}, nil); return err }(),
		"Export":  func() error { _, err := key.Export(bounded(t)); return err }(),
	} {
		if !errors.Is(err, orgkey.ErrUnavailable) {
			t.Errorf("%s: %v, want ErrUnavailable", what, err)
		}
	}
	if err := token.Close(); err != nil {
		t.Errorf("closing again: %v", err)
	}
}
