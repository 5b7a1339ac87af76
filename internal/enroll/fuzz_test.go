package enroll

import (
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"errors"
	"slices"
	"strings"
	"testing"
	"time"
)

// someRecipient is an RSA key of 3072 bits, so that no fuzzing process has to make one.
const someRecipient = `-----BEGIN PUBLIC KEY-----
MIIBojANBgkqhkiG9w0BAQEFAAOCAY8AMIIBigKCAYEAxcswH83966xIU+C99LnX
i1gbVRDrT3eGK8ggG5necLEoJc558tFMhOJEQLxpTwpvJgTq6DWvKNC0Eq1s+s6k
JnKWmwlt+c/MrMwAdtI9GVyGLaadT7rXBmwmPqfJHN5tp69beR9ZP3BhoZmcBlJ7
mk/4nVbTpqZxwqTd9miYaE6IUHrpimvZvpMjG+YNOKmSBZzQa+GApx8w9zStmgut
126klMC1i8M/uQhpmUjXBENWccqFFbqIsNPn1MKzwsjoCAt3P7PfSTzrXjvcCuRZ
s2HSbvc5/QaLxUa+Dtug85/PTJZjtnz3fj8hJSpQlZCTurE/4RzrZJ1UNg0pZ1pY
I3dd1hyfVkCPbZ/RjeypK2ADcNSLNpljW+LsZ0vFycbIMxcLebBBmC6EJoeIHwaJ
CtlgZd/af2Rkuztq2AVIjtpDLdVUaP65gVvvIgbno19nV8iNCW0MjQLE5ac4QMhc
39YyHSzdVD/A4Di+K3g3KXaE+1+jD3pZHae3zf3Et8k9AgMBAAE=
-----END PUBLIC KEY-----
`

// FuzzRequests: whatever a node or an administrator sends, no panic, no error but
// those for its sender, which repeat nothing of it; and what is accepted is what
// another reader of the same bytes finds in them, within the bounds.
func FuzzRequests(f *testing.F) {
	quoted, err := json.Marshal(someRecipient)
	if err != nil {
		f.Fatal(err)
	}
	r := strings.Repeat("0a", 32)
	for _, body := range []string{
		``, ` `, `{}`, `null`, `[]`, `{"recipient":null}`,
		`{"recipient":` + string(quoted) + `,"mac":"AAAA"}`,
		`{"recipient":` + string(quoted) + `,"mac":"AAAA","mac":"AAAB"}`,
		`{"recipient":` + string(quoted) + `,"mac":"AAAA\n"}`, `{"recipient":` + string(quoted) + `,"mac":"AB=="}`,
		`{"recipient":"` + r + `","signature":"AAAA"}`, `{"recipient":"` + r + `\n","signature":"AAAA"}`, `{"Recipient":"` + r + `","signature":"AAAA"}`,
		`{"scope":"organization","uses":1,"ttlSeconds":600,"bind":{"recipient":"` + r + `"},"approval":true,"note":"rack 7"}`,
		`{"scope":"node","uses":100,"ip":"::ffff:192.0.2.7"}`, `{"ip":"fe80::1%eth0"}`, `{"uses":1e2}`, `{"origin":"node","bind":{"tpm":true}}`, `{"bind":{"ek":"sha256-` + r + `"},"origin":"backend"}`,
		`{"recipient":` + string(quoted) + `,"mac":"AAAA","tpm":{"ek":"AAAA","public":"AAAA"},"proof":"AAAA"}`,
		`{"publicKey":` + string(quoted) + `,"mac":"AAAA","signature":"AAAA"}`,
		`{"ttlSeconds":9223372036854775807}`, `{"bind":{}}`,
	} {
		f.Add([]byte(body))
	}
	f.Fuzz(func(t *testing.T, body []byte) {
		var sent map[string]any
		_ = json.Unmarshal(body, &sent) // nothing is accepted below that is not an object
		text := func(name string) string { s, _ := sent[name].(string); return s }
		accepted := func(err error) bool {
			input, recipient := errors.AsType[*InputError], errors.AsType[*RecipientError]
			_, a := input(err)
			_, b := recipient(err)
			if err != nil && !a && !b {
				t.Errorf("%T: %v", err, err)
			}
			if err != nil && len(err.Error()) > 200 {
				t.Errorf("an error of %d bytes", len(err.Error()))
			}
			return err == nil
		}
		encodes := func(field string, decoded []byte) {
			if len(decoded) == 0 || base64.StdEncoding.EncodeToString(decoded) != text(field) {
				t.Errorf("%s is %x of %q", field, decoded, text(field))
			}
		}
		key := func(r Recipient, field string, sizes ...int) {
			block, _ := pem.Decode([]byte(text(field)))
			if block == nil {
				t.Fatalf("a key out of %q", text(field))
			}
			der, err := x509.MarshalPKIXPublicKey(r.Public)
			sum := sha256.Sum256(der)
			same, otherErr := x509.ParsePKIXPublicKey(block.Bytes)
			if err != nil || otherErr != nil || !r.Public.Equal(same) || string(der) != string(r.DER) || r.ID != hex.EncodeToString(sum[:]) {
				t.Errorf("key %s of %q", r.ID, text(field))
			}
			if bits := r.Public.N.BitLen(); !slices.Contains(sizes, bits) {
				t.Errorf("%s of %d bits", field, bits)
			}
		}
		if c, err := parseClaim(body); accepted(err) {
			within, _ := sent["tpm"].(map[string]any)
			switch {
			case c.recipient.Origin == FromNode:
				key(c.recipient, "publicKey", 2048)
				encodes("signature", c.signature)
			case c.tpm != nil:
				key(c.recipient, "recipient", 2048, 3072, 4096)
			default:
				key(c.recipient, "recipient", 3072, 4096)
			}
			encodes("mac", c.mac)
			if (c.tpm != nil) != (within != nil) || c.tpm != nil && base64.StdEncoding.EncodeToString(c.tpm.public) != within["public"] {
				t.Errorf("a TPM of %v", sent)
			}
		}
		if own, err := parseOwn(body); accepted(err) {
			key(own, "recipient", 3072, 4096)
		}
		if added, signature, err := parseAdded(body); accepted(err) {
			key(added, "publicKey", 2048)
			encodes("signature", signature)
		}
		if r, err := parseReceipt(body); accepted(err) {
			encodes("signature", r.signature)
			if r.recipient != text("recipient") || len(r.recipient) != 64 || strings.Trim(r.recipient, "0123456789abcdef") != "" {
				t.Errorf("the receipt of %q", r.recipient)
			}
		}
		if r, err := parseApproval(body); accepted(err) && (r != text("recipient") || len(r) != 64) {
			t.Errorf("the approval of %q", r)
		}
		if terms, err := parseTerms(body); accepted(err) {
			checkTerms(t, terms, sent)
		}
	})
}

// checkTerms: no enrollment permits more than its body asks for, or than any may.
func checkTerms(t *testing.T, got terms, sent map[string]any) {
	for name := range sent {
		if !slices.Contains([]string{"scope", "origin", "uses", "ttlSeconds", "bind", "approval", "ip", "note"}, name) {
			t.Errorf("the field %q has no effect", name)
		}
	}
	uses, given := sent["uses"].(float64)
	if !given {
		uses = 1
	}
	if float64(got.uses) != uses || got.uses < 1 || got.uses > MaxUses {
		t.Errorf("%d uses of %v", got.uses, sent)
	}
	if got.life < shortestLife || got.life > longestLife {
		t.Errorf("a life of %s", got.life)
	}
	if seconds, given := sent["ttlSeconds"].(float64); given && got.life != time.Duration(seconds)*time.Second {
		t.Errorf("a life of %s of %v", got.life, sent)
	}
	if got.scope != ForNode && (got.scope != ForOrganization || sent["scope"] != "organization" || got.uses != 1 || got.address.IsValid()) {
		t.Errorf("scope %q, %d uses, address %s of %v", got.scope, got.uses, got.address, sent)
	}
	approval, _ := sent["approval"].(bool)
	if got.approval != approval {
		t.Errorf("approval %t of %v", got.approval, sent)
	}
	bind, bound := sent["bind"].(map[string]any)
	recipient, _ := bind["recipient"].(string)
	ek, _ := bind["ek"].(string)
	if recipient == "" && ek == "" && bind["tpm"] == true {
		ek = AnyAllowedTPM
	}
	if got.recipient != recipient || got.tpm != ek || bound != (recipient+ek != "") || (recipient != "" || ek != AnyAllowedTPM && ek != "") && got.uses != 1 {
		t.Errorf("bound to %q and %q, %d uses, of %v", got.recipient, got.tpm, got.uses, sent)
	}
	if got.origin != FromBackend && sent["origin"] != string(got.origin) {
		t.Errorf("origin %q of %v", got.origin, sent)
	}
	if ip, _ := sent["ip"].(string); (ip != "") != got.address.IsValid() || got.address.Is4In6() || got.address.Zone() != "" {
		t.Errorf("address %s of %v", got.address, sent)
	}
}
