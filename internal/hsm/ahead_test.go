//go:build cgo

package hsm

import (
	"context"
	"errors"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"
)

// Keys in the pool hold no session: others are made meanwhile, and a key out of the pool
// is exported although every session that makes keys is busy.
func TestKeysMadeAheadHoldNoSession(t *testing.T) {
	cfg := softHSM(t)
	cfg.Generations = 1
	token := open(t, cfg)
	first, err := token.CreateAhead(bounded(t), uuid.NewString())
	if err != nil {
		t.Fatal(err)
	}
	second, err := token.CreateAhead(bounded(t), uuid.NewString())
	if err != nil {
		t.Fatal(err)
	}
	other, err := token.Create(bounded(t), uuid.NewString()) // keeps the only session
	if err != nil {
		t.Fatal(err)
	}
	for _, k := range []interface {
		Export(context.Context) ([]byte, error)
		Destroy(context.Context) error
	}{first, second, other} {
		der, err := k.Export(bounded(t))
		clear(der)
		if err := errors.Join(err, k.Destroy(bounded(t))); err != nil {
			t.Error(err)
		}
	}
	if n := privateKeys(t, token); n != 0 {
		t.Errorf("%d private keys stayed in the token", n)
	}
}

// A key ends with the life in which it was made, which is how new credentials end it.
func TestKeysMadeAheadEndWithTheirLife(t *testing.T) {
	token := open(t, softHSM(t))
	k, err := token.CreateAhead(bounded(t), uuid.NewString())
	if err != nil {
		t.Fatal(err)
	}
	if !k.Alive() {
		t.Fatal("a fresh key is not alive")
	}
	token.mu.Lock()
	l := token.life
	token.mu.Unlock()
	token.renew(l, errors.New("the test says so"))
	deadline := time.Now().Add(time.Minute)
	for token.Healthy(bounded(t)) != nil && time.Now().Before(deadline) {
		time.Sleep(10 * time.Millisecond)
	}
	if k.Alive() {
		t.Error("it is alive in another life")
	}
	if der, err := k.Export(bounded(t)); err == nil {
		clear(der)
		t.Error("it was exported in another life")
	}
	if err := k.Destroy(bounded(t)); err != nil {
		t.Errorf("destroying what is gone: %v", err)
	}
	if n := privateKeys(t, token); n != 0 {
		t.Errorf("%d private keys stayed in the token", n)
	}
}

// A key that the token does not destroy ends with its life, which ends for that.
func TestAKeyMadeAheadThatStaysEndsTheLife(t *testing.T) {
	token := open(t, softHSM(t))
	name := uuid.NewString()
	first, err := token.CreateAhead(bounded(t), name)
	if err != nil {
		t.Fatal(err)
	}
	second, err := token.CreateAhead(bounded(t), name) // is there when the first is gone
	if err != nil {
		t.Fatal(err)
	}
	if err := first.Destroy(bounded(t)); !errors.Is(err, errPresent) {
		t.Errorf("destroying it: %v", err)
	}
	if second.Alive() {
		t.Error("the life goes on")
	}
	deadline := time.Now().Add(time.Minute)
	for token.Healthy(bounded(t)) != nil && time.Now().Before(deadline) {
		time.Sleep(10 * time.Millisecond)
	}
	if n := privateKeys(t, token); n != 0 {
		t.Errorf("%d private keys stayed in the token", n)
	}
}

// Who waits for a call under way on a key occupies no session.
func TestWaitingForAKeyMadeAheadHoldsNoSession(t *testing.T) {
	token := open(t, softHSM(t))
	made, err := token.CreateAhead(bounded(t), uuid.NewString())
	if err != nil {
		t.Fatal(err)
	}
	k := made.(*key)
	k.turn <- struct{}{} // a call that hangs
	var waiting sync.WaitGroup
	for range k.life.seal.all {
		waiting.Go(func() {
			der, err := k.Export(bounded(t))
			clear(der)
			if err != nil {
				t.Error(err)
			}
		})
	}
	time.Sleep(100 * time.Millisecond)
	if n := len(k.life.seal.idle); n != len(k.life.seal.all) {
		t.Errorf("%d of %d sessions are idle", n, len(k.life.seal.all))
	}
	<-k.turn
	waiting.Wait()
	if err := k.Destroy(bounded(t)); err != nil {
		t.Error(err)
	}
}
