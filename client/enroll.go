package client

import (
	"context"
	"crypto"
	"crypto/hmac"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"net/http"
	"net/url"

	"github.com/go-json-experiment/json"

	"github.com/orgkeys/orgkeys/internal/envelope"
	"github.com/orgkeys/orgkeys/internal/keypem"
)

// ErrToken means that a text is not an enrollment token.
var ErrToken = envelope.ErrToken

// ErrForged means that an answer to an enrollment was not made with its token:
// it comes from something between client and server, and nothing of it may be used.
var ErrForged = errors.New("the answer was not made by the server that issued the enrollment token")

// ErrSealedDamaged means that a sealed key is not the one that its answer
// announces: something between client and server changed it. Asking again may
// get the right one.
var ErrSealedDamaged = errors.New("the sealed key was changed in transit")

// ErrSealedUseless means that a sealed key arrived unchanged, but is not the key
// that its answer announces. Asking again gets the same bytes.
var ErrSealedUseless = errors.New("the sealed key is not the key that the server announced")

// recipientBits is the size of recipients that NewRecipient makes.
const recipientBits = 3072

// NewRecipient makes a recipient: the private key that opens what is sealed to
// its public half. It is for one delivery, and is stored durably before the
// first request that names it.
func NewRecipient() (*rsa.PrivateKey, error) {
	key, err := rsa.GenerateKey(rand.Reader, recipientBits)
	if err != nil {
		return nil, fmt.Errorf("making a recipient: %w", err)
	}
	return key, nil
}

// RecipientID is how the API names a recipient, in bind and approve: lower-case
// hex of SHA-256 over its SubjectPublicKeyInfo.
func RecipientID(recipient *rsa.PublicKey) (string, error) { return envelope.Recipient(recipient) }

// Enrollment fetches one node's own key with a one-time token, or has the key that
// the node made accepted. docs/enrollment.md describes the protocol.
type Enrollment struct {
	Client *Client
	token  envelope.Token
	// TPM has the private half of what the enrollment is about; nil if it is in no TPM.
	TPM TPM
	// Recipient opens what the server sends, and must be stored durably before
	// Fetch: the key is sealed to it once and for all. RSA of 3072 or 4096 bits.
	Recipient crypto.Decrypter
}

// NewEnrollment reads a token's text, oke1.ID.SECRET, or reports ErrToken. The
// caller clears text, and Close the enrollment after use.
func NewEnrollment(c *Client, text []byte, recipient crypto.Decrypter) (*Enrollment, error) {
	token, err := envelope.ParseToken(text)
	if err != nil {
		return nil, err
	}
	return &Enrollment{Client: c, token: token, Recipient: recipient}, nil
}

// TPM tells about a key in a TPM 2.0, and answers challenges with it.
type TPM interface {
	// EK is the certificate of the TPM's endorsement key with its intermediates, or
	// the endorsement key's public half, PEM.
	EK(context.Context) (string, error)
	// PublicArea is the key's TPMT_PUBLIC.
	PublicArea() []byte
	// Activate is TPM2_ActivateCredential with key and endorsement key. The caller
	// clears what it returns.
	Activate(ctx context.Context, idObject, encSecret []byte) ([]byte, error)
}

// OwnKeyBits is the size of keys that nodes and administrators make themselves.
const OwnKeyBits = 2048

// NewOwnKey makes a key for Announce or AddKey.
func NewOwnKey() (*rsa.PrivateKey, error) {
	key, err := rsa.GenerateKey(rand.Reader, OwnKeyBits)
	if err != nil {
		return nil, fmt.Errorf("making a key: %w", err)
	}
	return key, nil
}

// TokenID is the ID of the enrollment that a token's text is for, or ErrToken.
func TokenID(text []byte) (string, error) {
	token, err := envelope.ParseToken(text)
	clear(token.K)
	return token.ID, err
}

// Close clears the token's secret.
func (e *Enrollment) Close() { clear(e.token.K) }

// ID is the enrollment's.
func (e *Enrollment) ID() string { return e.token.ID }

// Delivered is a key that was sealed to a recipient, opened. The holder stores
// PEM durably, sends the receipt, and clears PEM.
type Delivered struct {
	Delivery
	PEM []byte // PKCS#1
}

// Delivery is what a receipt says of a sealed key. It is no secret. The MAC of
// an enrollment's answer covers all of it but Scope.
type Delivery struct {
	Enrollment  string `json:"id,omitempty"` // empty for an administrator's own
	Org         string `json:"org"`
	Origin      string `json:"origin"` // the audit log's
	KeyID       string `json:"keyId"`
	Scope       string `json:"scope"` // "node" or "organization"
	Recipient   string `json:"recipient"`
	Fingerprint string `json:"fingerprint"` // RFC 7638
	SHA256      string `json:"sha256"`      // hex, of the sealed bytes
}

func (d Delivery) wire() envelope.Delivery {
	return envelope.Delivery{Enrollment: d.Enrollment, Org: d.Org, Origin: d.Origin, KeyID: d.KeyID, Recipient: d.Recipient, Fingerprint: d.Fingerprint, SHA256: d.SHA256}
}

// sealedAnswer is the API's answer with a sealed key.
type sealedAnswer struct {
	Delivery
	Sealed envelope.SealedKey `json:"sealed"`
	MAC    []byte             `json:"mac"`
}

// Fetch returns the key. It may be repeated until the receipt is taken, and
// gets the same key each time. While the key is being made or awaits approval,
// the error is Pending, which passes.
func (e *Enrollment) Fetch(ctx context.Context) (*Delivered, error) {
	public, text, err := publicPEM(e.Recipient.Public())
	if err != nil {
		return nil, err
	}
	recipient, err := envelope.Recipient(public)
	if err != nil {
		return nil, err
	}
	var key *Delivered
	err = e.claim(ctx, claim{Recipient: string(text)}, recipient, func(a *answer) (err error) {
		key, err = e.read(a, recipient)
		return err
	})
	return key, err
}

// Announce has own, a key of OwnKeyBits that the node made, accepted: only its
// public half is sent. It is for an enrollment of origin node, and may be
// repeated. own must be stored durably before.
func (e *Enrollment) Announce(ctx context.Context, own crypto.Signer) (*Delivery, error) {
	public, text, err := publicPEM(own.Public())
	if err != nil {
		return nil, err
	}
	recipient, err := envelope.Recipient(public)
	if err != nil {
		return nil, err
	}
	signature, err := sign(own, string(envelope.ClaimText(e.token.ID, recipient)))
	if err != nil {
		return nil, err
	}
	var accepted *Delivery
	err = e.claim(ctx, claim{PublicKey: string(text), Signature: signature}, recipient, func(a *answer) error {
		s, err := e.vouched(a, recipient)
		if err != nil {
			return err
		}
		if s.SHA256 != "" || s.Fingerprint != Fingerprint(public) {
			return fmt.Errorf("%w: %w", a.foreign("JSON about another key"), ErrForged)
		}
		accepted = &s.Delivery
		return nil
	})
	return accepted, err
}

// claim is what a node asks with.
type claim struct {
	Recipient string    `json:"recipient,omitempty"`
	PublicKey string    `json:"publicKey,omitempty"`
	Signature string    `json:"signature,omitempty"`
	MAC       []byte    `json:"mac"`
	TPM       *tpmClaim `json:"tpm,omitempty"`
	Proof     []byte    `json:"proof,omitempty"`
}

type tpmClaim struct {
	EK     string `json:"ek"`
	Public []byte `json:"public"`
}

// claim asks, after the TPM has answered the challenge if the key is in one.
func (e *Enrollment) claim(ctx context.Context, c claim, recipient string, read func(*answer) error) error {
	c.MAC = envelope.ClaimMAC(e.token.K, e.token.ID, recipient)
	if e.TPM != nil {
		ek, err := e.TPM.EK(ctx)
		if err != nil {
			return err
		}
		c.TPM = &tpmClaim{ek, e.TPM.PublicArea()}
		if c.Proof, err = e.prove(ctx, c, recipient); err != nil {
			return err
		}
	}
	return e.post(ctx, c, read)
}

// prove gets a challenge and returns the proof that the TPM has the key.
func (e *Enrollment) prove(ctx context.Context, c claim, recipient string) ([]byte, error) {
	var s struct {
		Challenge struct {
			IDObject  []byte `json:"idObject"`
			EncSecret []byte `json:"encSecret"`
			MAC       []byte `json:"mac"`
		} `json:"challenge"`
	}
	err := e.post(ctx, c, func(a *answer) error {
		if err := a.decode(&s); err != nil {
			return err
		}
		// Before the TPM sees anything of it.
		if !hmac.Equal(s.Challenge.MAC, envelope.ChallengeMAC(e.token.K, e.token.ID, recipient, s.Challenge.IDObject, s.Challenge.EncSecret)) {
			return fmt.Errorf("%w: %w", a.foreign("a challenge with a MAC that the token did not make"), ErrForged)
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	secret, err := e.TPM.Activate(ctx, s.Challenge.IDObject, s.Challenge.EncSecret)
	if err != nil {
		return nil, err
	}
	defer clear(secret)
	return envelope.ClaimMAC(secret, e.token.ID, recipient), nil
}

func (e *Enrollment) post(ctx context.Context, c claim, read func(*answer) error) error {
	return e.Client.do(ctx, request{
		method: http.MethodPost, path: "/enroll/" + url.PathEscape(e.token.ID), typ: "application/json", read: read,
		body: func() ([]byte, error) { return json.Marshal(c) },
	})
}

func (e *Enrollment) read(a *answer, recipient string) (*Delivered, error) {
	s, err := e.vouched(a, recipient)
	if err != nil {
		return nil, err
	}
	return open(a, s, e.Recipient)
}

// vouched reads an answer that was made with the token.
func (e *Enrollment) vouched(a *answer, recipient string) (sealedAnswer, error) {
	var s sealedAnswer
	if err := a.decode(&s); err != nil {
		return s, err
	}
	// Before anything of it is believed.
	s.Enrollment, s.Recipient = e.token.ID, recipient
	if !hmac.Equal(s.MAC, s.wire().MAC(e.token.K)) {
		return s, fmt.Errorf("%w: %w", a.foreign("JSON with a MAC that the token did not make"), ErrForged)
	}
	return s, nil
}

// publicPEM returns a public key, and its PEM.
func publicPEM(key crypto.PublicKey) (*rsa.PublicKey, []byte, error) {
	public, ok := key.(*rsa.PublicKey)
	if !ok {
		return nil, nil, fmt.Errorf("%w: it is not an RSA key", ErrRequest)
	}
	der, err := x509.MarshalPKIXPublicKey(public)
	if err != nil {
		return nil, nil, fmt.Errorf("%w: %w", ErrRequest, err)
	}
	return public, pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der}), nil
}

// open unwraps a sealed key that an answer brought, and checks that it is the
// one vouched for.
func open(a *answer, s sealedAnswer, recipient crypto.Decrypter) (*Delivered, error) {
	// The algorithm is not among what a MAC covers.
	if _, err := s.Sealed.Hash(); err != nil || envelope.Digest(s.Sealed.Value) != s.SHA256 {
		return nil, fmt.Errorf("%w: %w", a.foreign("a sealed key other than the one announced"), ErrSealedDamaged)
	}
	return unwrap(s, recipient)
}

func unwrap(s sealedAnswer, recipient crypto.Decrypter) (*Delivered, error) {
	der, err := s.Sealed.Open(recipient)
	if errors.Is(err, ErrKeyFailed) {
		return nil, err
	}
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrSealedUseless, err)
	}
	defer clear(der)
	parsed, err := x509.ParsePKCS8PrivateKey(der)
	if err != nil {
		return nil, fmt.Errorf("%w: it is not a PKCS#8 private key", ErrSealedUseless)
	}
	key, ok := parsed.(*rsa.PrivateKey)
	if !ok || Fingerprint(&key.PublicKey) != s.Fingerprint {
		return nil, fmt.Errorf("%w: it is another key", ErrSealedUseless)
	}
	private := x509.MarshalPKCS1PrivateKey(key)
	defer clear(private)
	return &Delivered{s.Delivery, keypem.Encode("RSA PRIVATE KEY", private)}, nil
}

// Receipt tells the server that the key of d, which signs for it, is stored. The
// server deletes the sealed bytes then. Repeating it is harmless.
func (c *Client) Receipt(ctx context.Context, d Delivery, key crypto.Signer) error {
	path := "/enroll/" + url.PathEscape(d.Enrollment) + "/receipt"
	if d.Enrollment == "" {
		path = orgPath(d.Org, "key", d.KeyID, "receipt")
	}
	return c.do(ctx, request{
		method: http.MethodPost, path: path, typ: "application/json", token: d.Enrollment == "", read: done("Receipt recorded"),
		body: func() ([]byte, error) { return d.SignReceipt(key) },
	})
}

// SignReceipt returns the body of d's receipt, for who sends it by other means
// than Client.Receipt.
func (d Delivery) SignReceipt(key crypto.Signer) ([]byte, error) {
	signature, err := sign(key, string(d.wire().ReceiptText()))
	if err != nil {
		return nil, err
	}
	return json.Marshal(struct {
		Recipient string `json:"recipient"`
		Signature string `json:"signature"`
	}{d.Recipient, signature})
}

// SealedKey has an organization key made for org that only the holder of
// recipient can read: neither the server nor anything in between can. The same
// recipient gets the same key until its receipt, so that a lost answer is not a
// lost key. Its receipt is Client.Receipt.
func (c *Client) SealedKey(ctx context.Context, org string, recipient crypto.Decrypter) (*Delivered, error) {
	public, text, err := publicPEM(recipient.Public())
	if err != nil {
		return nil, err
	}
	id, err := envelope.Recipient(public)
	if err != nil {
		return nil, err
	}
	var key *Delivered
	err = c.do(ctx, request{
		method: http.MethodPost, path: orgPath(org, "key"), token: true, accept: sealedForm, typ: "application/json",
		body: func() ([]byte, error) {
			return json.Marshal(struct {
				Recipient string `json:"recipient"`
			}{string(text)})
		},
		read: func(a *answer) error {
			var s sealedAnswer
			if err := a.decode(&s); err != nil {
				return err
			}
			if s.Recipient != id || s.Org != org {
				return a.foreign("a key for somebody else")
			}
			key, err = open(a, s, recipient)
			return err
		},
	})
	return key, err
}

// AddKey makes a key that the caller made, RSA of OwnKeyBits, one of org's: only its
// public half is sent. The shipped policy lets nobody do so. Again it is the same key.
func (c *Client) AddKey(ctx context.Context, org string, key crypto.Signer) (*Delivery, error) {
	public, text, err := publicPEM(key.Public())
	if err != nil {
		return nil, err
	}
	id, err := envelope.Recipient(public)
	if err != nil {
		return nil, err
	}
	signature, err := sign(key, string(envelope.OwnKeyText(org, id)))
	if err != nil {
		return nil, err
	}
	var added Delivery
	err = c.do(ctx, request{
		method: http.MethodPost, path: orgPath(org, "key"), token: true, typ: "application/json",
		body: func() ([]byte, error) {
			return json.Marshal(struct {
				PublicKey string `json:"publicKey"`
				Signature string `json:"signature"`
			}{string(text), signature})
		},
		read: func(a *answer) error {
			if err := a.decode(&added); err != nil {
				return err
			}
			if added.Recipient != id || added.Org != org {
				return a.foreign("JSON about another key")
			}
			return nil
		},
	})
	return &added, err
}

// OpenSealed opens the JSON text of a sealed answer that was saved, as
// POST …/key and GET …/key/ID/sealed give it to an administrator. An
// enrollment's answer it refuses: only the token can tell who made that. The
// caller clears the result's PEM.
func OpenSealed(text []byte, recipient crypto.Decrypter) (*Delivered, error) {
	var s sealedAnswer
	if err := json.Unmarshal(text, &s); err != nil || s.Sealed.Alg == "" {
		return nil, fmt.Errorf("%w: it is not a sealed key's JSON", ErrSealedDamaged)
	}
	if s.Enrollment != "" || s.MAC != nil {
		return nil, fmt.Errorf("%w: it is the answer to an enrollment, and only the enrollment's token can authenticate it", ErrSealedDamaged)
	}
	if _, err := s.Sealed.Hash(); err != nil || envelope.Digest(s.Sealed.Value) != s.SHA256 {
		return nil, ErrSealedDamaged
	}
	public, _, err := publicPEM(recipient.Public())
	if err != nil {
		return nil, err
	}
	if id, err := envelope.Recipient(public); err != nil || s.Recipient != id {
		return nil, fmt.Errorf("%w: it is sealed to another recipient, %.64q", ErrSealedUseless, s.Recipient)
	}
	return unwrap(s, recipient)
}

// sealedForm is the media type of a private key that is sealed to a recipient.
const sealedForm = "application/vnd.orgkeys.sealed+json"
