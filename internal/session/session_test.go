package session

import (
	"bytes"
	"testing"
	"time"
)

func TestASessionOpensUnderItsOwnSecretOnly(t *testing.T) {
	t.Parallel()
	a, b := NewSecret(), NewSecret()
	stored, err := a.Seal("the token", Holder("acme", "ada"), time.Now())
	if err != nil {
		t.Fatal(err)
	}
	if token, err := a.Open(stored); err != nil || token != "the token" {
		t.Errorf("it opens to %q, %v", token, err)
	}
	if bytes.Contains(stored.Sealed, []byte("token")) || stored.ID == a.Text() {
		t.Error("the row holds what it must not")
	}
	if _, err := b.Open(stored); err == nil {
		t.Error("it opens under another secret")
	}
	for i := range stored.Sealed {
		changed := stored
		changed.Sealed = bytes.Clone(stored.Sealed)
		changed.Sealed[i] ^= 1
		if _, err := a.Open(changed); err == nil {
			t.Fatalf("it opens with byte %d changed", i)
		}
	}
}

func TestSecretsHaveOneSpelling(t *testing.T) {
	t.Parallel()
	s := NewSecret()
	if back, err := ParseSecret(s.Text()); err != nil || back != s {
		t.Errorf("it reads back as %v, %v", back, err)
	}
	text := s.Text()
	for _, other := range []string{"", text[:42], text + "A", text + "=", text[:42] + "\n" + text[42:], text[:42] + "+"} {
		if _, err := ParseSecret(other); err == nil {
			t.Errorf("%q is read", other)
		}
	}
	if bytes.Equal(s.Derive("state"), s.Derive("nonce")) || s.ID() == NewSecret().ID() {
		t.Error("what is derived is not apart")
	}
}

func TestHoldersAreApart(t *testing.T) {
	t.Parallel()
	if Holder("a", "b") == Holder("ab", "") || Holder("acme", "ada") == Holder("acme", "bob") {
		t.Error("two persons are one")
	}
}
