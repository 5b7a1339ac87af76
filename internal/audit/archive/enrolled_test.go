package archive_test

import (
	"bytes"
	"context"
	"crypto"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/orgkeys/orgkeys/internal/audit"
	"github.com/orgkeys/orgkeys/internal/audit/archive"
	"github.com/orgkeys/orgkeys/internal/audit/audittest"
	"github.com/orgkeys/orgkeys/internal/authz"
	"github.com/orgkeys/orgkeys/internal/envelope"
	"github.com/orgkeys/orgkeys/internal/orgkey"
)

// enrolling is a signed log in which keys are sealed and received.
type enrolling struct {
	audittest.SignedLog
	keys map[string]*rsa.PrivateKey
}

const claimant = "192.0.2.9"

func newEnrolling(t *testing.T) enrolling {
	t.Helper()
	return enrolling{audittest.NewSigned(t), map[string]*rsa.PrivateKey{}}
}

// event returns one that an enrollment's holder caused.
func (l enrolling) event(t audit.Type, object string, detail map[string]string) audit.Event {
	e := audit.New(t, "acme")
	e.Actor, e.Object, e.Policy, e.Detail = audit.Actor{Kind: authz.Enrollment, ID: "e-1"}, object, l.Policy, detail
	return e
}

// sealed records how a key is permitted, claimed by enrollment (if there is one) and sealed.
func (l enrolling) sealed(t *testing.T, key, enrollment string) {
	t.Helper()
	private, err := rsa.GenerateKey(rand.Reader, 2048)
	audittest.Must(t, err)
	l.keys[key] = private
	created := l.Key(audit.KeyCreated, key)
	created.Detail = map[string]string{"backend": "pkcs11", "algorithm": "rsa-2048", "fingerprint": orgkey.NewPublic(&private.PublicKey).Fingerprint()}
	sealed := l.event(audit.KeySealed, key, map[string]string{"recipient": "r-" + key, "alg": "a", "sealed": "d-" + key})
	if enrollment != "" {
		created.Detail["enrollment"], created.Detail["scope"], sealed.Detail["enrollment"] = enrollment, "node", enrollment
		permitted := l.Key(audit.EnrollmentCreated, enrollment)
		approved := l.Key(audit.EnrollmentApproved, enrollment)
		approved.Detail = map[string]string{"recipient": "r-" + key}
		l.Record(t, permitted, l.event(audit.EnrollmentClaimed, enrollment, map[string]string{"key": key, "recipient": "r-" + key, "from": claimant}), approved)
	}
	l.Record(t, created, sealed, l.event(audit.KeyDelivered, key, nil))
}

// received records a receipt for key, signed by signer, for bytes of that digest.
func (l enrolling) received(t *testing.T, key, signer, digest string) {
	t.Helper()
	head, err := l.DB.Head(t.Context())
	audittest.Must(t, err)
	text := sha256.Sum256(envelope.Delivery{Org: "acme", Origin: head.Origin, KeyID: key, Recipient: "r-" + key, SHA256: digest}.ReceiptText())
	signature, err := rsa.SignPKCS1v15(nil, l.keys[signer], crypto.SHA256, text[:])
	audittest.Must(t, err)
	l.Record(t, l.event(audit.KeyReceived, key, map[string]string{
		"recipient": "r-" + key, "sealed": digest, "answers": "2", "signature": base64.StdEncoding.EncodeToString(signature),
	}))
}

// open is archive.PublicKeys of the keys whose private halves are known here.
func (l enrolling) open(_ context.Context, ids []string) (map[string][]byte, error) {
	all := map[string][]byte{}
	for _, id := range ids {
		if private := l.keys[id]; private != nil {
			der, err := x509.MarshalPKIXPublicKey(&private.PublicKey)
			if err != nil {
				return nil, err
			}
			all[id] = der
		}
	}
	return all, nil
}

func (l enrolling) export(t *testing.T, open archive.PublicKeys) *members {
	t.Helper()
	var out bytes.Buffer
	_, err := archive.Write(t.Context(), &out, l.DB, open, t.TempDir(), "a test", nil)
	audittest.Must(t, err)
	return unpack(t, out.Bytes())
}

// saidEnrolled is what an implementation says of sealed keys, as JSON has it.
func saidEnrolled(t *testing.T, text []byte) []any {
	t.Helper()
	var v struct{ Enrolled []any }
	audittest.Must(t, json.Unmarshal(text, &v))
	return v.Enrolled
}

// both verifies an export by both implementations, which must say the same.
func (l enrolling) both(t *testing.T, m *members) []archive.Enrolled {
	t.Helper()
	packed := m.pack(t)
	report, err := verifyExport(t, packed, l.VKey(t))
	audittest.Must(t, err)
	path := filepath.Join(t.TempDir(), "export.tar.gz")
	audittest.Must(t, os.WriteFile(path, packed, 0o600))
	cmd := exec.Command("python3", "../../../contrib/verify_export.py", path, "--key", l.VKey(t), "--json")
	out, err := cmd.Output()
	if cmd.ProcessState == nil || cmd.ProcessState.ExitCode() != 3 {
		t.Fatalf("the independent implementation: %v\n%s", err, out)
	}
	ours, err := json.Marshal(map[string]any{"enrolled": report.Enrolled})
	audittest.Must(t, err)
	if a, b := saidEnrolled(t, ours), saidEnrolled(t, out); !reflect.DeepEqual(a, b) {
		t.Errorf("the implementations differ:\n%v\n%v", a, b)
	}
	return report.Enrolled
}

// Who permitted a sealed key, who claimed it from where, what went out how often,
// and that its holder signed for it, are seen in the export alone.
func TestAnExportTellsHowSealedKeysArrived(t *testing.T) {
	l := newEnrolling(t)
	l.sealed(t, "k-signed", "e-1")
	l.received(t, "k-signed", "k-signed", "d-k-signed")
	l.Record(t, l.Node(audit.NodeRegistered, "k-signed", "n-9"))
	l.sealed(t, "k-own", "")
	l.sealed(t, "k-deleted", "e-2")
	l.received(t, "k-deleted", "k-deleted", "d-k-deleted")
	l.Record(t, l.Key(audit.KeyDeleted, "k-deleted"))
	l.sealed(t, "k-used", "e-3")
	l.Record(t, l.event(audit.KeyReceived, "k-used", nil))
	l.sealed(t, "k-late", "e-4") // used, and signed for afterwards
	l.Record(t, l.event(audit.KeyReceived, "k-late", nil))
	l.received(t, "k-late", "k-late", "d-k-late")

	told := l.both(t, l.export(t, l.open))
	if len(told) != 5 {
		t.Fatalf("%d sealed keys: %+v", len(told), told)
	}
	signed, own, deleted, used, late := told[0], told[1], told[2], told[3], told[4]
	switch {
	case signed.Receipt != archive.Signed || signed.Answers != 2 || signed.From != claimant || signed.SHA256 != "d-k-signed" || signed.Recipient != "r-k-signed":
		t.Errorf("signed for: %+v", signed)
	case signed.Permitted.Actor != "u-1" || signed.Permitted.Type != audit.EnrollmentCreated || signed.Approved.Actor != "u-1" || signed.Claimed.Actor != "e-1":
		t.Errorf("who: %+v", signed)
	case signed.Scope != "node" || len(signed.Nodes) != 1 || signed.Nodes[0].IP != "192.0.2.7":
		t.Errorf("whose: %+v", signed)
	case own.Receipt != archive.None || own.Enrollment != "" || own.Permitted.Type != audit.KeyCreated || own.Scope != "organization":
		t.Errorf("an administrator's own: %+v", own)
	case deleted.Receipt != archive.Unchecked || !strings.Contains(deleted.Unchecked, "deleted"):
		t.Errorf("deleted: %+v", deleted)
	case used.Receipt != archive.Used:
		t.Errorf("used: %+v", used)
	case late.Receipt != archive.Signed || late.Answers != 2:
		t.Errorf("used, and signed for later: %+v", late)
	}
	for _, e := range l.both(t, l.export(t, nil)) { // which is of the first format
		if e.Receipt == archive.Signed || e.Received != nil && e.Receipt == archive.Unchecked && !strings.Contains(e.Unchecked, "without public keys") {
			t.Errorf("without public keys: %+v", e)
		}
	}
	// Whoever says that a key is gone gets no receipt checked.
	m := l.export(t, l.open)
	m.edit(t, "public-keys.jsonl", func(lines []string) []string {
		i := slices.IndexFunc(lines, func(line string) bool { return strings.Contains(line, "k-signed") })
		lines[i] = `{"deleted":true,"key":"k-signed"}` + "\n"
		return lines
	})
	m.relist(t)
	if told := l.both(t, m); told[0].Receipt != archive.Unchecked {
		t.Errorf("a key that is said to be gone: %+v", told[0])
	}
}

// A receipt that the key did not sign, and a public key that is missing or is
// another's, are found by both implementations.
func TestReceiptsAndPublicKeysAreNotBelieved(t *testing.T) {
	for name, c := range map[string]struct {
		receipt func(t *testing.T, l enrolling)
		tamper  func(t *testing.T, m *members)
	}{
		"signed by another key":   {receipt: func(t *testing.T, l enrolling) { l.received(t, "k-a", "k-b", "d-k-a") }},
		"signed for other bytes":  {receipt: func(t *testing.T, l enrolling) { l.received(t, "k-a", "k-a", "d-k-b") }},
		"received and not sealed": {receipt: func(t *testing.T, l enrolling) { l.Record(t, l.event(audit.KeyReceived, "k-3", nil)) }},
		"signed for twice": {receipt: func(t *testing.T, l enrolling) {
			l.received(t, "k-a", "k-a", "d-k-a")
			l.received(t, "k-a", "k-a", "d-k-a")
		}},
		"used twice": {receipt: func(t *testing.T, l enrolling) {
			l.Record(t, l.event(audit.KeyReceived, "k-a", nil), l.event(audit.KeyReceived, "k-a", nil))
		}},
		"used after it was signed for": {receipt: func(t *testing.T, l enrolling) {
			l.received(t, "k-a", "k-a", "d-k-a")
			l.Record(t, l.event(audit.KeyReceived, "k-a", nil))
		}},
		"used, and signed for twice": {receipt: func(t *testing.T, l enrolling) {
			l.Record(t, l.event(audit.KeyReceived, "k-a", nil))
			l.received(t, "k-a", "k-a", "d-k-a")
			l.received(t, "k-a", "k-a", "d-k-a")
		}},
		"used, and signed for by another key": {receipt: func(t *testing.T, l enrolling) {
			l.Record(t, l.event(audit.KeyReceived, "k-a", nil))
			l.received(t, "k-a", "k-b", "d-k-a")
		}},
		"sealed by no enrollment": {receipt: func(t *testing.T, l enrolling) {
			l.Record(t, l.event(audit.KeySealed, "k-3", map[string]string{"enrollment": "e-9"}))
		}},
		"swapped public keys": {tamper: func(t *testing.T, m *members) { m.edit(t, "public-keys.jsonl", swapKeys) }},
		"a public key is missing": {tamper: func(t *testing.T, m *members) {
			m.edit(t, "public-keys.jsonl", func(lines []string) []string { return lines[:len(lines)-1] })
		}},
		"one that is none": {tamper: func(t *testing.T, m *members) {
			m.edit(t, "public-keys.jsonl", at(1, `"publicKey":"MII`, `"publicKey":"AAA`))
		}},
		"the member is missing": {tamper: func(t *testing.T, m *members) { m.remove(t, "public-keys.jsonl") }},
		"of the first format": {tamper: func(t *testing.T, m *members) {
			m.manifest(t, func(x *archive.Manifest) { x.Format = "orgkeys-export/1" })
		}},
		"of the second by its name": {tamper: func(t *testing.T, m *members) {
			m.remove(t, "public-keys.jsonl")
			m.manifest(t, func(x *archive.Manifest) { x.Format = "orgkeys-export/2" })
		}},
	} {
		t.Run(name, func(t *testing.T) {
			l := newEnrolling(t)
			l.sealed(t, "k-a", "e-1")
			l.sealed(t, "k-b", "e-2")
			if c.receipt != nil {
				c.receipt(t, l)
			} else {
				l.received(t, "k-a", "k-a", "d-k-a")
			}
			m := l.export(t, l.open)
			if c.tamper != nil {
				c.tamper(t, m)
				m.relist(t)
			}
			packed := m.pack(t)
			if _, err := verifyExport(t, packed, l.VKey(t)); err == nil {
				t.Error("it verifies")
			}
			if said, ok := byPython(t, packed, l.VKey(t)); ok {
				t.Errorf("the independent implementation says %q", said)
			}
		})
	}
}

// swapKeys exchanges the public keys of two lines, not their IDs.
func swapKeys(lines []string) []string {
	type line struct {
		Key       string `json:"key"`
		PublicKey string `json:"publicKey"`
	}
	var a, b line
	last := len(lines) - 1
	if json.Unmarshal([]byte(lines[last-1]), &a) != nil || json.Unmarshal([]byte(lines[last]), &b) != nil || a.PublicKey == "" || b.PublicKey == "" {
		return lines
	}
	lines[last-1] = strings.Replace(lines[last-1], a.PublicKey, b.PublicKey, 1)
	lines[last] = strings.Replace(lines[last], b.PublicKey, a.PublicKey, 1)
	return lines
}
