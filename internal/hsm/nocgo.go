//go:build !cgo

package hsm

import (
	"context"
	"crypto/ed25519"

	"github.com/orgkeys/orgkeys/internal/orgkey"
)

// Token cannot be had in a binary without cgo.
type Token struct{}

// Open reports ErrNoCgo.
func Open(context.Context, Config) (*Token, error) { return nil, ErrNoCgo }

// FindSoftHSM reports ErrNoCgo.
func FindSoftHSM() (string, error) { return "", ErrNoCgo }

// InitSoftHSM reports ErrNoCgo.
func InitSoftHSM(string) (cfg Config, created bool, err error) { return Config{}, false, ErrNoCgo }

// Create reports ErrNoCgo.
func (*Token) Create(context.Context, string) (orgkey.BackendKey, error) { return nil, ErrNoCgo }

// Seal reports ErrNoCgo.
func (*Token) Seal(context.Context, orgkey.Binding, []byte) ([]byte, error) { return nil, ErrNoCgo }

// SealAll reports ErrNoCgo.
func (*Token) SealAll(context.Context, []orgkey.Unsealed) ([][]byte, error) { return nil, ErrNoCgo }

// Open reports ErrNoCgo.
func (*Token) Open(context.Context, []orgkey.Sealed) ([][]byte, error) { return nil, ErrNoCgo }

// SignCheckpoint reports ErrNoCgo.
func (*Token) SignCheckpoint(context.Context, []byte) ([]byte, ed25519.PublicKey, error) {
	return nil, nil, ErrNoCgo
}

// Healthy reports ErrNoCgo.
func (*Token) Healthy(context.Context) error { return ErrNoCgo }

// Capacity is 0.
func (*Token) Capacity() int { return 0 }

// Close does nothing.
func (*Token) Close() error { return nil }

// LocateSoftHSM reports ErrNoCgo.
func LocateSoftHSM(string) (Config, error) { return Config{}, ErrNoCgo }

// KeepSoftHSM reports ErrNoCgo.
func KeepSoftHSM(string) error { return ErrNoCgo }

// CreateSealed reports ErrNoCgo.
func (*Token) CreateSealed(context.Context, string) (orgkey.SealableKey, error) {
	return nil, ErrNoCgo
}

// DestroySealed reports ErrNoCgo.
func (*Token) DestroySealed(context.Context, string) error { return ErrNoCgo }

// CreateAhead reports ErrNoCgo.
func (*Token) CreateAhead(context.Context, string) (orgkey.HeldKey, error) { return nil, ErrNoCgo }

// Examine reports ErrNoCgo.
func Examine(context.Context, Config) ([]Requirement, error) { return nil, ErrNoCgo }

// SealingKeyID is nil.
func (*Token) SealingKeyID() []byte { return nil }
