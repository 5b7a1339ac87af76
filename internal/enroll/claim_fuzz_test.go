package enroll

import (
	"crypto/rand"
	"crypto/rsa"
	"encoding/base64"
	"encoding/json"
	"errors"
	"testing"

	"github.com/google/go-tpm/tpm2"

	"github.com/orgkeys/orgkeys/internal/tpm"
)

// FuzzClaim: whatever a node sends is read or refused in words.
func FuzzClaim(f *testing.F) {
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		f.Fatal(err)
	}
	text, b64 := publicPEM(f, &key.PublicKey), base64.StdEncoding.EncodeToString
	of := map[string]any{"ek": text, "public": b64(tpm2.Marshal(tpm2.RSAEKTemplate))}
	for _, body := range []map[string]any{
		{"recipient": text, "mac": b64(make([]byte, 32)), "tpm": of},
		{"publicKey": text, "signature": b64(make([]byte, 256)), "mac": b64(make([]byte, 32))},
		{"publicKey": text, "signature": b64(make([]byte, 256)), "mac": b64(make([]byte, 32)), "tpm": of, "proof": b64(make([]byte, 32))},
	} {
		encoded, err := json.Marshal(body)
		if err != nil {
			f.Fatal(err)
		}
		if c, err := parseClaim(encoded); err != nil || (body["tpm"] != nil) != (c.tpm != nil) {
			f.Fatalf("%s: %+v, %v", encoded, c, err)
		}
		f.Add(encoded)
	}
	f.Fuzz(func(t *testing.T, body []byte) {
		c, err := parseClaim(body)
		if err != nil {
			if !errors.As(err, new(*InputError)) && !errors.As(err, new(*RecipientError)) {
				t.Errorf("%q: %v", body, err)
			}
			return
		}
		if c.recipient.Public == nil || len(c.mac) == 0 || (c.recipient.Origin == FromNode) != (c.signature != nil) {
			t.Errorf("%q is read as %+v", body, c)
		}
		if c.tpm != nil {
			_, err := tpm.ReadKey(c.tpm.public, tpm.Speaking)
			if _, ok := errors.AsType[*tpm.Error](err); err != nil && !ok {
				t.Errorf("%q: %v", body, err)
			}
		}
	})
}
