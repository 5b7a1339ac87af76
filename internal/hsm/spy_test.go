//go:build cgo

package hsm

import (
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/miekg/pkcs11"
)

// findSpy looks where systems install OpenSC's pkcs11-spy.
func findSpy(t *testing.T) string {
	t.Helper()
	for _, pattern := range []string{
		"/usr/lib/*/pkcs11-spy.so", "/usr/lib/pkcs11-spy.so", "/usr/lib/pkcs11/pkcs11-spy.so",
		"/usr/lib64/pkcs11-spy.so", "/usr/lib64/pkcs11/pkcs11-spy.so", "/opt/homebrew/lib/pkcs11-spy.so",
	} {
		if found, err := filepath.Glob(pattern); err == nil && len(found) > 0 {
			return found[0]
		}
	}
	t.Fatal("pkcs11-spy is not installed (Debian: apt install opensc)")
	return ""
}

// spied is one call as pkcs11-spy logged it.
type spied struct{ function, text string }

// spyOn lets a child work through pkcs11-spy.
func spyOn(t *testing.T) (calls []spied, r report, dir string) {
	t.Helper()
	dir = t.TempDir()
	out, calls := spyOnChild(t, "spied on", dir)
	if err := json.Unmarshal(out, &r); err != nil || r.Err != "" {
		t.Fatalf("child: %v %s", err, r.Err)
	}
	return calls, r, dir
}

// spyOnChild returns what the child wrote, and its calls into the module.
func spyOnChild(t *testing.T, name, dir string, env ...string) (out []byte, calls []spied) {
	t.Helper()
	module, err := FindSoftHSM()
	if err != nil {
		t.Fatal(err)
	}
	log := filepath.Join(dir, "spy.log")
	cmd := childCommand(t, name, dir, append(env, childModule+"="+findSpy(t), "PKCS11SPY="+module, "PKCS11SPY_OUTPUT="+log)...)
	cmd.Stderr = os.Stderr
	if out, err = cmd.Output(); err != nil {
		t.Fatalf("child: %v", err)
	}
	text, err := os.ReadFile(log)
	if err != nil {
		t.Fatal(err)
	}
	heads := regexp.MustCompile(`(?m)^\d+: (C_\w+)$`).FindAllSubmatchIndex(text, -1)
	for i, head := range heads {
		end := len(text)
		if i+1 < len(heads) {
			end = heads[i+1][0]
		}
		calls = append(calls, spied{string(text[head[2]:head[3]]), string(text[head[1]:end])})
	}
	return out, calls
}

// dumped returns all bytes that the log shows, as hex.
func dumped(calls []spied) string {
	line := regexp.MustCompile(`(?m)^ {4}[0-9A-F]{8}  ((?:[0-9A-F]{2} ){1,16})`)
	var all strings.Builder
	for _, c := range calls {
		for _, m := range line.FindAllStringSubmatch(c.text, -1) {
			all.WriteString(strings.ToLower(strings.ReplaceAll(m[1], " ", "")))
		}
		all.WriteByte('\n')
	}
	return all.String()
}

func ok(c spied) bool { return strings.Contains(c.text, "Returned:  0 CKR_OK") }

// wrapped reports whether a C_WrapKey returned a wrapped key. The binding calls
// twice for each, the first time without a buffer to learn the length.
func wrapped(c spied) bool {
	return c.function == "C_WrapKey" && ok(c) && !strings.Contains(c.text, "[out] pWrappedKey[*pulWrappedKeyLen] NULL")
}

func field(c spied, name string) string {
	m := regexp.MustCompile(regexp.QuoteMeta(name) + ` = (\S+)`).FindStringSubmatch(c.text)
	if m == nil {
		return ""
	}
	return m[1]
}

func TestUnderPKCS11Spy(t *testing.T) {
	calls, r, dir := spyOn(t)

	t.Run("one generation and one wrapping for each key", func(t *testing.T) {
		private := map[string]int{} // how often each generated private key was wrapped
		wrapping := ""              // the wrapping key
		lives, transports, samples := 0, 0, 0
		for _, c := range calls {
			switch {
			case c.function == "C_Initialize" && ok(c):
				lives++ // two at a first start, which looks at its new key in a second one
			case c.function == "C_GenerateKeyPair" && ok(c):
				private[field(c, "hPrivateKey")] = 0
			case wrapped(c) && strings.Contains(c.text, "CKM_RSA_PKCS_OAEP"):
				transports++
				wrapping = field(c, "hKey")
			case wrapped(c) && len(private) == 0:
				samples++ // the trial of the mechanism at start, on an imported key
			case wrapped(c):
				private[field(c, "hKey")]++
				if field(c, "hWrappingKey") != wrapping {
					t.Error("wrapped by another key than the one handed over")
				}
			}
		}
		if len(private) != childKeys {
			t.Errorf("%d keys were generated or wrapped, for %d", len(private), childKeys)
		}
		for handle, n := range private {
			if n != 1 {
				t.Errorf("key %s was wrapped %d times", handle, n)
			}
		}
		if lives != 2 || transports != lives || samples != 1 {
			t.Errorf("in %d lives of the library, which are to be two, %d wrapping keys were handed over, and %d samples wrapped, want one a life and one", lives, transports, samples)
		}
	})

	t.Run("private keys are session objects, sensitive", func(t *testing.T) {
		for _, c := range calls {
			if c.function != "C_GenerateKeyPair" {
				continue
			}
			_, template, _ := strings.Cut(c.text, "pPrivateKeyTemplate")
			if !regexp.MustCompile(`CKA_TOKEN +False`).MatchString(template) || !regexp.MustCompile(`CKA_SENSITIVE +True`).MatchString(template) {
				t.Errorf("generated with %s", template)
			}
		}
	})

	t.Run("the sealing key is sensitive and never extractable", func(t *testing.T) {
		made := 0
		for _, c := range calls {
			if c.function == "C_GenerateKey" && regexp.MustCompile(`CKA_TOKEN +True`).MatchString(c.text) {
				made++
				if !regexp.MustCompile(`CKA_SENSITIVE +True`).MatchString(c.text) || !regexp.MustCompile(`CKA_EXTRACTABLE +False`).MatchString(c.text) {
					t.Errorf("made with %s", c.text)
				}
			}
		}
		if made != 1 {
			t.Errorf("%d were made", made)
		}
	})

	t.Run("no attribute of a private key is asked for", func(t *testing.T) {
		asked := 0
		for _, c := range calls {
			if c.function == "C_GetAttributeValue" {
				asked++
				if m := regexp.MustCompile(`CKA_(PRIVATE_EXPONENT|PRIME_\d|EXPONENT_\d|COEFFICIENT|VALUE) `).FindString(c.text); m != "" {
					t.Errorf("asked for %s", m)
				}
			}
		}
		if asked == 0 {
			t.Error("nothing was asked for: the log is not understood")
		}
	})

	t.Run("no number of a private key is in the log", func(t *testing.T) {
		log := dumped(calls)
		for _, public := range r.Public {
			if !strings.Contains(log, public) {
				t.Error("a modulus is not found: the search does not work")
			}
		}
		if len(r.Secrets) != 6*childKeys {
			t.Errorf("%d numbers to search for", len(r.Secrets))
		}
		for i, secret := range r.Secrets {
			if strings.Contains(log, secret[:32]) || strings.Contains(log, secret[len(secret)-32:]) {
				t.Errorf("number %d is in the log", i)
			}
		}
	})

	t.Run("no private key is left", func(t *testing.T) {
		if r.PrivateKeys != 0 {
			t.Errorf("%d in the process's sessions", r.PrivateKeys)
		}
		// Another process sees what is on disk.
		cfg, created, err := InitSoftHSM(dir)
		if err != nil || created {
			t.Fatalf("InitSoftHSM: created %v, %v", created, err)
		}
		inToken(t, cfg, func(lib *module, h pkcs11.SessionHandle) {
			found, err := find(lib, h, 100)
			if err != nil {
				t.Fatal(err)
			}
			sealing, err := lookUpSealingKey(lib, h)
			if err != nil || len(found) != 1 || found[0] != sealing {
				t.Errorf("objects on disk: %v, and not just the sealing key (%v, %v)", found, sealing, err)
			}
		})
	})
}

// What the module is asked for while keys are sealed to a recipient: for each
// an AES key that only wraps, handed to the recipient alone, wrapping that key
// alone, and destroyed. Nothing is decrypted, and no secret attribute is read.
func TestSealingToARecipientUnderPKCS11Spy(t *testing.T) {
	recipient, err := rsa.GenerateKey(rand.Reader, 3072)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.MarshalPKIXPublicKey(&recipient.PublicKey)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	file := filepath.Join(dir, "recipient")
	if err := os.WriteFile(file, der, 0o600); err != nil {
		t.Fatal(err)
	}
	_, calls := spyOnChild(t, "spied on while it seals keys", dir, childRecipient+"="+file)
	pairs := slices.IndexFunc(calls, func(c spied) bool { return c.function == "C_GenerateKeyPair" })
	if pairs < 0 {
		t.Fatal("no key was generated: the log is not understood")
	}
	fetched := map[string]bool{} // AES keys that were wrapped before: this process has them
	for _, c := range calls[:pairs] {
		if wrapped(c) {
			fetched[field(c, "hKey")] = true
		}
	}
	modulus := hex.EncodeToString(recipient.N.Bytes())
	var recipients, deliveries, private, destroyed = map[string]bool{}, map[string]int{}, map[string]bool{}, map[string]bool{}
	for _, c := range calls[pairs:] {
		switch {
		case strings.HasPrefix(c.function, "C_Decrypt"), c.function == "C_UnwrapKey":
			t.Errorf("%s was called", c.function)
		case c.function == "C_GetAttributeValue":
			if m := regexp.MustCompile(`CKA_(PRIVATE_EXPONENT|PRIME_\d|EXPONENT_\d|COEFFICIENT|VALUE) `).FindString(c.text); m != "" {
				t.Errorf("asked for %s", m)
			}
		case c.function == "C_GenerateKeyPair":
			private[field(c, "hPrivateKey")] = true
		case c.function == "C_GenerateKey":
			deliveries[field(c, "hKey")] = 0
			for _, attribute := range []string{`TOKEN +False`, `SENSITIVE +True`, `WRAP +True`, `UNWRAP +False`, `ENCRYPT +False`, `DECRYPT +False`} {
				if !regexp.MustCompile(`CKA_` + attribute).MatchString(c.text) {
					t.Errorf("a delivery's key is not made with %s:\n%s", attribute, c.text)
				}
			}
		case c.function == "C_CreateObject" && strings.Contains(dumped([]spied{c}), modulus):
			recipients[field(c, "*phObject")] = true
		case c.function == "C_DestroyObject":
			destroyed[field(c, "hObject")] = true
		case wrapped(c) && strings.Contains(c.text, "CKM_RSA_PKCS_OAEP"):
			if !recipients[field(c, "hWrappingKey")] {
				t.Errorf("an AES key was wrapped for somebody else than the recipient:\n%s", c.text)
			}
			deliveries[field(c, "hKey")]++
		case wrapped(c):
			if key := field(c, "hWrappingKey"); deliveries[key] != 1 || fetched[key] || !private[field(c, "hKey")] {
				t.Errorf("wrapped by a key that is not the delivery's, or another thing than the private key:\n%s", c.text)
			}
			deliveries[field(c, "hWrappingKey")]++
		}
	}
	if len(deliveries) != childKeys || len(private) != childKeys {
		t.Errorf("%d AES keys for %d private keys, want %d of each", len(deliveries), len(private), childKeys)
	}
	for key, uses := range deliveries {
		if uses != 2 || !destroyed[key] {
			t.Errorf("AES key %s: %d uses, destroyed %v; want 2 and true", key, uses, destroyed[key])
		}
	}
}
