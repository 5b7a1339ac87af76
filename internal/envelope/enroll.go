package envelope

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"regexp"
	"strings"
)

// TokenSecretSize is the length of an enrollment token's secret K, in bytes.
const TokenSecretSize = 32

const tokenPrefix = "oke1"

var (
	tokenForm = regexp.MustCompile(`^oke1\.([0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12})\.([A-Za-z0-9_-]{43})$`)

	// ErrToken: not an enrollment token.
	ErrToken = errors.New("not an enrollment token: it has the form oke1.ID.SECRET")
)

// Token is what an administrator hands to a node: the enrollment's ID and the
// secret K. K itself is never sent; requests and answers carry MACs with it.
type Token struct {
	ID string
	K  []byte // TokenSecretSize bytes
}

// AppendText appends the token's text, oke1.ID.SECRET, to b.
func (t Token) AppendText(b []byte) []byte {
	b = append(b, tokenPrefix+"."+t.ID+"."...)
	return base64.RawURLEncoding.AppendEncode(b, t.K)
}

// ParseToken reads a token's text; white space around it is ignored. The caller
// clears K. The error quotes nothing.
func ParseToken(text []byte) (Token, error) {
	parts := tokenForm.FindSubmatch(trimSpace(text))
	if parts == nil {
		return Token{}, ErrToken
	}
	t := Token{ID: string(parts[1]), K: make([]byte, TokenSecretSize)}
	if _, err := base64.RawURLEncoding.Strict().Decode(t.K, parts[2]); err != nil {
		clear(t.K)
		return Token{}, ErrToken
	}
	return t, nil
}

func trimSpace(text []byte) []byte {
	for len(text) > 0 && strings.IndexByte(" \t\r\n", text[0]) >= 0 {
		text = text[1:]
	}
	for len(text) > 0 && strings.IndexByte(" \t\r\n", text[len(text)-1]) >= 0 {
		text = text[:len(text)-1]
	}
	return text
}

// Delivery is what an answer to an enrollment vouches for.
type Delivery struct {
	Enrollment  string // its ID
	Org         string
	Origin      string // the audit log's
	KeyID       string
	Recipient   string // R, see Recipient
	Fingerprint string // RFC 7638 thumbprint of the key
	SHA256      string // lower-case hex, of the sealed bytes
}

// lines is a text to sign or MAC: a label and fields, each ended by a line
// feed. No field contains one.
func lines(label string, fields ...string) []byte {
	return []byte(label + "\n" + strings.Join(fields, "\n") + "\n")
}

// ClaimMAC is the MAC by which a node that has K asks for a key sealed to
// recipient R: HMAC-SHA-256 with K.
// With a challenge's secret in place of K it is the proof that the TPM has the key.
func ClaimMAC(k []byte, enrollment, recipient string) []byte {
	return hmacSHA256(k, ClaimText(enrollment, recipient))
}

// ClaimText is what a node signs with a key that it made itself, to show that
// it has the private half: R is that key's.
func ClaimText(enrollment, recipient string) []byte {
	return lines("orgkeys/enroll/v1", enrollment, recipient)
}

// OwnKeyText is what an administrator signs with a key of their own that org is
// to have.
func OwnKeyText(org, recipient string) []byte {
	return lines("orgkeys/add/v1", org, recipient)
}

// ChallengeSecret is the secret of the challenge for a key in a TPM, from the
// enrollment's own for that: one for each recipient, TPM and object.
func ChallengeSecret(enrollment []byte, id, recipient, ek string, name []byte) []byte {
	return hmacSHA256(enrollment, lines("orgkeys/challenge-secret/v1", id, recipient, ek, hex.EncodeToString(name)))
}

// ChallengeMAC is the MAC by which the service sends a challenge.
func ChallengeMAC(k []byte, enrollment, recipient string, idObject, encSecret []byte) []byte {
	return hmacSHA256(k, lines("orgkeys/challenge/v1", enrollment, recipient, hex.EncodeToString(idObject), hex.EncodeToString(encSecret)))
}

// MAC is the MAC by which the service answers a node: whoever made it has K.
func (d Delivery) MAC(k []byte) []byte {
	return hmacSHA256(k, lines("orgkeys/sealed/v1", d.Enrollment, d.Org, d.Origin, d.KeyID, d.Recipient, d.Fingerprint, d.SHA256))
}

// ReceiptText is what a node signs with the delivered key, RSASSA-PKCS1-v1_5
// with SHA-256, to say that it has it.
func (d Delivery) ReceiptText() []byte {
	return lines("orgkeys/receipt/v1", d.Origin, d.Org, d.KeyID, d.Recipient, d.SHA256)
}

// Digest is the lower-case hex SHA-256 of sealed bytes.
func Digest(sealed []byte) string {
	sum := sha256.Sum256(sealed)
	return hex.EncodeToString(sum[:])
}

func hmacSHA256(k, text []byte) []byte {
	h := hmac.New(sha256.New, k)
	h.Write(text)
	return h.Sum(nil)
}
