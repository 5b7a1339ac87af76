package e2e

import (
	"bytes"
	"crypto/x509"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/orgkeys/orgkeys/internal/e2e/harness"
)

// TestScannerFindsPlantedCopies keeps the scanner honest: whatever form a copy
// has, and whatever stands around it, it is found.
func TestScannerFindsPlantedCopies(t *testing.T) {
	t.Parallel()
	secret := make([]byte, 128)
	for i := range secret {
		secret[i] = byte(i*151 + 7)
	}
	sc := &harness.Scanner{}
	sc.AddSecret("planted", secret)
	private := newRSAKey(t)
	key := harness.Key{ID: "planted", Private: private, PEM: pem.EncodeToMemory(&pem.Block{Type: "RSA PRIVATE KEY", Bytes: x509.MarshalPKCS1PrivateKey(private)})}
	std, url := base64.StdEncoding, base64.RawURLEncoding
	forms := map[string]string{
		"binary":                                string(secret),
		"the first half in binary":              string(secret[:64]),
		"hexadecimal":                           hex.EncodeToString(secret),
		"upper-case hexadecimal":                strings.ToUpper(hex.EncodeToString(secret)),
		"hexadecimal in lines":                  inLines(hex.EncodeToString(secret), 31, "\n"),
		"hexadecimal with colons, as openssl":   inLines(hex.EncodeToString(secret), 2, ":"),
		"hexadecimal in lines with indentation": inLines(hex.EncodeToString(secret), 30, "\n    "),
	}
	for offset := range 3 {
		padded := append(bytes.Repeat([]byte{0x55}, offset), secret...)
		for name, text := range map[string]string{"base64": std.EncodeToString(padded), "URL-safe base64": url.EncodeToString(padded)} {
			name = fmt.Sprintf("%s at alignment %d", name, offset)
			forms[name] = text
			forms[name+" in lines of 64"] = inLines(text, 64, "\n")
			forms[name+" in lines of 76 with CRLF"] = inLines(text, 76, "\r\n")
			forms[name+" in lines, escaped as in JSON"] = inLines(text, 64, `\n`)
		}
	}
	for name, text := range forms {
		if found := sc.Scan([]byte("before " + text + " after")); len(found) == 0 {
			t.Errorf("%s: not found", name)
		}
	}
	if found := sc.Scan([]byte("nothing of the kind")); len(found) != 0 {
		t.Errorf("found where nothing is: %v", found)
	}
	logged, err := json.Marshal(map[string]any{"msg": "released", "key": key.PEM})
	if err != nil {
		t.Fatal(err)
	}
	keys := &harness.Scanner{}
	keys.AddKey(key)
	if found := keys.Scan(logged); len(found) == 0 {
		t.Error("a PEM logged as bytes: not found")
	}
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "planted"), []byte(forms["hexadecimal"]), 0o600); err != nil {
		t.Fatal(err)
	}
	if found := sc.ScanTree(t, dir); len(found) == 0 {
		t.Error("a planted file: not found")
	}
}

func inLines(s string, width int, end string) string {
	var b strings.Builder
	for chunk := range slices.Chunk([]byte(s), width) {
		b.Write(chunk)
		b.WriteString(end)
	}
	return b.String()
}

// TestPromise1_KeyMaterialIsNowhere searches all that the service leaves
// behind, while it runs (so the WAL is there) and after it ended.
func TestPromise1_KeyMaterialIsNowhere(t *testing.T) {
	t.Parallel()
	s := harness.Start(t, harness.Set("ORGKEYS_LOG_LEVEL", "debug"))
	sc := &harness.Scanner{}
	for range 2 {
		org := harness.Org()
		sc.AddKey(s.Generate(t, org))
		owner := s.Token(t, org, "OWNER")
		asString := s.Do(t, harness.Request{Method: "POST", Path: harness.KeyPath(org), Token: owner, Header: http.Header{"Accept": {"application/json"}}})
		var text string
		mustUnmarshal(t, asString.Body, &text)
		asString.Body = []byte(text)
		sc.AddKey(harness.ReadKey(t, org, asString))
		s.List(t, org)
	}
	own, err := os.ReadFile(filepath.Join(s.Dir, "pin"))
	if err != nil {
		t.Fatal(err)
	}
	secrets := &harness.Scanner{}
	secrets.AddSecret("the token's PIN", bytes.TrimSpace(own))
	secrets.AddSecret("the owner's token", []byte(signature(s.Token(t, "acme", "OWNER"))))
	s.Do(t, harness.Request{Method: "GET", Path: harness.KeyPath("acme"), Token: s.Token(t, "acme", "OWNER")})
	s.Do(t, harness.Request{Method: "GET", Path: harness.KeyPath("acme"), Token: s.Token(t, "acme", "OWNER") + "x"})

	metrics, err := http.Get(s.Admin + "/metrics")
	if err != nil {
		t.Fatal(err)
	}
	metricsText := readAll(t, metrics)
	commandLine, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", s.PID()))
	if err != nil {
		t.Fatal(err)
	}
	for where, text := range map[string][]byte{
		"the output": s.Output(), "the metrics": []byte(metricsText), "the argument list": commandLine,
	} {
		for _, scanner := range []*harness.Scanner{sc, secrets} {
			for _, f := range scanner.Scan(text) {
				t.Errorf("%s holds %s", where, f)
			}
		}
	}
	for _, when := range []string{"while it runs", "after it ended"} {
		for _, f := range sc.ScanTree(t, s.Dir) {
			t.Errorf("%s: %s", when, f)
		}
		for _, f := range secrets.ScanTree(t, s.Dir) {
			if !strings.HasPrefix(f, filepath.Join(s.Dir, "pin")+":") {
				t.Errorf("%s: %s", when, f)
			}
		}
		if s.Running() {
			s.Stop(t)
		}
	}
}

// TestPromise1_MemoryIsKeptFromOthers runs the program as a user who is not
// root: to root's processes the kernel's refusal does not show.
func TestPromise1_MemoryIsKeptFromOthers(t *testing.T) {
	t.Parallel()
	dir, err := os.MkdirTemp("", "orgkeys-memory-") // t.TempDir's parent is its owner's only
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	program, err := os.ReadFile(harness.Binary(t))
	if err != nil {
		t.Fatal(err)
	}
	binary := filepath.Join(dir, "orgkeys")
	if err := os.WriteFile(binary, program, 0o755); err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), binary, "serve")
	cmd.Env = []string{"PATH=" + os.Getenv("PATH"), "HOME=" + dir, "ORGKEYS_DATA_DIR=" + filepath.Join(dir, "data"), "ORGKEYS_LISTEN=127.0.0.1:0"}
	cmd.SysProcAttr = &syscall.SysProcAttr{}
	if os.Getuid() == 0 {
		const nobody = 65534
		cmd.SysProcAttr.Credential = &syscall.Credential{Uid: nobody, Gid: nobody}
		if err := os.Chown(dir, nobody, nobody); err != nil {
			t.Fatal(err)
		}
	}
	out := &harness.Output{}
	cmd.Stderr = out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		_ = cmd.Process.Kill() // what it answers to does not matter here
		_ = cmd.Wait()
	}()
	harness.Eventually(t, harness.Patience, "the service listens", func() bool {
		return bytes.Contains(out.From(0), []byte(`"msg":"listening"`))
	})
	proc := fmt.Sprintf("/proc/%d/", cmd.Process.Pid)
	limits, err := os.ReadFile(proc + "limits")
	if err != nil {
		t.Fatal(err)
	}
	if !regexp.MustCompile(`(?m)^Max core file size +0 +0 `).Match(limits) {
		t.Errorf("core dumps are not forbidden:\n%s", limits)
	}
	// The kernel gives the files of a process that must not be dumped to root,
	// and so keeps other processes of its user from reading its memory.
	info, err := os.Stat(proc + "mem")
	if err != nil {
		t.Fatal(err)
	}
	if uid := info.Sys().(*syscall.Stat_t).Uid; uid != 0 {
		t.Errorf("the process's memory belongs to user %d, and other processes of that user can read it", uid)
	}
}

// TestPromise1_SecretSettingsAppearInNoOutput: wrong values of secret settings
// make the program complain, and its complaints do not repeat them.
func TestPromise1_SecretSettingsAppearInNoOutput(t *testing.T) {
	t.Parallel()
	canary := "canary" + strings.ReplaceAll(harness.Org(), "-", "")
	file := func(content string) string {
		path := filepath.Join(t.TempDir(), "secret")
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	nowhere := "postgres://orgkeys:" + canary + "@127.0.0.1:1/orgkeys?sslmode=disable"
	redis := "redis://:" + canary + "@127.0.0.1:1/0"
	for name, settings := range map[string]map[string]string{
		"a database that is not there":         {"ORGKEYS_DATABASE_URL": nowhere, "ORGKEYS_REDIS_URL": redis},
		"a database URL from a file":           {"ORGKEYS_DATABASE_URL_FILE": file(nowhere), "ORGKEYS_REDIS_URL_FILE": file(redis)},
		"a database URL without Redis":         {"ORGKEYS_DATABASE_URL": nowhere},
		"a Redis URL without a database":       {"ORGKEYS_REDIS_URL": redis},
		"a database URL that cannot be parsed": {"ORGKEYS_DATABASE_URL": "postgres://orgkeys:" + canary + "%zz@[::1", "ORGKEYS_REDIS_URL": redis},
		"a database URL of another scheme":     {"ORGKEYS_DATABASE_URL": "mysql://orgkeys:" + canary + "@127.0.0.1/orgkeys", "ORGKEYS_REDIS_URL": redis},
		"a Redis URL that cannot be parsed":    {"ORGKEYS_DATABASE_URL": nowhere, "ORGKEYS_REDIS_URL": "redis://:" + canary + "%zz@[::1"},
		"a PIN that is not the token's":        {"ORGKEYS_PKCS11_MODULE": harness.SoftHSM, "ORGKEYS_PKCS11_PIN_FILE": file(canary), "SOFTHSM2_CONF": harness.NewToken(t, "orgkeys", "another-pin")},
		"a PIN for a token that is not there":  {"ORGKEYS_PKCS11_MODULE": harness.SoftHSM, "ORGKEYS_PKCS11_PIN_FILE": file(canary), "SOFTHSM2_CONF": harness.NewToken(t, "other", canary)},
		"a secret in a number's place":         {"ORGKEYS_MAX": canary},
		"a secret in a duration's place":       {"ORGKEYS_AUDIT_DEADLINE": canary},
		"a secret under a name nobody knows":   {"ORGKEYS_DATABASE_PASSWORD": canary},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var opts []harness.Option
			for k, v := range settings {
				opts = append(opts, harness.Set(k, v))
			}
			s := harness.Configure(t, opts...)
			stdout, stderr, code := s.Run(t, "serve")
			if code == 0 {
				t.Errorf("it ended with exit code 0")
			}
			if strings.TrimSpace(stderr) == "" {
				t.Error("it refused without a word")
			}
			sc := &harness.Scanner{}
			sc.AddSecret("the canary", []byte(canary))
			for _, f := range sc.Scan([]byte(stdout + stderr)) {
				t.Errorf("the output holds %s:\n%s", f, stderr)
			}
		})
	}
}

func signature(token string) string { return token[strings.LastIndexByte(token, '.')+1:] }
