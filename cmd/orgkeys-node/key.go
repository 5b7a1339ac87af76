package main

import (
	"crypto"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/big"

	"github.com/orgkeys/orgkeys/internal/privatefile"
)

const maxKeyFile = 64 << 10

// key is the organization key that this node holds.
type key struct {
	private     *rsa.PrivateKey
	fingerprint string // RFC 7638 thumbprint, as the server shows it
}

// readKey reads a key file that nobody but its owner may read.
func readKey(path string) (key, error) {
	wrong := func(err error, hint string) (key, error) {
		return key{}, &failure{exitConfig, "key file " + path, hint, err}
	}
	f, err := privatefile.Open(path, privatefile.Owner)
	if errors.Is(err, fs.ErrNotExist) {
		return wrong(err, "put the organization key there, mode 0600")
	}
	if err != nil {
		return wrong(err, "")
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return wrong(err, "")
	}
	if err := checkOwner(info); err != nil {
		return wrong(err, "chown it")
	}
	text, err := io.ReadAll(io.LimitReader(f, maxKeyFile))
	if err != nil {
		return wrong(err, "")
	}
	defer clear(text)
	private, err := parseKey(text)
	if err != nil {
		return wrong(err, "copy the PEM again as it was handed out")
	}
	return key{private, thumbprint(&private.PublicKey)}, nil
}

func parseKey(text []byte) (*rsa.PrivateKey, error) {
	block, _ := pem.Decode(text)
	if block == nil {
		return nil, errors.New("not PEM")
	}
	defer clear(block.Bytes)
	switch block.Type {
	case "RSA PRIVATE KEY":
		return x509.ParsePKCS1PrivateKey(block.Bytes)
	case "PRIVATE KEY":
		parsed, err := x509.ParsePKCS8PrivateKey(block.Bytes)
		if err != nil {
			return nil, err
		}
		if private, ok := parsed.(*rsa.PrivateKey); ok {
			return private, nil
		}
	}
	return nil, errors.New("not an RSA private key")
}

// thumbprint is the RFC 7638 thumbprint: base64url of SHA-256 over the JWK's
// required members in lexicographic order.
func thumbprint(k *rsa.PublicKey) string {
	b64 := base64.RawURLEncoding.EncodeToString
	sum := sha256.Sum256([]byte(`{"e":"` + b64(big.NewInt(int64(k.E)).Bytes()) + `","kty":"RSA","n":"` + b64(k.N.Bytes()) + `"}`))
	return b64(sum[:])
}

// sign is RSASSA-PKCS1-v1_5 with SHA-256 over a line, in base64.
func (k key) sign(line string) (string, error) {
	digest := sha256.Sum256([]byte(line))
	signature, err := rsa.SignPKCS1v15(nil, k.private, crypto.SHA256, digest[:])
	if err != nil {
		return "", fmt.Errorf("signing: %w", err)
	}
	return base64.StdEncoding.EncodeToString(signature), nil
}
