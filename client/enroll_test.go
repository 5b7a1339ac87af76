package client_test

import (
	"context"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/json"
	"errors"
	"net/http"
	"net/http/httptest"
	"testing"
	"time"

	"github.com/orgkeys/orgkeys/client"
	"github.com/orgkeys/orgkeys/internal/envelope"
	"github.com/orgkeys/orgkeys/internal/envelope/envelopetest"
)

func pkcs8(t *testing.T, key any) []byte {
	t.Helper()
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	return der
}

// A server that has K may still send what does not open to the key that it
// vouches for. That is final, and nothing else is.
func TestWhatASealedKeyMustBe(t *testing.T) {
	recipient, err := client.NewRecipient()
	if err != nil {
		t.Fatal(err)
	}
	another, err := client.NewRecipient()
	if err != nil {
		t.Fatal(err)
	}
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	good := envelopetest.Wrap(t, &recipient.PublicKey, envelope.WrapSHA256, pkcs8(t, key))
	token := envelope.Token{ID: "00000000-0000-4000-8000-000000000001", K: make([]byte, envelope.TokenSecretSize)}
	rand.Read(token.K)
	id, err := client.RecipientID(&recipient.PublicKey)
	if err != nil {
		t.Fatal(err)
	}
	changed := envelope.SealedKey{Alg: good.Alg, Value: append([]byte{}, good.Value...)}
	changed.Value[len(changed.Value)-1] ^= 1
	for name, c := range map[string]struct {
		sealed      envelope.SealedKey
		fingerprint string
		want        error
		passes      bool
	}{
		"as it must be":        {good, client.Fingerprint(&key.PublicKey), nil, false},
		"another fingerprint":  {good, client.Fingerprint(&another.PublicKey), client.ErrSealedUseless, false},
		"another's":            {envelopetest.Wrap(t, &another.PublicKey, envelope.WrapSHA256, pkcs8(t, key)), client.Fingerprint(&key.PublicKey), client.ErrSealedUseless, false},
		"changed before":       {changed, client.Fingerprint(&key.PublicKey), client.ErrSealedUseless, false},
		"no private key":       {envelopetest.Wrap(t, &recipient.PublicKey, envelope.WrapSHA256, []byte("this is no private key")), client.Fingerprint(&key.PublicKey), client.ErrSealedUseless, false},
		"nothing":              {envelope.SealedKey{Alg: good.Alg}, client.Fingerprint(&key.PublicKey), client.ErrSealedUseless, false},
		"an unknown algorithm": {envelope.SealedKey{Alg: "x", Value: good.Value}, client.Fingerprint(&key.PublicKey), client.ErrSealedDamaged, true},
	} {
		d := envelope.Delivery{
			Enrollment: token.ID, Org: "acme", Origin: "log", KeyID: "k", Recipient: id,
			Fingerprint: c.fingerprint, SHA256: envelope.Digest(c.sealed.Value),
		}
		server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Type", "application/json")
			if err := json.NewEncoder(w).Encode(map[string]any{
				"id": d.Enrollment, "org": d.Org, "origin": d.Origin, "keyId": d.KeyID, "fingerprint": d.Fingerprint, "sha256": d.SHA256,
				"sealed": c.sealed, "mac": d.MAC(token.K),
			}); err != nil {
				t.Error(err)
			}
		}))
		t.Cleanup(server.Close)
		asked, err := client.New(client.Config{Server: server.URL, Attempt: 10 * time.Second})
		if err != nil {
			t.Fatal(err)
		}
		e, err := client.NewEnrollment(asked, token.AppendText(nil), recipient)
		if err != nil {
			t.Fatal(err)
		}
		device := &failing{PrivateKey: recipient}
		device.decrypts.Store(1)
		e.Recipient = device
		if c.want != client.ErrSealedDamaged && len(c.sealed.Value) > 0 {
			if _, err := e.Fetch(context.Background()); !errors.Is(err, client.ErrKeyFailed) || errors.Is(err, client.ErrSealedUseless) || !client.Temporary(err) {
				t.Errorf("%s, while the recipient's device fails: %v", name, err)
			}
		}
		e.Recipient = recipient
		delivered, err := e.Fetch(context.Background())
		if !errors.Is(err, c.want) || c.want == nil && err != nil || client.Temporary(err) != c.passes {
			t.Errorf("%s: %v, passes %t", name, err, client.Temporary(err))
		}
		if (delivered != nil) != (c.want == nil) {
			t.Errorf("%s: a key came: %t", name, delivered != nil)
		}
	}
}

// What no token is, is said without repeating it.
func TestTokenID(t *testing.T) {
	token := envelope.Token{ID: "00000000-0000-4000-8000-000000000001", K: make([]byte, envelope.TokenSecretSize)}
	if id, err := client.TokenID(append(token.AppendText([]byte(" ")), '\n')); err != nil || id != token.ID {
		t.Errorf("%q, %v", id, err)
	}
	for _, text := range []string{"", "oke1", "oke1.secret", "oke2." + token.ID + ".AAAA"} {
		if _, err := client.TokenID([]byte(text)); !errors.Is(err, client.ErrToken) || err.Error() != client.ErrToken.Error() {
			t.Errorf("%q: %v", text, err)
		}
	}
}
