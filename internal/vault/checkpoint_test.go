package vault_test

import (
	"bytes"
	"crypto/ed25519"
	"testing"
)

// The newest key signs, and Vault's audit file has what was signed in clear.
func TestVaultSignsCheckpoints(t *testing.T) {
	c := open(t)
	sink, point := c.Sink(), checkpointAt(freshLog(t), 7)
	signature, public, err := sink.SignCheckpoint(t.Context(), []byte(point.Text()))
	if err != nil {
		t.Fatal(err)
	}
	if !ed25519.Verify(public, []byte(point.Text()), signature) {
		t.Error("the signature does not verify")
	}
	keys, err := c.ReceiptKeys(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(keys[len(keys)], public) {
		t.Error("it is not the newest receipt key that signed")
	}
	if inClear(t, auditFile(t), "response", []byte(point.Text())) != 1 {
		t.Error("the checkpoint is not in clear in Vault's audit file")
	}
}

// A signed checkpoint does not move the one that the sink goes on from.
func TestVaultRecordsSignedCheckpoints(t *testing.T) {
	origin := freshLog(t)
	sink := open(t).Sink()
	if err := appendAll(t, sink, entries(t, 0, 3), checkpointAt(origin, 3)); err != nil {
		t.Fatal(err)
	}
	note := checkpointAt(origin, 2).Text() + "\n— " + origin + " AAAA\n"
	if err := sink.KeepSigned(t.Context(), note); err != nil {
		t.Fatal(err)
	}
	if inClear(t, auditFile(t), "response", []byte(note)) != 1 {
		t.Error("the signed checkpoint is not in clear in Vault's audit file")
	}
	last, err := sink.Last(t.Context())
	if err != nil || last.Size != 3 {
		t.Errorf("the sink goes on from %d, %v", last.Size, err)
	}
}
