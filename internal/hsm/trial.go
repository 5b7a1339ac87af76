//go:build cgo

package hsm

import (
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"errors"
	"fmt"
	"strings"

	"github.com/google/uuid"
	"github.com/miekg/pkcs11"
)

// trial finds out what a token can by having it done with session objects,
// before anything is made that lasts. What a mechanism list says is not enough:
// modules list what they refuse, and give one number two meanings.
type trial struct {
	token *Token
	life  *life
	h     pkcs11.SessionHandle
	found []Requirement
	lacks []error
}

func (r *trial) note(name string, optional bool, detail string, err error) bool {
	q := Requirement{Name: name, Optional: optional, Met: err == nil, Detail: detail}
	if err != nil {
		q.Detail = strings.ReplaceAll(err.Error(), "\n", "; ")
		if !optional {
			r.lacks = append(r.lacks, err)
		}
	}
	r.found = append(r.found, q)
	return err == nil
}

// err is a *LacksError if anything that is required is missing. The module's
// own errors stay in its chain: a token that is gone lacks nothing.
func (r *trial) err() error {
	if len(r.lacks) == 0 {
		return nil
	}
	return &lacks{LacksError{r.found}, r.lacks}
}

type lacks struct {
	LacksError
	causes []error
}

func (l *lacks) Unwrap() []error { return append([]error{&l.LacksError}, l.causes...) }

// errNotTried: what has to come first is missing.
var errNotTried = errors.New("not tried: it needs what is missing above")

// run tries what Open needs, and leaves l's wrapping key, the courier and the
// format of a new sealing key with the token.
func (r *trial) run() {
	t, lib, h := r.token, r.token.lib, r.h
	var err error
	r.life.wrappingAs, err = generateWrappingKey(lib, h)
	makes := r.note("AES-256 keys made in the token (CKM_AES_KEY_GEN)", false, "made as a session object", err)
	t.format, err = r.sealing()
	r.note("sealing (CKM_AES_GCM, or CKM_AES_CBC_PAD with CKM_SHA256_HMAC)", false, formatName(t.format), err)

	c := &courier{}
	c.key, err = t.recipient()
	if err == nil && !makes {
		err = errNotTried
	}
	if err == nil {
		r.life.wrapping, err = c.chooseTransport(lib, h, r.life.wrappingAs, oaeps())
	}
	carried := r.note("its wrapping key handed over encrypted (C_WrapKey by CKM_RSA_PKCS_OAEP)", false, c.oaep.name, err)
	if err = errNotTried; carried {
		candidates := wrappings()
		if t.cfg.noWrap {
			candidates = nil
		}
		err = c.chooseWrapping(lib, h, r.life.wrappingAs, r.life.wrapping, candidates)
	}
	r.note("private keys wrapped (C_WrapKey by CKM_AES_KEY_WRAP_KWP, CKM_AES_KEY_WRAP_PAD or CKM_AES_CBC_PAD)", false, c.wrap.name, err)
	if len(r.lacks) > 0 {
		return
	}
	t.courier = c
	t.cfg.Log.Info("chose the mechanisms of the token", "transport", c.oaep.name, "wrap", c.wrap.name, "seal", formatName(t.format))
}

func formatName(format byte) string {
	return map[byte]string{formatGCM: "CKM_AES_GCM", formatCBCHMAC: "CKM_AES_CBC_PAD with CKM_SHA256_HMAC"}[format]
}

// sealing returns the first format that works.
func (r *trial) sealing() (byte, error) {
	formats := []byte{formatGCM, formatCBCHMAC}
	if r.token.cfg.noGCM {
		formats = formats[1:]
	}
	var failures []error
	for _, format := range formats {
		key, err := generateSealingKey(r.token.lib, r.h, format, sealKeyLabel, newKeyID(), false)
		if err == nil {
			err = errors.Join(key.checkWorks(r.token.lib, r.h), key.destroy(r.token.lib, r.h))
		}
		if err == nil {
			return format, nil
		}
		failures = append(failures, err)
	}
	return 0, errors.Join(failures...)
}

// runAll also tries what Open does not: making a key pair takes time, and some
// things a token may lack.
func (r *trial) runAll() {
	r.run()
	t, lib, h := r.token, r.token.lib, r.h
	p, err := generatePair(lib, h, uuid.NewString())
	if err == nil {
		err = p.destroy(lib, h)
	}
	r.note("RSA-2048 key pairs as session objects, sensitive and extractable (CKM_RSA_PKCS_KEY_PAIR_GEN)", false, "made and destroyed", err)
	err = errNotTried
	as := ""
	if t.courier != nil {
		err, as = t.checkSealed(), t.courier.oaep.sealed
	}
	r.note("keys sealed to a recipient (AES key wrap with padding, RFC 5649)", true, "as "+as, err)
	r.note("checkpoints signed in the token (CKM_EDDSA)", true, "works", r.signing())
}

// signing reports an error unless the token signs with Ed25519. Without it
// checkpoints are signed by a key that the token keeps sealed.
func (r *trial) signing() error {
	lib := r.token.lib
	public, private, err := generateEd25519(lib, r.h, newKeyID(), false)
	if err != nil {
		return err
	}
	defer func() { _, _ = lib.DestroyObject(r.h, private), lib.DestroyObject(r.h, public) }()
	key, err := readEd25519(lib, r.h, public)
	if err != nil {
		return err
	}
	text := make([]byte, 100)
	rand.Read(text)
	signature, err := signEd25519(lib, r.h, private, text)
	if err == nil && !ed25519.Verify(key, text, signature) {
		err = errors.New("the signature does not verify")
	}
	return err
}

// Examine logs in to the token and tries everything that orgkeys wants of it on
// session objects. It makes nothing that lasts.
func Examine(ctx context.Context, cfg Config) ([]Requirement, error) {
	t, err := newToken(cfg)
	if err != nil {
		return nil, err
	}
	type result struct {
		found []Requirement
		err   error
	}
	done := make(chan result, 1)
	go func() {
		found, err := t.examine(ctx)
		done <- result{found, err}
	}()
	select {
	case r := <-done:
		return r.found, r.err
	case <-ctx.Done():
		return nil, fmt.Errorf("examining the token: %w", ctx.Err())
	}
}

func (t *Token) examine(ctx context.Context) (found []Requirement, err error) {
	end, err := t.lib.takeTurn(ctx)
	if err != nil {
		return nil, fault("examining the token", err)
	}
	defer end()
	l, h, err := t.enter()
	if err != nil {
		return nil, fault("examining the token", err)
	}
	r := &trial{token: t, life: l, h: h}
	r.runAll()
	clear(l.wrapping)
	clear(t.pin)
	return r.found, t.lib.Finalize()
}
