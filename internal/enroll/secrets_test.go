package enroll

import (
	"bytes"
	"slices"
	"strconv"
	"testing"
	"time"

	"github.com/orgkeys/orgkeys/internal/orgkey"
)

// What is remembered belongs to one enrollment and one ciphertext, for a time, and its holders
// have copies.
func TestSecretsAreRememberedForATime(t *testing.T) {
	var r secrets
	sealed := orgkey.Sealed{Binding: tokenBinding("acme", "e-1"), Ciphertext: []byte("sealed")}
	k := bytes.Repeat([]byte{7}, 32)
	want := slices.Clone(k)
	if got := r.find(sealed); got != nil {
		t.Errorf("before: %x", got)
	}
	r.remember(sealed, k)
	clear(k)
	first := r.find(sealed)
	if !bytes.Equal(first, want) {
		t.Errorf("%x, want %x", first, want)
	}
	clear(first)
	if got := r.find(sealed); !bytes.Equal(got, want) {
		t.Errorf("after its holder cleared it: %x, want %x", got, want)
	}
	for name, other := range map[string]orgkey.Sealed{
		"another organization": {Binding: tokenBinding("other", "e-1"), Ciphertext: sealed.Ciphertext},
		"another enrollment":   {Binding: tokenBinding("acme", "e-2"), Ciphertext: sealed.Ciphertext},
		"another purpose":      {Binding: challengeBinding("acme", "e-1"), Ciphertext: sealed.Ciphertext},
		"another ciphertext":   {Binding: sealed.Binding, Ciphertext: []byte("sealed anew")},
	} {
		if got := r.find(other); got != nil {
			t.Errorf("%s: %x", name, got)
		}
	}

	at := secretOf(sealed)
	kept := r.known[at]
	kept.since = kept.since.Add(-secretLife - time.Second)
	r.known[at] = kept
	if got := r.find(sealed); got != nil {
		t.Errorf("after its time: %x", got)
	}
	r.forget()
	if len(r.known) != 0 || !bytes.Equal(kept.k, make([]byte, 32)) {
		t.Errorf("after its time there are %d, and it is %x", len(r.known), kept.k)
	}
	for i := range secretsKept + 10 {
		r.remember(orgkey.Sealed{Binding: tokenBinding("acme", strconv.Itoa(i)), Ciphertext: sealed.Ciphertext}, want)
	}
	if len(r.known) != secretsKept {
		t.Errorf("%d are kept, want %d", len(r.known), secretsKept)
	}
}
