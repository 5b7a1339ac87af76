package authn

import (
	"crypto"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/x509"
	"encoding/base64"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-json-experiment/json"
	"github.com/google/uuid"

	"github.com/orgkeys/orgkeys/internal/authz"
	"github.com/orgkeys/orgkeys/internal/org"
	"github.com/orgkeys/orgkeys/internal/privatefile"
)

// What tokens of the development issuer say. RFC 2606 reserves .invalid, so
// that no real issuer can have this name.
const (
	DevIssuerName = "https://orgkeys.invalid/development"
	DevAudience   = "orgkeys"
)

// MaxDevTTL is the longest that a token of the development issuer lasts.
const MaxDevTTL = 24 * time.Hour

// devKeyFile is the issuer's private key in the data directory, PKCS#8 PEM.
const devKeyFile = "development-issuer.pem"

// DevIssuer issues tokens for one machine, without any provider. Whoever can
// read its key file can sign in as anybody: it is for loopback only.
type DevIssuer struct {
	private ed25519.PrivateKey
	keyID   string // RFC 7638 thumbprint
}

// OpenDevIssuer opens the development issuer whose key is in dir, making the
// key if there is none. Processes that do so at the same time end up with the
// same key. A key file that anybody but its owner can read is refused.
func OpenDevIssuer(dir string) (*DevIssuer, error) {
	found, err := FindDevIssuer(dir)
	if !errors.Is(err, fs.ErrNotExist) {
		return found, err
	}
	if err := createDevKey(filepath.Join(dir, devKeyFile)); err != nil {
		return nil, fmt.Errorf("making the development issuer's key: %w", err)
	}
	return FindDevIssuer(dir)
}

// FindDevIssuer is OpenDevIssuer, and makes no key.
func FindDevIssuer(dir string) (*DevIssuer, error) {
	private, err := loadDevKey(filepath.Join(dir, devKeyFile))
	if err != nil {
		return nil, fmt.Errorf("opening the development issuer's key: %w", err)
	}
	jwk := jose.JSONWebKey{Key: private.Public()}
	thumbprint, err := jwk.Thumbprint(crypto.SHA256)
	if err != nil {
		return nil, fmt.Errorf("opening the development issuer's key: %w", err)
	}
	return &DevIssuer{private: private, keyID: base64.RawURLEncoding.EncodeToString(thumbprint)}, nil
}

// createDevKey writes a fresh key to path, whole or not at all, and leaves a
// key that is already there alone: a link, unlike a rename, replaces nothing.
func createDevKey(path string) error {
	_, private, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		return err
	}
	defer clear(private)
	der, err := x509.MarshalPKCS8PrivateKey(private)
	if err != nil {
		return err
	}
	defer clear(der)
	text := pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})
	defer clear(text)

	temporary, err := writeTemporary(filepath.Dir(path), text)
	if err != nil {
		return err
	}
	defer os.Remove(temporary) // a second name of the key file by then, or a key never used
	if err := os.Link(temporary, path); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	return syncDir(filepath.Dir(path))
}

// writeTemporary writes b durably to a new file in dir with mode 0600.
func writeTemporary(dir string, b []byte) (name string, err error) {
	f, err := os.CreateTemp(dir, ".development-issuer-*")
	if err != nil {
		return "", err
	}
	defer func() {
		err = errors.Join(err, f.Close())
		if err != nil {
			err = errors.Join(err, os.Remove(f.Name()))
		}
	}()
	if _, err := f.Write(b); err != nil {
		return "", err
	}
	return f.Name(), f.Sync()
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

func loadDevKey(path string) (ed25519.PrivateKey, error) {
	b, err := privatefile.Read(path, 4096, privatefile.Owner)
	if err != nil {
		return nil, err
	}
	defer clear(b)
	return parseDevKey(path, b)
}

func parseDevKey(path string, b []byte) (ed25519.PrivateKey, error) {
	block, rest := pem.Decode(b)
	if block == nil || block.Type != "PRIVATE KEY" || len(rest) > 0 {
		return nil, fmt.Errorf("%s holds no private key in PEM", path)
	}
	defer clear(block.Bytes)
	key, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		return nil, fmt.Errorf("%s holds no private key in PKCS#8", path)
	}
	private, ok := key.(ed25519.PrivateKey)
	if !ok {
		return nil, fmt.Errorf("%s holds no Ed25519 key", path)
	}
	return private, nil
}

// Issuer is what is believed of the issuer's tokens.
func (d *DevIssuer) Issuer() (Issuer, error) {
	set, err := json.Marshal(jose.JSONWebKeySet{Keys: []jose.JSONWebKey{
		{Key: d.private.Public(), KeyID: d.keyID, Algorithm: string(jose.EdDSA), Use: "sig"},
	}})
	if err != nil {
		return Issuer{}, fmt.Errorf("writing the development issuer's JWK set: %w", err)
	}
	keys, err := fixedKeySet(set)
	if err != nil {
		return Issuer{}, err
	}
	return Issuer{Name: DevIssuerName, Audiences: []string{DevAudience}, Keys: keys, Mapping: DefaultMapping()}, nil
}

// Issue returns a token for subject in org, good for ttl: at least one second,
// at most MaxDevTTL.
func (d *DevIssuer) Issue(subject string, org org.ID, roles []authz.Role, ttl time.Duration) (string, error) {
	if ttl < time.Second || ttl > MaxDevTTL {
		return "", fmt.Errorf("a token lasts from one second to %v, not %v", MaxDevTTL, ttl)
	}
	if !isPlain(subject) {
		return "", fmt.Errorf("the subject must be 1 to %d bytes without control or bidirectional characters", maxText)
	}
	if org == "" {
		return "", errors.New("a token needs an organization")
	}
	if len(roles) == 0 {
		return "", errors.New("a token needs a role")
	}
	for _, role := range roles {
		if _, ok := authz.ParseRole(string(role)); !ok {
			return "", fmt.Errorf("there is no role %q", role)
		}
	}
	return d.sign(subject, org, roles, ttl)
}

func (d *DevIssuer) sign(subject string, org org.ID, roles []authz.Role, ttl time.Duration) (string, error) {
	now := time.Now()
	payload, err := json.Marshal(map[string]any{
		"iss": DevIssuerName, "aud": DevAudience, "jti": uuid.NewString(),
		"iat": now.Unix(), "exp": now.Add(ttl).Unix(),
		"sub": subject, "org_id": org, "org_role": roles,
	}, json.Deterministic(true))
	if err != nil {
		return "", fmt.Errorf("writing a token: %w", err)
	}
	signer, err := jose.NewSigner(
		jose.SigningKey{Algorithm: jose.EdDSA, Key: d.private},
		(&jose.SignerOptions{}).WithType("JWT").WithHeader(jose.HeaderKey("kid"), d.keyID),
	)
	if err != nil {
		return "", fmt.Errorf("signing a token: %w", err)
	}
	jws, err := signer.Sign(payload)
	if err != nil {
		return "", fmt.Errorf("signing a token: %w", err)
	}
	return jws.CompactSerialize()
}
