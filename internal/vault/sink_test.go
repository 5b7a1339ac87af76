package vault_test

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/x509"
	"encoding/base64"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"net/http"
	"os"
	"strings"
	"sync"
	"testing"

	"github.com/go-json-experiment/json"
	"github.com/google/uuid"
	"golang.org/x/mod/sumdb/tlog"

	"github.com/orgkeys/orgkeys/internal/audit"
	"github.com/orgkeys/orgkeys/internal/vault"
)

// origin names a log of this test's own; the checkpoint of the one before is removed.
func freshLog(t testing.TB) string {
	t.Helper()
	if _, err := root(t).Logical().DeleteWithContext(t.Context(), "orgkeys-state/metadata/checkpoint"); err != nil {
		t.Fatal(err)
	}
	return "orgkeys.test/" + uuid.NewString()
}

func checkpointAt(origin string, size int64) audit.Checkpoint {
	return audit.Checkpoint{Origin: origin, Size: size, Root: tlog.RecordHash(fmt.Appendf(nil, "%s %d", origin, size))}
}

// appendAll does what the log does with a sink.
func appendAll(t *testing.T, s audit.Sink, list []audit.Entry, c audit.Checkpoint) error {
	t.Helper()
	receipts, err := s.Append(t.Context(), list, c)
	if err == nil && len(receipts) != len(list) {
		t.Errorf("%d receipts for %d events", len(receipts), len(list))
	}
	return err
}

// entries are n events from index on, with text that JSON must escape.
func entries(t testing.TB, index int64, n int) []audit.Entry {
	t.Helper()
	list := make([]audit.Entry, n)
	for i := range list {
		e := audit.New(audit.KeyCreated, "acme")
		e.Detail = map[string]string{"note": `"quoted" \ <ü>`}
		r, err := e.Encode()
		if err != nil {
			t.Fatal(err)
		}
		list[i] = audit.Entry{Index: index + int64(i), Leaf: r.Leaf}
	}
	return list
}

func auditFile(t testing.TB) []byte {
	t.Helper()
	b, err := os.ReadFile(server.AuditFile)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// inClear counts the lines of Vault's audit file, of the type given, that hold
// the event as one flat string.
func inClear(t testing.TB, file []byte, kind string, leaf []byte) int {
	t.Helper()
	count := 0
	for line := range bytes.Lines(file) {
		var entry struct {
			Type    string `json:"type"`
			Request struct {
				Data struct {
					Batch []struct {
						Event string `json:"event"`
					} `json:"batch_input"`
				} `json:"data"`
			} `json:"request"`
		}
		if !bytes.Contains(line, []byte("orgkeys-audit/sign/receipt")) {
			continue
		}
		if err := json.Unmarshal(line, &entry); err != nil {
			t.Fatal(err)
		}
		for _, e := range entry.Request.Data.Batch {
			if entry.Type == kind && e.Event == string(leaf) {
				count++
			}
		}
	}
	return count
}

func TestEventIsInVaultsAuditFileBeforeTheReceiptArrives(t *testing.T) {
	origin := freshLog(t)
	proxy, c := through(t)
	list := entries(t, 0, 3)
	checked := false
	proxy.After(func(r *http.Response) error {
		if strings.HasSuffix(r.Request.URL.Path, "/sign/receipt") {
			checked = true
			file := auditFile(t)
			for _, e := range list {
				if inClear(t, file, "request", e.Leaf) != 1 {
					t.Errorf("event %d is not in the audit file as the answer leaves Vault", e.Index)
				}
			}
		}
		return nil
	})
	if err := appendAll(t, c.Sink(), list, checkpointAt(origin, 3)); err != nil {
		t.Fatal(err)
	}
	if !checked {
		t.Error("no receipt passed the proxy")
	}
	if !bytes.Contains(auditFile(t), []byte(`"checkpoint":"`+origin)) {
		t.Error("the checkpoint is not in clear in the audit file")
	}
}

func TestReceiptsAreKeptInOrderAndVerifyOffline(t *testing.T) {
	c := open(t)
	list := entries(t, 5, 230) // more than one call takes
	kept, err := c.Sink().Append(t.Context(), list, checkpointAt(freshLog(t), 235))
	if err != nil {
		t.Fatal(err)
	}
	keys, err := c.ReceiptKeys(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if len(kept) != len(list) {
		t.Fatalf("%d receipts for %d events", len(kept), len(list))
	}
	for i, r := range kept {
		if err := keys.Verify(list[i].Leaf, r); err != nil {
			t.Error(err)
		}
	}
	good, leaf := kept[0], list[0].Leaf
	tests := map[string]struct {
		leaf, receipt []byte
	}{
		"another event's":            {list[1].Leaf, good},
		"a changed event":            {append(bytes.Clone(leaf), ' '), good},
		"a key that is not known":    {leaf, bytes.Replace(good, []byte("vault:v1:"), []byte("vault:v9:"), 1)},
		"cut off":                    {leaf, good[:len(good)-8]},
		"with something behind":      {leaf, append(bytes.Clone(good), '\n')},
		"empty":                      {leaf, nil},
		"not base64's canonical one": {leaf, append(bytes.Clone(good[:len(good)-3]), good[len(good)-3]^1, '=', '=')},
	}
	for name, tt := range tests {
		if err := keys.Verify(tt.leaf, tt.receipt); !errors.Is(err, audit.ErrReceipt) {
			t.Errorf("%s: got %v, want ErrReceipt", name, err)
		}
	}
	other, _, err := ed25519.GenerateKey(nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := (audit.ReceiptKeys{1: other}).Verify(leaf, good); !errors.Is(err, audit.ErrReceipt) {
		t.Errorf("under another key: got %v", err)
	}
}

func TestReceiptsOfARotatedKeyVerify(t *testing.T) {
	origin := freshLog(t)
	sink := open(t).Sink()
	for i := range int64(2) {
		if err := appendAll(t, sink, entries(t, i, 1), checkpointAt(origin, i+1)); err != nil {
			t.Fatal(err)
		}
		if _, err := root(t).Logical().WriteWithContext(t.Context(), "orgkeys-audit/keys/receipt/rotate", nil); err != nil {
			t.Fatal(err)
		}
	}
}

func TestForgedReceiptIsNotAnAcknowledgement(t *testing.T) {
	origin := freshLog(t)
	proxy, c := through(t)
	proxy.Before(func(w http.ResponseWriter, r *http.Request) bool {
		if !strings.HasSuffix(r.URL.Path, "/sign/receipt") {
			return true
		}
		signature := base64.StdEncoding.EncodeToString(make([]byte, ed25519.SignatureSize))
		fmt.Fprintf(w, `{"data":{"batch_results":[{"signature":"vault:v1:%s"}]}}`, signature)
		return false
	})
	if err := appendAll(t, c.Sink(), entries(t, 0, 1), checkpointAt(origin, 1)); !errors.Is(err, audit.ErrReceipt) {
		t.Errorf("got %v, want ErrReceipt", err)
	}
}

func TestCheckpointIsKept(t *testing.T) {
	origin := freshLog(t)
	sink := open(t).Sink()
	if held, err := sink.Last(t.Context()); err != nil || held.Size != 0 {
		t.Fatalf("a fresh Vault holds %+v, %v", held, err)
	}
	for size := int64(1); size <= 3; size++ {
		if err := appendAll(t, sink, entries(t, size-1, 1), checkpointAt(origin, size)); err != nil {
			t.Fatal(err)
		}
		if held, err := open(t).Sink().Last(t.Context()); err != nil || held != checkpointAt(origin, size) {
			t.Errorf("another sink reads %+v, %v", held, err)
		}
	}
}

// A replica that was stopped while others went on, or whose log is not the one
// that Vault knows, hears so until it has looked again.
func TestCheckpointNeverMovesBackByALateWriter(t *testing.T) {
	origin := freshLog(t)
	early, late := open(t).Sink(), open(t).Sink()
	for _, s := range []*vault.Sink{early, late} {
		if _, err := s.Last(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	if err := appendAll(t, early, entries(t, 0, 5), checkpointAt(origin, 5)); err != nil {
		t.Fatal(err)
	}
	for range 2 { // also when it tries again
		if err := second(late.Append(t.Context(), entries(t, 0, 3), checkpointAt(origin, 3))); err == nil || !strings.Contains(err.Error(), "at size 5, is ahead of size 3") {
			t.Errorf("a late writer heard %v", err)
		}
		if held, err := open(t).Sink().Last(t.Context()); err != nil || held.Size != 5 {
			t.Fatalf("Vault holds %+v, %v", held, err)
		}
	}
	if err := appendAll(t, late, entries(t, 0, 5), checkpointAt(origin, 5)); err != nil {
		t.Errorf("what Vault holds already: %v", err)
	}
	if err := appendAll(t, late, entries(t, 5, 1), checkpointAt(origin, 6)); err != nil {
		t.Errorf("when it has caught up: %v", err)
	}
	for _, size := range []int64{3, 6, 9} {
		if err := second(early.Append(t.Context(), entries(t, 5, 1), checkpointAt("orgkeys.test/fork", size))); err == nil {
			t.Errorf("a checkpoint of another log was accepted, at size %d", size)
		}
	}
}

func TestReplicasAppendAtOnce(t *testing.T) {
	origin := freshLog(t)
	list := entries(t, 0, 10)
	var wg sync.WaitGroup
	for range 4 {
		sink := open(t).Sink()
		wg.Go(func() {
			for i := range int64(10) {
				err := second(sink.Append(t.Context(), list[i:i+1], checkpointAt(origin, i+1)))
				if err != nil && !strings.Contains(err.Error(), "is ahead of") {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	if held, err := open(t).Sink().Last(t.Context()); err != nil || held.Size != 10 {
		t.Errorf("Vault holds %+v, %v", held, err)
	}
}

func TestAcceptedRollbackStartsOver(t *testing.T) {
	origin := freshLog(t)
	if err := appendAll(t, open(t).Sink(), entries(t, 0, 5), checkpointAt(origin, 5)); err != nil {
		t.Fatal(err)
	}
	operator := open(t).Sink()
	back := audit.Rollback{From: checkpointAt(origin, 5).Text(), To: checkpointAt(origin, 2).Text(), Reason: "restored a backup"}
	if err := operator.AcceptRollback(t.Context(), back); err != nil {
		t.Fatal(err)
	}
	service := open(t).Sink()
	if held, err := service.Last(t.Context()); err != nil || held.Size != 0 || held.Origin != origin {
		t.Errorf("afterwards Vault holds %+v, %v", held, err)
	}
	if err := appendAll(t, service, entries(t, 0, 3), checkpointAt(origin, 3)); err != nil {
		t.Error(err)
	}
	if held, err := service.Last(t.Context()); err != nil || held.Size != 3 {
		t.Errorf("Vault holds %+v, %v", held, err)
	}
}

// What somebody did to the checkpoint is told from a fresh Vault and from a
// Vault that does not answer, and an accepted rollback starts over.
func TestALostCheckpointIsNoFreshVault(t *testing.T) {
	const path = "orgkeys-state/data/checkpoint"
	defer freshLog(t)
	write := func(data map[string]any) func(t *testing.T) error {
		return func(t *testing.T) error {
			return second(root(t).Logical().WriteWithContext(t.Context(), path, map[string]any{"options": map[string]any{"cas": 1}, "data": data}))
		}
	}
	for name, lose := range map[string]func(t *testing.T) error{
		"deleted": func(t *testing.T) error { return second(root(t).Logical().DeleteWithContext(t.Context(), path)) },
		"destroyed": func(t *testing.T) error {
			return second(root(t).Logical().WriteWithContext(t.Context(), "orgkeys-state/destroy/checkpoint", map[string]any{"versions": []int{1}}))
		},
		"without its end": write(map[string]any{"checkpoint": strings.TrimSuffix(checkpointAt("x", 1).Text(), "\n")}),
		"a number":        write(map[string]any{"checkpoint": 5}),
		"another field":   write(map[string]any{"other": "x"}),
	} {
		t.Run(name, func(t *testing.T) {
			origin := freshLog(t)
			c := open(t)
			sink := c.Sink()
			if err := appendAll(t, sink, entries(t, 0, 1), checkpointAt(origin, 1)); err != nil {
				t.Fatal(err)
			}
			if err := lose(t); err != nil {
				t.Fatal(err)
			}
			for _, s := range []*vault.Sink{sink, open(t).Sink()} {
				if _, err := s.Last(t.Context()); !errors.Is(err, audit.ErrCheckpointLost) {
					t.Errorf("got %v, want ErrCheckpointLost", err)
				}
			}
			for _, s := range []*vault.Sink{sink, open(t).Sink()} {
				for range 2 { // also when it tries again
					if err := second(s.Append(t.Context(), entries(t, 1, 1), checkpointAt(origin, 2))); !errors.Is(err, audit.ErrCheckpointLost) {
						t.Errorf("a sink went on: %v", err)
					}
				}
			}
			if p := problems(c); p != "" {
				t.Errorf("what only an accepted rollback mends keeps it from being accepted: %s", p)
			}
			if err := sink.AcceptRollback(t.Context(), audit.Rollback{To: checkpointAt(origin, 1).Text()}); err != nil {
				t.Fatal(err)
			}
			if err := appendAll(t, open(t).Sink(), entries(t, 0, 2), checkpointAt(origin, 2)); err != nil {
				t.Errorf("afterwards: %v", err)
			}
		})
	}
}

func TestVaultsAuditFileNeverHoldsAPrivateKey(t *testing.T) {
	c := open(t)
	key := mustGenerate(t, c)
	der := x509.MarshalPKCS1PrivateKey(key)
	pkcs8, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	text := pem.EncodeToMemory(&pem.Block{Type: "RSA PRIVATE KEY", Bytes: der})
	quoted, err := json.Marshal(string(text))
	if err != nil {
		t.Fatal(err)
	}
	prime := key.Primes[0].Bytes()
	forms := map[string][]byte{
		"PEM header":           []byte("PRIVATE KEY-----"),
		"PEM":                  text,
		"PEM in JSON":          quoted[1 : len(quoted)-1],
		"a line of PEM":        bytes.Split(text, []byte("\n"))[9],
		"DER":                  der,
		"DER in base64":        []byte(base64.StdEncoding.EncodeToString(der)),
		"DER in base64, URLs":  []byte(base64.RawURLEncoding.EncodeToString(der)),
		"DER in hex":           []byte(hex.EncodeToString(der)),
		"PKCS#8 in base64":     []byte(base64.StdEncoding.EncodeToString(pkcs8)),
		"a prime":              prime,
		"a prime in hex":       []byte(hex.EncodeToString(prime)),
		"a prime in base64":    []byte(base64.RawStdEncoding.EncodeToString(prime)[:160]),
		"a prime in decimal":   []byte(key.Primes[0].String()),
		"the exponent in hex":  []byte(hex.EncodeToString(key.D.Bytes())),
		"PEM, its base64 once": []byte(base64.StdEncoding.EncodeToString(text)),
	}
	file := auditFile(t)
	if !bytes.Contains(file, []byte("orgkeys/export/encryption-key/")) {
		t.Fatal("the audit file does not show the export, so this test shows nothing")
	}
	for name, form := range forms {
		if planted := append(bytes.Clone(file), form...); !bytes.Contains(planted, form) {
			t.Errorf("%s: the search does not find a planted copy", name)
		}
		if bytes.Contains(file, form) {
			t.Errorf("the audit file holds the private key: %s", name)
		}
	}
}

func TestCorrelationTiesVaultsEntriesToOurs(t *testing.T) {
	c := open(t)
	name, request := uuid.NewString(), "request-"+uuid.NewString()
	withID := map[string]map[string]bool{name: {}, request: {}}
	list := audited(t, func() {
		for _, ctx := range []context.Context{t.Context(), vault.WithCorrelation(t.Context(), request)} {
			k, err := c.Keystore().Create(ctx, name)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := k.Export(ctx); err != nil {
				t.Fatal(err)
			}
			if err := k.Destroy(ctx); err != nil {
				t.Fatal(err)
			}
		}
	})
	for _, e := range list {
		for _, id := range e.Request.Headers["x-correlation-id"] {
			if withID[id] != nil {
				withID[id][e.Request.Operation+" "+strings.Split(e.Request.Path, "/")[1]] = true
			}
		}
	}
	for id, seen := range withID {
		for _, want := range []string{"update keys", "read export", "delete keys", "read keys"} {
			if !seen[want] {
				t.Errorf("%s: no audit entry for %q carries it; there are %v", id, want, seen)
			}
		}
	}
	if ctx := vault.WithCorrelation(t.Context(), "a\r\nX-Vault-Token: b"); ctx != t.Context() {
		t.Error("an ID that is not one was taken")
	}
}
