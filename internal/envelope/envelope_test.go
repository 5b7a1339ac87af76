package envelope_test

import (
	"bytes"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/orgkeys/orgkeys/internal/envelope"
)

func newKey(t testing.TB) *rsa.PrivateKey {
	t.Helper()
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func seal(t testing.TB, key *rsa.PrivateKey, secret []byte) []byte {
	t.Helper()
	text, err := envelope.Seal(&key.PublicKey, secret)
	if err != nil {
		t.Fatal(err)
	}
	return text
}

func TestWhatIsSealedOpens(t *testing.T) {
	key := newKey(t)
	for _, secret := range [][]byte{{}, []byte("A=1\n"), bytes.Repeat([]byte{0, 255}, envelope.MaxSecret/2)} {
		got, err := envelope.Open(key, seal(t, key, secret))
		if err != nil || !bytes.Equal(got, secret) {
			t.Errorf("secret of %d bytes: %v", len(secret), err)
		}
	}
}

// Deployed nodes have no Go: what they do must open what we seal.
func TestDeployedNodeOpensItWithOpensslAndJq(t *testing.T) {
	key := newKey(t)
	keyFile := filepath.Join(t.TempDir(), "key.pem")
	block := &pem.Block{Type: "RSA PRIVATE KEY", Bytes: x509.MarshalPKCS1PrivateKey(key)}
	if err := os.WriteFile(keyFile, pem.EncodeToMemory(block), 0o600); err != nil {
		t.Fatal(err)
	}
	secret := []byte("AWS_ACCESS_KEY_ID=AKIA\nAWS_SECRET=\x00\xff'\"$(id)\n")
	open := func(text []byte) ([]byte, error) {
		cmd := exec.Command("testdata/open.sh", keyFile)
		cmd.Stdin, cmd.Stderr = bytes.NewReader(text), t.Output()
		return cmd.Output()
	}
	got, err := open(seal(t, key, secret))
	if err != nil || !bytes.Equal(got, secret) {
		t.Fatalf("got %q: %v", got, err)
	}
	if _, err := open(flip(t, seal(t, key, secret), "ct", 0)); err == nil {
		t.Error("the shell opened an envelope whose ciphertext was changed")
	}
}

// flip changes one bit of byte i of the named field.
func flip(t testing.TB, text []byte, name string, i int) []byte {
	t.Helper()
	var f map[string][]byte
	if err := json.Unmarshal(text, &f); err != nil {
		t.Fatal(err)
	}
	f[name][i] ^= 1
	changed, err := json.Marshal(f)
	if err != nil {
		t.Fatal(err)
	}
	return changed
}

func TestChangedEnvelopeDoesNotOpen(t *testing.T) {
	key := newKey(t)
	text := seal(t, key, []byte("0123456789abcdefX"))
	for name, last := range map[string]int{"key": 255, "iv": 15, "ct": 16, "mac": 31} {
		for _, i := range []int{0, last} {
			if _, err := envelope.Open(key, flip(t, text, name, i)); !errors.Is(err, envelope.ErrNotAuthentic) {
				t.Errorf("%s[%d] changed: %v", name, i, err)
			}
		}
	}
	if _, err := envelope.Open(newKey(t), text); !errors.Is(err, envelope.ErrNotAuthentic) {
		t.Errorf("another key: %v", err)
	}
}

func TestWhatIsNoEnvelopeIsRefused(t *testing.T) {
	key := newKey(t)
	good := string(seal(t, key, []byte("s")))
	b64 := func(n int) string { return base64.StdEncoding.EncodeToString(make([]byte, n)) }
	object := func(k, iv, ct, mac int) string {
		return `{"key":"` + b64(k) + `","iv":"` + b64(iv) + `","ct":"` + b64(ct) + `","mac":"` + b64(mac) + `"}`
	}
	for name, text := range map[string]string{
		"empty":             "",
		"not an object":     `"text"`,
		"empty object":      `{}`,
		"trailing data":     good + good,
		"duplicate name":    strings.Replace(good, `{`, `{"iv":"`+b64(16)+`",`, 1),
		"names in capitals": strings.Replace(good, `"iv"`, `"IV"`, 1),
		"url-safe base64":   strings.Replace(object(256, 16, 1, 32), "AA", "__", 1),
		"not a string":      strings.Replace(object(256, 16, 1, 32), `"ct":"AA=="`, `"ct":1`, 1),
		"short key":         object(255, 16, 1, 32),
		"12-byte iv":        object(256, 12, 1, 32),
		"truncated mac":     object(256, 16, 1, 16),
		"no mac":            object(256, 16, 1, 0),
	} {
		if _, err := envelope.Open(key, []byte(text)); !errors.Is(err, envelope.ErrFormat) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestLongSecretsAreRefused(t *testing.T) {
	key := newKey(t)
	if _, err := envelope.Seal(&key.PublicKey, make([]byte, envelope.MaxSecret+1)); !errors.Is(err, envelope.ErrTooLong) {
		t.Errorf("sealing: %v", err)
	}
	if _, err := envelope.Open(key, make([]byte, 1<<20)); !errors.Is(err, envelope.ErrTooLong) {
		t.Errorf("opening: %v", err)
	}
}

// Whatever opens was made for this key: no input that Seal did not make opens,
// and none makes Open panic.
func FuzzOpen(f *testing.F) {
	key := newKey(f)
	secret := []byte("secret")
	f.Add(seal(f, key, secret))
	f.Add(seal(f, newKey(f), secret))
	f.Add([]byte(`{"key":"","iv":"","ct":"","mac":""}`))
	f.Add([]byte(`{"key":null}`))
	f.Fuzz(func(t *testing.T, text []byte) {
		got, err := envelope.Open(key, text)
		if err == nil && !bytes.Equal(got, secret) {
			t.Errorf("opened to %q", got)
		}
	})
}
