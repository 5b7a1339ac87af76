package vault

import (
	"context"
	"crypto/ed25519"
	"fmt"

	"github.com/orgkeys/orgkeys/internal/audit"
)

var _ audit.Signer = (*Sink)(nil)

// SignCheckpoint implements audit.Signer with the key that signs receipts. What
// it signs cannot be taken for a receipt, nor a receipt for it: a leaf begins
// with "{", a checkpoint with the log's origin. The call puts the checkpoint
// into Vault's audit file in clear, as it does with events.
func (s *Sink) SignCheckpoint(ctx context.Context, text []byte) ([]byte, ed25519.PublicKey, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	signed, err := s.acknowledge(ctx, []audit.Entry{{Index: -1, Leaf: text}})
	if err != nil {
		return nil, nil, fmt.Errorf("having Vault sign a checkpoint: %w", err)
	}
	version, signature, err := audit.ParseReceipt(signed[0])
	if err != nil {
		return nil, nil, err
	}
	return signature, s.keys[version], nil
}

// KeepSigned implements audit.Sink: Vault's audit file gets the signed note, in
// clear, by one more call to sign; that signature is of no use.
func (s *Sink) KeepSigned(ctx context.Context, note string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, err := s.acknowledge(ctx, []audit.Entry{{Index: -1, Leaf: []byte(note)}}); err != nil {
		return fmt.Errorf("having Vault record a signed checkpoint: %w", err)
	}
	return nil
}
