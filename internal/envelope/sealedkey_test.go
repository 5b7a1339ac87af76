package envelope_test

import (
	"bytes"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/orgkeys/orgkeys/internal/envelope"
	"github.com/orgkeys/orgkeys/internal/envelope/envelopetest"
)

func newRSA(t *testing.T, bits int) *rsa.PrivateKey {
	t.Helper()
	key, err := rsa.GenerateKey(rand.Reader, bits)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func pkcs8(t *testing.T, key *rsa.PrivateKey) []byte {
	t.Helper()
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	return der
}

func TestSealedKeyOpens(t *testing.T) {
	recipient, private := newRSA(t, 3072), pkcs8(t, newRSA(t, 2048))
	for _, alg := range []string{envelope.WrapSHA256, envelope.WrapSHA1} {
		sealed := envelopetest.Wrap(t, &recipient.PublicKey, alg, private)
		opened, err := sealed.Open(recipient)
		if err != nil || !bytes.Equal(opened, private) {
			t.Errorf("%s: %d bytes, %v", alg, len(opened), err)
		}
		if got := openWithOpenSSL(t, recipient, sealed); !bytes.Equal(got, private) {
			t.Errorf("%s: openssl opens it to %d bytes, want %d", alg, len(got), len(private))
		}
	}
}

// openWithOpenSSL takes the documented steps.
func openWithOpenSSL(t *testing.T, recipient *rsa.PrivateKey, sealed envelope.SealedKey) []byte {
	t.Helper()
	dir := t.TempDir()
	file := func(name string, content []byte) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, content, 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	run := func(args ...string) []byte {
		out, err := exec.Command("openssl", args...).Output()
		if err != nil {
			t.Fatalf("openssl %v: %v", args, err)
		}
		return out
	}
	size := recipient.Size()
	key := file("recipient.pem", pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: pkcs8(t, recipient)}))
	digest := map[string]string{envelope.WrapSHA256: "sha256", envelope.WrapSHA1: "sha1"}[sealed.Alg]
	aes := run("pkeyutl", "-decrypt", "-inkey", key, "-in", file("head", sealed.Value[:size]), "-pkeyopt", "rsa_padding_mode:oaep",
		"-pkeyopt", "rsa_oaep_md:"+digest, "-pkeyopt", "rsa_mgf1_md:"+digest)
	return run("enc", "-d", "-id-aes256-wrap-pad", "-iv", "A65959A6", "-K", hex.EncodeToString(aes), "-in", file("tail", sealed.Value[size:]))
}

func TestSealedKeyOfAnotherOrChanged(t *testing.T) {
	recipient, other := newRSA(t, 3072), newRSA(t, 3072)
	sealed := envelopetest.Wrap(t, &recipient.PublicKey, envelope.WrapSHA256, pkcs8(t, newRSA(t, 2048)))
	if _, err := sealed.Open(other); !errors.Is(err, envelope.ErrNotAuthentic) {
		t.Errorf("another recipient: %v", err)
	}
	for _, at := range []int{0, recipient.Size() - 1, recipient.Size(), len(sealed.Value) - 1} {
		changed := envelope.SealedKey{Alg: sealed.Alg, Value: bytes.Clone(sealed.Value)}
		changed.Value[at] ^= 1
		if _, err := changed.Open(recipient); !errors.Is(err, envelope.ErrNotAuthentic) {
			t.Errorf("byte %d changed: %v", at, err)
		}
	}
	for name, c := range map[string]struct {
		envelope.SealedKey
		want error
	}{
		"no alg":      {envelope.SealedKey{Value: sealed.Value}, envelope.ErrAlg},
		"another alg": {envelope.SealedKey{Alg: "RSA_AES_KEY_WRAP_MD5", Value: sealed.Value}, envelope.ErrAlg},
		"wrong hash":  {envelope.SealedKey{Alg: envelope.WrapSHA1, Value: sealed.Value}, envelope.ErrNotAuthentic},
		"empty":       {envelope.SealedKey{Alg: sealed.Alg}, envelope.ErrFormat},
		"head alone":  {envelope.SealedKey{Alg: sealed.Alg, Value: sealed.Value[:recipient.Size()]}, envelope.ErrFormat},
		"cut":         {envelope.SealedKey{Alg: sealed.Alg, Value: sealed.Value[:len(sealed.Value)-8]}, envelope.ErrNotAuthentic},
		"not blocks":  {envelope.SealedKey{Alg: sealed.Alg, Value: sealed.Value[:len(sealed.Value)-1]}, envelope.ErrNotAuthentic},
		"long":        {envelope.SealedKey{Alg: sealed.Alg, Value: make([]byte, 1<<20)}, envelope.ErrTooLong},
	} {
		if _, err := c.Open(recipient); !errors.Is(err, c.want) {
			t.Errorf("%s: %v, want %v", name, err, c.want)
		}
	}
}

func TestToken(t *testing.T) {
	token := envelope.Token{ID: "7d3c1a52-1a2b-4c3d-8e4f-0123456789ab", K: bytes.Repeat([]byte{0xfb}, envelope.TokenSecretSize)}
	text := token.AppendText(nil)
	for _, given := range [][]byte{text, append(bytes.Clone(text), '\n'), append([]byte(" \t"), append(bytes.Clone(text), "\r\n"...)...)} {
		got, err := envelope.ParseToken(given)
		if err != nil || got.ID != token.ID || !bytes.Equal(got.K, token.K) {
			t.Errorf("%q: %+v, %v", given, got, err)
		}
	}
	for _, bad := range []string{
		"", "oke1", "oke2" + string(text[4:]), string(text[:len(text)-1]), string(text) + "A", string(text) + " x",
		"oke1.7D3C1A52-1a2b-4c3d-8e4f-0123456789ab" + string(text[41:]), string(text[:len(text)-1]) + "=", string(text[:len(text)-1]) + "9", // bits past the end
		string(text[:42]) + "\n" + string(text[42:]),
	} {
		if got, err := envelope.ParseToken([]byte(bad)); !errors.Is(err, envelope.ErrToken) {
			t.Errorf("%q: %+v, %v", bad, got, err)
		}
	}
}

// The texts are the protocol: nodes in other languages depend on every byte.
func TestEnrollmentTexts(t *testing.T) {
	d := envelope.Delivery{Enrollment: "E", Org: "acme", Origin: "orgkeys/1", KeyID: "K", Recipient: "R", Fingerprint: "F", SHA256: "S"}
	if got, want := string(d.ReceiptText()), "orgkeys/receipt/v1\norgkeys/1\nacme\nK\nR\nS\n"; got != want {
		t.Errorf("receipt: %q, want %q", got, want)
	}
	key := []byte("0123456789abcdef0123456789abcdef")
	for name, c := range map[string]struct {
		got  []byte
		text string
	}{
		"claim":  {envelope.ClaimMAC(key, "E", "R"), "orgkeys/enroll/v1\nE\nR\n"},
		"answer": {d.MAC(key), "orgkeys/sealed/v1\nE\nacme\norgkeys/1\nK\nR\nF\nS\n"},
	} {
		cmd := exec.Command("openssl", "dgst", "-sha256", "-mac", "HMAC", "-macopt", "key:"+string(key), "-binary")
		cmd.Stdin = bytes.NewReader([]byte(c.text))
		want, err := cmd.Output()
		if err != nil || !bytes.Equal(c.got, want) {
			t.Errorf("%s: %x, openssl has %x, %v", name, c.got, want, err)
		}
	}
}
