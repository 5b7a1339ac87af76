package keypem_test

import (
	"bytes"
	"crypto/rand"
	"encoding/pem"
	"testing"

	"github.com/orgkeys/orgkeys/internal/keypem"
)

// The text is that of package pem, and its buffer never grew: what it left would not be cleared.
func TestThePEMOfAKey(t *testing.T) {
	t.Parallel()
	der := make([]byte, 2400)
	_, _ = rand.Read(der) // never fails
	for _, blockType := range []string{"RSA PRIVATE KEY", "PRIVATE KEY"} {
		for n := range der {
			got, want := keypem.Encode(blockType, der[:n]), pem.EncodeToMemory(&pem.Block{Type: blockType, Bytes: der[:n]})
			if !bytes.Equal(got, want) || cap(got) != len(got) {
				t.Fatalf("%d bytes: %d characters of %d, want %d\n%s", n, len(got), cap(got), len(want), got)
			}
		}
	}
}
