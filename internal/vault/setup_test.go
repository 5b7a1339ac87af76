package vault_test

import (
	"bufio"
	"context"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/go-json-experiment/json"
	"github.com/hashicorp/vault/api"

	"github.com/orgkeys/orgkeys/internal/orgkey"
	"github.com/orgkeys/orgkeys/internal/vault"
	"github.com/orgkeys/orgkeys/internal/vault/vaulttest"
)

// auditEntry is what the tests read of a line of Vault's audit file.
type auditEntry struct {
	Type    string `json:"type"`
	Error   string `json:"error"`
	Request struct {
		Operation string              `json:"operation"`
		Path      string              `json:"path"`
		Headers   map[string][]string `json:"headers"`
	} `json:"request"`
}

// audited returns the entries that Vault's audit file got while do ran.
func audited(t *testing.T, do func()) []auditEntry {
	t.Helper()
	f, err := os.Open(server.AuditFile)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.Seek(0, 2); err != nil {
		t.Fatal(err)
	}
	do()
	var entries []auditEntry
	lines := bufio.NewScanner(f)
	lines.Buffer(nil, 16<<20)
	for lines.Scan() {
		var e auditEntry
		if err := json.Unmarshal(lines.Bytes(), &e); err != nil {
			t.Fatal(err)
		}
		entries = append(entries, e)
	}
	return entries
}

func TestSecondSetupChangesNothing(t *testing.T) {
	dir := filepath.Join(server.Dir, "credentials") // TestMain had the first run write it
	before := files(t, dir)
	var output string
	entries := audited(t, func() {
		var err error
		if output, err = server.Setup(t.Context(), "--credentials", dir); err != nil {
			t.Fatal(err)
		}
	})
	if len(entries) < 10 {
		t.Fatalf("the audit file shows %d entries: the set-up did not look", len(entries))
	}
	looking := []string{"sys/policies/acl/orgkeys-setup", "auth/token/create", "auth/approle/role/orgkeys/secret-id/lookup"}
	for _, e := range entries {
		if e.Request.Operation != "read" && !slices.Contains(looking, e.Request.Path) {
			t.Errorf("the second run did %s %s", e.Request.Operation, e.Request.Path)
		}
	}
	if output != "vault/setup: this Vault is as orgkeys needs it\n" {
		t.Errorf("the second run said:\n%s", output)
	}
	if after := files(t, dir); !slices.Equal(before, after) {
		t.Error("the second run replaced credentials")
	}
}

// files returns the contents of a directory's files, and fails the test if one
// can be read by others.
func files(t *testing.T, dir string) []string {
	t.Helper()
	list, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var contents []string
	for _, f := range list {
		info, err := f.Info()
		if err != nil {
			t.Fatal(err)
		}
		if info.Mode().Perm() != 0o600 {
			t.Errorf("%s has mode %04o", f.Name(), info.Mode().Perm())
		}
		b, err := os.ReadFile(filepath.Join(dir, f.Name()))
		if err != nil {
			t.Fatal(err)
		}
		contents = append(contents, f.Name()+" "+string(b))
	}
	return contents
}

func TestSetupRepairsWhatWasLoosened(t *testing.T) {
	sys := root(t).Sys()
	if err := sys.PutPolicyWithContext(t.Context(), "orgkeys-service", `path "*" { capabilities = ["read"] }`); err != nil {
		t.Fatal(err)
	}
	if err := second(root(t).Logical().WriteWithContext(t.Context(), "sys/mounts/orgkeys-audit/tune", map[string]any{"audit_non_hmac_request_keys": "other"})); err != nil {
		t.Fatal(err)
	}
	if problems(open(t)) == "" {
		t.Error("the check at start found nothing to repair")
	}
	if _, err := server.Setup(t.Context()); err != nil {
		t.Fatal(err)
	}
	if p := problems(open(t)); p != "" {
		t.Errorf("after the set-up the check at start still finds: %s", p)
	}
}

func TestSetupRepairsTheRole(t *testing.T) {
	const role = "auth/approle/role/orgkeys"
	for field, loosened := range map[string]any{
		"token_type": "batch", "token_period": "24h", "token_explicit_max_ttl": 60, "token_num_uses": 7, "secret_id_num_uses": 1,
		"token_max_ttl": "720h", "token_policies": []string{"orgkeys-service", "orgkeys-reaper", "default"},
	} {
		t.Run(field, func(t *testing.T) {
			sound := read(t, role)
			if field == "token_type" { // Vault refuses a batch token with a number of uses or a period
				loosened = "default-batch"
			}
			if err := second(root(t).Logical().WriteWithContext(t.Context(), role, map[string]any{field: loosened})); err != nil {
				t.Fatal(err)
			}
			if reflect.DeepEqual(read(t, role), sound) {
				t.Fatal("nothing was loosened")
			}
			if output, err := server.Setup(t.Context()); err != nil || !strings.Contains(output, "wrote role orgkeys") {
				t.Errorf("the set-up said %q, %v", output, err)
			}
			if now := read(t, role); !reflect.DeepEqual(now, sound) {
				t.Errorf("the role is %v, not %v", now, sound)
			}
		})
	}
}

func read(t *testing.T, path string) map[string]any {
	t.Helper()
	s, err := root(t).Logical().ReadWithContext(t.Context(), path)
	if err != nil || s == nil {
		t.Fatal(s, err)
	}
	return s.Data
}

// A mount of the same name that somebody else uses is refused as it is.
func TestSetupLeavesAnotherKVAlone(t *testing.T) {
	sys, logical := root(t).Sys(), root(t).Logical()
	if err := sys.RemountWithContext(t.Context(), "orgkeys-state", "set-aside"); err != nil {
		t.Fatal(err)
	}
	defer func() {
		ctx := context.WithoutCancel(t.Context())
		if err := errors.Join(sys.UnmountWithContext(ctx, "orgkeys-state"), sys.RemountWithContext(ctx, "set-aside", "orgkeys-state")); err != nil {
			t.Error(err)
		}
	}()
	if err := sys.MountWithContext(t.Context(), "orgkeys-state", &api.MountInput{Type: "kv", Options: map[string]string{"version": "1"}}); err != nil {
		t.Fatal(err)
	}
	theirs := map[string]any{"a": "b"}
	if err := second(logical.WriteWithContext(t.Context(), "orgkeys-state/config", theirs)); err != nil {
		t.Fatal(err)
	}
	if output, err := server.Setup(t.Context()); err == nil || !strings.Contains(output, "not version 2 of kv") {
		t.Errorf("the set-up said %q, %v", output, err)
	}
	if now := read(t, "orgkeys-state/config"); !reflect.DeepEqual(now, theirs) {
		t.Errorf("their secret is %v now", now)
	}
}

// What a file from before Vault was set up anew holds is replaced.
func TestSetupReplacesStaleCredentials(t *testing.T) {
	dir := t.TempDir()
	for _, name := range []string{"role_id", "secret_id"} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte("11111111-2222-3333-4444-555555555555"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	stale := func(c *vault.Config) {
		c.Login = &vault.AppRole{RoleIDFile: filepath.Join(dir, "role_id"), SecretIDFile: filepath.Join(dir, "secret_id")}
	}
	config := vault.Config{Address: server.Address, Log: slog.New(slog.DiscardHandler)}
	stale(&config)
	if _, err := vault.Open(t.Context(), config); !errors.Is(err, vault.ErrLogin) || !strings.Contains(err.Error(), "vault/setup --credentials") {
		t.Errorf("with stale credentials: %v", err)
	}
	if output, err := server.Setup(t.Context(), "--credentials", dir); err != nil || strings.Count(output, "wrote "+dir) != 2 {
		t.Fatalf("the set-up said %q, %v", output, err)
	}
	if p := problems(open(t, stale)); p != "" {
		t.Errorf("with what the set-up wrote: %s", p)
	}
}

// A file that holds the other kind than was asked for is replaced, and what was
// asked for stays.
func TestSetupWritesTheKindOfCredentialAskedFor(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "secret_id")
	for _, step := range []struct {
		args  []string
		wrote bool
	}{
		{nil, true}, {nil, false}, {[]string{"--wrap", "5m"}, true}, {[]string{"--wrap", "5m"}, false}, {nil, true},
	} {
		output, err := server.Setup(t.Context(), append([]string{"--credentials", dir}, step.args...)...)
		if err != nil {
			t.Fatal(err)
		}
		b, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		if strings.Contains(output, "wrote "+file) != step.wrote || strings.HasPrefix(string(b), "hvs.") != (step.args != nil) {
			t.Errorf("%v: said %q, and the file begins with %.4s", step.args, output, b)
		}
	}
}

// The service's user owns its directory, and root runs the set-up.
func TestSetupGivesCredentialsToWhoseDirectoryItIs(t *testing.T) {
	if os.Getuid() != 0 {
		t.Log("files of another user's are checked where root runs the tests; here they are the caller's own")
	}
	dir, owner := t.TempDir(), os.Getuid()
	if os.Getuid() == 0 {
		owner = 12345
		if err := os.Chown(dir, owner, owner); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := server.Setup(t.Context(), "--credentials", dir); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"role_id", "secret_id"} {
		info, err := os.Stat(filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		if stat := info.Sys().(*syscall.Stat_t); int(stat.Uid) != owner || info.Mode().Perm() != 0o600 {
			t.Errorf("%s: owner %d, mode %04o", name, stat.Uid, info.Mode().Perm())
		}
	}
}

// What is in the way at a path is named.
func TestSetupNamesWhatIsInTheWay(t *testing.T) {
	v, err := vaulttest.Start(t.Context(), t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := v.Stop(); err != nil {
			t.Error(err)
		}
	}()
	client, err := v.Client(v.RootToken)
	if err != nil {
		t.Fatal(err)
	}
	refused := func(want string) {
		t.Helper()
		if output, err := v.Setup(t.Context()); err == nil || !strings.Contains(output, want) {
			t.Errorf("the set-up said %q, %v; want %q", output, err, want)
		}
	}
	sys := client.Sys()
	if err := sys.MountWithContext(t.Context(), "orgkeys/sub", &api.MountInput{Type: "transit"}); err != nil {
		t.Fatal(err)
	}
	refused("orgkeys/ cannot be mounted")
	if err := sys.UnmountWithContext(t.Context(), "orgkeys/sub"); err != nil {
		t.Fatal(err)
	}
	if err := sys.EnableAuthWithOptionsWithContext(t.Context(), "approle", &api.EnableAuthOptions{Type: "userpass"}); err != nil {
		t.Fatal(err)
	}
	refused("auth/approle is a login of another type")
	if err := sys.DisableAuthWithContext(t.Context(), "approle"); err != nil {
		t.Fatal(err)
	}
	if _, err := v.Setup(t.Context()); err != nil {
		t.Error(err)
	}
	if err := sys.SealWithContext(t.Context()); err != nil {
		t.Fatal(err)
	}
	if output, err := v.RunSetup(t.Context(), v.RootToken); err == nil || !strings.Contains(output, "is sealed or cannot be reached") {
		t.Errorf("of a sealed Vault it said %q, %v", output, err)
	}
}

func problems(c *vault.Client) string {
	var all []string
	for _, f := range c.Check(context.Background()) {
		all = append(all, f.String())
	}
	return strings.Join(all, "\n")
}

func TestDeviceWithLogRawIsRefused(t *testing.T) {
	sys := root(t).Sys()
	if err := sys.EnableAuditWithOptionsWithContext(t.Context(), "raw", &api.EnableAuditOptions{
		Type: "file", Options: map[string]string{"file_path": filepath.Join(t.TempDir(), "raw.log"), "log_raw": "T"},
	}); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := sys.DisableAuditWithContext(context.WithoutCancel(t.Context()), "raw"); err != nil {
			t.Error(err)
		}
	}()
	if output, err := server.Setup(t.Context()); err == nil || !strings.Contains(output, "log_raw") {
		t.Errorf("the set-up said %q, %v", output, err)
	}
	if p := problems(open(t)); !strings.Contains(p, "audit device raw/ has log_raw=T") {
		t.Errorf("the check at start found: %q", p)
	}
}

func TestVaultWithoutAuditDeviceIsRefused(t *testing.T) {
	sys := root(t).Sys()
	c := open(t)
	if err := sys.DisableAuditWithContext(t.Context(), "file"); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := sys.EnableAuditWithOptionsWithContext(context.WithoutCancel(t.Context()), "file", &api.EnableAuditOptions{
			Type: "file", Options: map[string]string{"file_path": server.AuditFile},
		}); err != nil {
			t.Error(err)
		}
	}()
	if output, err := server.Setup(t.Context()); err == nil || !strings.Contains(output, "vault audit enable file") {
		t.Errorf("the set-up said %q, %v", output, err)
	}
	if p := problems(c); !strings.Contains(p, "no audit device") || !strings.Contains(p, "vault audit enable file") {
		t.Errorf("the check at start found: %q", p)
	}
}

func TestSetupTellsWhatItCannotDo(t *testing.T) {
	token, err := root(t).Auth().Token().CreateWithContext(t.Context(), &api.TokenCreateRequest{Policies: []string{"default"}, TTL: "5m"})
	if err != nil {
		t.Fatal(err)
	}
	if output, err := server.RunSetup(t.Context(), token.Auth.ClientToken); err == nil || !strings.Contains(output, "vault/setup.hcl") {
		t.Errorf("with a weak token the set-up said %q, %v", output, err)
	}
}

// The audit log is looked at while the service is at work, not only at start.
func TestAuditTrailThatIsChangedStopsTheSink(t *testing.T) {
	sys := root(t).Sys()
	device := func(options map[string]string) func() error {
		return func() error {
			return sys.EnableAuditWithOptionsWithContext(context.Background(), "other", &api.EnableAuditOptions{Type: "file", Options: options})
		}
	}
	file := func() error {
		return sys.EnableAuditWithOptionsWithContext(context.Background(), "file", &api.EnableAuditOptions{Type: "file", Options: map[string]string{"file_path": server.AuditFile}})
	}
	disable := func(name string) func() error {
		return func() error { return sys.DisableAuditWithContext(context.Background(), name) }
	}
	tune := func(mount, field string) func() error {
		return func() error {
			return second(root(t).Logical().WriteWithContext(context.Background(), "sys/mounts/"+mount+"/tune", map[string]any{"audit_non_hmac_response_keys": field}))
		}
	}
	tests := []struct {
		name     string
		do, undo func() error
		want     string
		repaired bool // by vault/setup, which refuses the others
	}{
		{"private keys in clear", tune("orgkeys", "1"), tune("orgkeys", ""), "mount orgkeys has", true},
		{"secrets in clear", tune("orgkeys-seal", "plaintext"), tune("orgkeys-seal", ""), "mount orgkeys-seal has", true},
		{"log_raw", device(map[string]string{"file_path": filepath.Join(t.TempDir(), "raw"), "log_raw": "true"}), disable("other"), "log_raw=true", false},
		{"no device", disable("file"), file, "no audit device", false},
		{"only a device that discards", func() error {
			return errors.Join(device(map[string]string{"file_path": "discard"})(), disable("file")())
		},
			func() error { return errors.Join(file(), disable("other")()) }, "stores its entries", false},
		{"only /dev/null", func() error {
			return errors.Join(device(map[string]string{"file_path": "/dev/null"})(), disable("file")())
		},
			func() error { return errors.Join(file(), disable("other")()) }, "stores its entries", false},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			c := open(t)
			sink, list, point := c.Sink(), entries(t, 0, 1), checkpointAt(freshLog(t), 1)
			if err := second(sink.Append(t.Context(), list, point)); err != nil {
				t.Fatal(err)
			}
			if err := tt.do(); err != nil {
				t.Fatal(err)
			}
			defer func() {
				if err := tt.undo(); err != nil {
					t.Error(err)
				}
			}()
			eventually(t, func() error {
				if second(sink.Append(t.Context(), list, point)) == nil {
					return errors.New("the sink still acknowledges")
				}
				return nil
			})
			if err := second(generate(t.Context(), c)); !errors.Is(err, orgkey.ErrUnavailable) {
				t.Errorf("a key came out: %v", err)
			}
			if err := c.Healthy(t.Context()); err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("it is healthy: %v", err)
			}
			if p := problems(c); !strings.Contains(p, tt.want) {
				t.Errorf("the check at start found: %q", p)
			}
			if output, err := server.Setup(t.Context()); (err == nil) != tt.repaired {
				t.Errorf("the set-up said %q, %v", output, err)
			}
			if tt.repaired && c.Healthy(t.Context()) != nil {
				t.Error("the set-up did not repair it")
			}
		})
	}
}
