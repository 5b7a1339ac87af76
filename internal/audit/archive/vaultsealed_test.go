package archive_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/orgkeys/orgkeys/internal/audit"
	"github.com/orgkeys/orgkeys/internal/audit/archive"
	"github.com/orgkeys/orgkeys/internal/audit/audittest"
	"github.com/orgkeys/orgkeys/internal/audit/verify"
)

// sealedLine is an entry of Vault's audit file about a key that leaves wrapped, at
// a second, as a real one has it. Its request's ID is made of all that it says.
func sealedLine(second int, operation, path, response, failure string) string {
	id := fmt.Sprintf("%d-%s-%s", second, operation, path)
	return fmt.Sprintf(`{"time":%q,"type":"response","error":%q,"request":{"id":%q,"operation":%q,"path":"orgkeys-sealed/%s"},"response":{%s}}`+"\n",
		time.Unix(int64(1e9+second), 0).UTC().Format(time.RFC3339Nano), failure, id, operation, path, response)
}

func imports(second int, recipient string) string {
	return sealedLine(second, "update", "keys/"+recipient+"/import", "", "")
}

func leaves(second int, recipient, key string) string {
	return sealedLine(second, "read", "byok-export/"+recipient+"/"+key+"/1", `"data":{"keys":{"1":"hmac-sha256:00"}}`, "")
}

// internal/e2e has the same with a real Vault and a real thief.
func TestKeysThatLeftVaultAreCountedAgainstTheLog(t *testing.T) {
	e := audittest.NewSigned(t)
	for i, name := range []string{"a", "b"} {
		created := audit.New(audit.KeyCreated, "acme")
		created.Object = fmt.Sprintf("key-%d", i)
		sealed := audit.New(audit.KeySealed, "acme")
		sealed.Object, sealed.Detail = created.Object, map[string]string{"attempt": name}
		e.Record(t, created)
		e.Record(t, sealed)
	}
	packed := export(t, e)
	var events []string
	index := map[string]int64{}
	for i, l := range unpack(t, packed).leaves(t) {
		events = append(events, string(l))
		for _, name := range []string{"a", "b"} {
			if strings.Contains(string(l), `"attempt":"`+name+`"`) {
				index[name] = int64(i)
			}
		}
	}
	log := vaultLine(t, 99, "response", "", events...)
	honest := imports(1, "ra") + leaves(2, "ra", "a") + imports(3, "rb") + leaves(4, "rb", "b")
	for _, c := range []struct {
		name, file string
		accused    string // what the problem names; empty: nobody
		index      int64
		unknown    int
	}{
		{"an honest run", honest, "", 0, 0},
		{"two devices, whose entries are the same", honest + honest, "", 0, 0},
		{"an attempt that failed after its export", honest + imports(5, "rc") + leaves(6, "rc", "c"), "", 0, 1},
		{"an attempt that failed before its export", honest + imports(5, "rc"), "", 0, 0},
		{"an export that Vault refused", honest + sealedLine(5, "read", "byok-export/rt/a/1", "", "permission denied"), "", 0, 0},
		{"an export of what was gone", honest + sealedLine(5, "read", "byok-export/rt/a/1", "", ""), "", 0, 0},
		{"an export that HTTP asked for again", honest + leaves(5, "ra", "a"), "", 0, 0},
		{"a request whose answer never left", honest + strings.Replace(leaves(5, "rt", "a"), `"type":"response"`, `"type":"request"`, 1), "", 0, 0},
		{"blanks in the place of keys whose deletion was interrupted", honest + sealedLine(5, "delete", "keys/a", "", "error deleting key \"a\" archive") + sealedLine(6, "update", "keys/a", "", "") + sealedLine(7, "update", "keys/a/config", "", "") +
			sealedLine(8, "delete", "keys/a", "", "") + sealedLine(9, "update", "keys/ra", "", "") + sealedLine(10, "read", "byok-export/ra/a/1", "", "key is not exportable"), "", 0, 0},
		{"a recipient of a thief's", honest + imports(5, "rt") + leaves(6, "rt", "a"), "key key-0 (a in Vault) left Vault to two recipients", index["a"], 0},
		{"a thief who is first", imports(0, "rt") + leaves(0, "rt", "b") + honest, "key key-1 (b in Vault)", index["b"], 0},
		{"a thief of all", honest + imports(5, "rt") + leaves(6, "rt", "a") + leaves(7, "rt", "b"), "key key-0 (a in Vault) left Vault to two recipients, at audit.log:2 and at audit.log:6; key key-1", index["a"], 0},
		{"another recipient under the right one's name", imports(5, "ra") + honest, "under which 2 recipients were imported", index["a"], 0},
		{"a recipient whose private half is in Vault, and leaves it", honest + imports(5, "rt") + leaves(6, "rt", "rb"), "left Vault at audit.log:4 to a key that left Vault itself", index["b"], 1},
		{"a key of no event, to two", honest + leaves(5, "ra", "c") + leaves(6, "rt", "c"), "a key that the log does not hold (c in Vault)", -1, 1},
	} {
		t.Run(c.name, func(t *testing.T) {
			vault := &archive.VaultFile{}
			if err := vault.Read("audit.log", strings.NewReader(c.file+log)); err != nil {
				t.Fatal(err)
			}
			report, err := archive.Verify(context.Background(), bytes.NewReader(packed), []string{e.VKey(t)}, archive.Outside{Vault: vault}, nil)
			var problem *verify.Problem
			switch {
			case c.accused == "" && (err != nil || len(report.Vault.Sealed.Unknown) != c.unknown || report.Vault.Sealed.Delivered != 2):
				t.Errorf("%v, %+v", err, report.Vault)
			case c.accused != "" && (!errors.As(err, &problem) || problem.Index != c.index || !strings.Contains(err.Error(), c.accused)):
				t.Errorf("found %v, want %q at event %d", err, c.accused, c.index)
			}
		})
	}
}
