package config_test

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/orgkeys/orgkeys/internal/config"
	"github.com/orgkeys/orgkeys/internal/node"
)

func load(t *testing.T, settings ...string) (config.Config, error) {
	t.Helper()
	return config.Load(settings, "")
}

func TestDefaults(t *testing.T) {
	c, err := load(t)
	if err != nil {
		t.Fatal(err)
	}
	if c.Listen != "127.0.0.1:3000" || c.AdminListen != "127.0.0.1:4000" || c.Max != 5 || c.Keystore != "pkcs11" || !c.Development() ||
		c.ReservationTTL != time.Minute || c.AuditFile != filepath.Join(".orgkeys", "audit.jsonl") || len(c.AuditSinks) != 1 {
		t.Errorf("defaults: %+v", c)
	}
}

func TestVaultRequiresBothSinksByDefault(t *testing.T) {
	c, err := load(t, "ORGKEYS_KEYSTORE=vault", "ORGKEYS_VAULT_AUTH=token_file", "ORGKEYS_VAULT_TOKEN_FILE=x")
	if err != nil || strings.Join(c.AuditSinks, ",") != "vault,file" {
		t.Errorf("sinks %v, %v", c.AuditSinks, err)
	}
}

// Promise 10: doubtful configuration stops the start, with a message that names the setting.
func TestDoubtfulSettingsAreRefusedByName(t *testing.T) {
	private := filepath.Join(t.TempDir(), "secret")
	if err := os.WriteFile(private, []byte("postgres://u:canary@h/d"), 0o644); err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	empty, blank := filepath.Join(dir, "empty"), filepath.Join(dir, "blank")
	for path, content := range map[string]string{empty: "", blank: " \n"} {
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for name, c := range map[string]struct {
		settings []string
		names    string
	}{
		"unknown":                         {[]string{"ORGKEYS_MAXX=5"}, "ORGKEYS_MAXX"},
		"empty":                           {[]string{"ORGKEYS_MAX="}, "ORGKEYS_MAX"},
		"blank audience":                  {[]string{"ORGKEYS_ISSUER=https://i", "ORGKEYS_AUDIENCE= ", "ORGKEYS_JWKS=https://i/k"}, "ORGKEYS_AUDIENCE"},
		"issuer without audience":         {[]string{"ORGKEYS_ISSUER=https://i", "ORGKEYS_JWKS=https://i/k"}, "ORGKEYS_AUDIENCE"},
		"number":                          {[]string{"ORGKEYS_MAX=five"}, "ORGKEYS_MAX"},
		"negative number":                 {[]string{"ORGKEYS_MAX=-1"}, "ORGKEYS_MAX"},
		"duration":                        {[]string{"ORGKEYS_AUDIT_DEADLINE=10"}, "ORGKEYS_AUDIT_DEADLINE"},
		"audit deadline too long":         {[]string{"ORGKEYS_AUDIT_DEADLINE=31s"}, "ORGKEYS_RESERVATION_TTL"},
		"reservation too short":           {[]string{"ORGKEYS_RESERVATION_TTL=1s"}, "ORGKEYS_RESERVATION_TTL"},
		"development issuer in the open":  {[]string{"ORGKEYS_LISTEN=0.0.0.0:3000"}, "ORGKEYS_ISSUER"},
		"development issuer, other claim": {[]string{"ORGKEYS_CLAIM_ORG=org"}, "ORGKEYS_CLAIM_ORG"},
		"admin listener in the open":      {[]string{"ORGKEYS_ADMIN_LISTEN=0.0.0.0:4000"}, "ORGKEYS_ADMIN_LISTEN"},
		"PostgreSQL without Redis":        {[]string{"ORGKEYS_DATABASE_URL=postgres://u:canary@h/d"}, "ORGKEYS_REDIS_URL"},
		"Redis without PostgreSQL":        {[]string{"ORGKEYS_REDIS_URL=redis://u:canary@h"}, "ORGKEYS_DATABASE_URL"},
		"another database":                {[]string{"ORGKEYS_DATABASE_URL=mysql://u:canary@h/d"}, "ORGKEYS_DATABASE_URL"},
		"secret file that others read":    {[]string{"ORGKEYS_DATABASE_URL_FILE=" + private, "ORGKEYS_REDIS_URL=redis://h"}, "ORGKEYS_DATABASE_URL"},
		"secret given twice":              {[]string{"ORGKEYS_DATABASE_URL_FILE=" + private, "ORGKEYS_DATABASE_URL=postgres://h/d"}, "ORGKEYS_DATABASE_URL"},
		"sink twice":                      {[]string{"ORGKEYS_AUDIT_SINKS=file,file"}, "ORGKEYS_AUDIT_SINKS"},
		"unknown sink":                    {[]string{"ORGKEYS_AUDIT_SINKS=syslog"}, "ORGKEYS_AUDIT_SINKS"},
		"Vault's sink without Vault":      {[]string{"ORGKEYS_AUDIT_SINKS=vault"}, "ORGKEYS_AUDIT_SINKS"},
		"Vault without a login":           {[]string{"ORGKEYS_KEYSTORE=vault"}, "ORGKEYS_VAULT_ROLE_ID_FILE"},
		"module without PIN":              {[]string{"ORGKEYS_PKCS11_MODULE=/x.so"}, "ORGKEYS_PKCS11_PIN_FILE"},
		"token's label without PIN":       {[]string{"ORGKEYS_PKCS11_TOKEN_LABEL=theirs"}, "ORGKEYS_PKCS11_PIN_FILE"},
		"proxy that never matches":        {[]string{"ORGKEYS_TRUSTED_PROXIES=::ffff:127.0.0.1"}, "ORGKEYS_TRUSTED_PROXIES"},
		"empty secret file":               {[]string{"ORGKEYS_DATABASE_URL_FILE=" + empty}, "ORGKEYS_DATABASE_URL_FILE"},
		"blank secret file":               {[]string{"ORGKEYS_REDIS_URL_FILE=" + blank}, "ORGKEYS_REDIS_URL_FILE"},
		"blank before the issuer":         {[]string{"ORGKEYS_ISSUER= https://i", "ORGKEYS_AUDIENCE=a", "ORGKEYS_JWKS=https://i/k"}, "ORGKEYS_ISSUER"},
		"blank behind the audience":       {[]string{"ORGKEYS_ISSUER=https://i", "ORGKEYS_AUDIENCE=a ", "ORGKEYS_JWKS=https://i/k"}, "ORGKEYS_AUDIENCE"},
		"development issuer and proxy":    {[]string{"ORGKEYS_TLS_BY_PROXY=true", "ORGKEYS_TRUSTED_PROXIES=127.0.0.1"}, "ORGKEYS_TLS_BY_PROXY"},
		"Vault's setting without Vault":   {[]string{"ORGKEYS_VAULT_ROLE_ID_FILE=/x"}, "ORGKEYS_VAULT_ROLE_ID_FILE"},
		"HSM's setting with Vault":        {[]string{"ORGKEYS_KEYSTORE=vault", "ORGKEYS_VAULT_AUTH=token_file", "ORGKEYS_VAULT_TOKEN_FILE=x", "ORGKEYS_PKCS11_TOKEN_LABEL=orgkeys"}, "ORGKEYS_PKCS11_TOKEN_LABEL"},
		"policy directory that is gone":   {[]string{"ORGKEYS_POLICY_DIR=/nowhere"}, "ORGKEYS_POLICY_DIR"},
		"not a boolean":                   {[]string{"ORGKEYS_TLS_BY_PROXY=yes"}, "ORGKEYS_TLS_BY_PROXY"},
		"audit file in no directory":      {[]string{"ORGKEYS_AUDIT_FILE=/nope/x"}, "ORGKEYS_AUDIT_FILE: there is no directory /nope"},
		"audit file that is a directory":  {[]string{"ORGKEYS_AUDIT_FILE=" + dir}, "ORGKEYS_AUDIT_FILE: " + dir + " is not a regular file"},
		"audit file below a file":         {[]string{"ORGKEYS_AUDIT_FILE=" + empty + "/x"}, "ORGKEYS_AUDIT_FILE"},
		"audit file without its sink":     {[]string{"ORGKEYS_KEYSTORE=vault", "ORGKEYS_VAULT_AUTH=token_file", "ORGKEYS_VAULT_TOKEN_FILE=x", "ORGKEYS_AUDIT_SINKS=vault", "ORGKEYS_AUDIT_FILE=" + dir + "/x"}, "ORGKEYS_AUDIT_FILE would have no effect"},
		"JWKS interval without JWKS":      {[]string{"ORGKEYS_JWKS_INTERVAL=1m"}, "ORGKEYS_JWKS_INTERVAL would have no effect"},
		"Vault's token for AppRole":       {[]string{"ORGKEYS_KEYSTORE=vault", "ORGKEYS_VAULT_ROLE_ID_FILE=x", "ORGKEYS_VAULT_SECRET_ID_FILE=x", "ORGKEYS_VAULT_TOKEN_FILE=x"}, "ORGKEYS_VAULT_TOKEN_FILE would have no effect"},
		"AppRole for Vault's token":       {[]string{"ORGKEYS_KEYSTORE=vault", "ORGKEYS_VAULT_AUTH=token_file", "ORGKEYS_VAULT_TOKEN_FILE=x", "ORGKEYS_VAULT_SECRET_ID_PATH=x"}, "ORGKEYS_VAULT_SECRET_ID_PATH would have no effect"},
		"client authorities without TLS":  {[]string{"ORGKEYS_TLS_CLIENT_CA_FILE=x"}, "ORGKEYS_TLS_CLIENT_CA_FILE would have no effect"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := load(t, c.settings...)
			if err == nil || !strings.Contains(err.Error(), c.names) {
				t.Fatalf("%v, want an error that names %s", err, c.names)
			}
			if strings.Contains(err.Error(), "canary") {
				t.Errorf("the error shows a secret: %v", err)
			}
		})
	}
}

func TestSettingsFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "orgkeys.env")
	write := func(text string, mode os.FileMode) {
		t.Helper()
		if err := os.WriteFile(path, []byte(text), mode); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(path, mode); err != nil {
			t.Fatal(err)
		}
	}
	write("ORGKEYS_MAX=7\nORGKEYS_LISTEN=127.0.0.1:9\n", 0o600)
	c, err := config.Load([]string{"ORGKEYS_MAX=3", "PATH=/bin"}, path)
	if err != nil || c.Max != 3 || c.Listen != "127.0.0.1:9" {
		t.Errorf("the environment comes first: %d, %s, %v", c.Max, c.Listen, err)
	}
	write("MAX=7\n", 0o600)
	if _, err := config.Load(nil, path); err == nil || !strings.Contains(err.Error(), "MAX") {
		t.Errorf("a name that is no setting: %v", err)
	}
	write("ORGKEYS_MAX=5\n# ORGKEYS_MAX=6\nexport ORGKEYS_MAX=7\n", 0o600)
	if _, err := config.Load(nil, path); err == nil || !strings.Contains(err.Error(), "ORGKEYS_MAX is given twice") {
		t.Errorf("a name given twice: %v", err)
	}
	write("ORGKEYS_MAX=7\n", 0o644)
	if _, err := config.Load(nil, path); err == nil || !strings.Contains(err.Error(), "chmod 600") {
		t.Errorf("a file that others may read: %v", err)
	}
}

func TestSecretsComeFromFiles(t *testing.T) {
	path := filepath.Join(t.TempDir(), "url")
	if err := os.WriteFile(path, []byte("postgres://u:p@h/d\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	c, err := load(t, "ORGKEYS_DATABASE_URL_FILE="+path, "ORGKEYS_REDIS_URL=redis://h")
	if err != nil || c.DatabaseURL != "postgres://u:p@h/d" {
		t.Errorf("%q, %v", c.DatabaseURL, err)
	}
}

func TestNamesOfTheScriptsAreNotSettings(t *testing.T) {
	if _, err := load(t, "ORGKEYS_CACHE=/x", "ORGKEYS_TEST_LONG=1"); err != nil {
		t.Error(err)
	}
}

// Nodes sign with any of their organization's keys, so it has no more than a
// signature is tried against.
func TestTheLimitIsWhatSignaturesAreTriedAgainst(t *testing.T) {
	if _, err := load(t, fmt.Sprintf("ORGKEYS_MAX=%d", node.MaxKeys)); err != nil {
		t.Error(err)
	}
	if _, err := load(t, fmt.Sprintf("ORGKEYS_MAX=%d", node.MaxKeys+1)); err == nil {
		t.Errorf("more than %d keys are allowed", node.MaxKeys)
	}
}

// What is in a file is what it would be in the environment, or is refused.
func TestValuesInTheFileAreNotCut(t *testing.T) {
	path := filepath.Join(t.TempDir(), "env")
	for line, want := range map[string]string{ // ORGKEYS_PKCS11_TOKEN_LABEL; empty: refused
		`a#b`: "a#b", `a"b"c`: `a"b"c`, `a'b'`: `a'b'`, `a b`: "a b", `  a  `: "a", `a\nb`: `a\nb`, `a$B`: "a$B", `a=b`: "a=b", "`a`": "`a`",
		`"a #b"`: "a #b", `'a #b'`: "a #b", `"a#b" # why`: "a#b", `'a"b'`: `a"b`, `"a\"b"`: `a"b`, `'a'#b`: "a",
		`a #b`: "", "a\t#b": "", `"a" b`: "", `"a`: "", `'a'b'`: "", `"a"b"`: "", ``: "", `#b`: "#b",
	} {
		text := "# a comment\n\n  # another\nexport ORGKEYS_MAX=7\nORGKEYS_PKCS11_PIN_FILE=x\nORGKEYS_PKCS11_TOKEN_LABEL=" + line + "\n"
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		c, err := config.Load(nil, path)
		switch {
		case want == "" && (err == nil || !strings.Contains(err.Error(), "line 6 of "+path) || !strings.Contains(err.Error(), "ORGKEYS_PKCS11_TOKEN_LABEL")):
			t.Errorf("%q: %q, %v: want an error about line 6", line, c.Token.Label, err)
		case want != "" && (err != nil || c.Token.Label != want || c.Max != 7):
			t.Errorf("%q: %q, %v; want %q", line, c.Token.Label, err, want)
		}
	}
}

// Errors say where to look, and what is there unless it may be a secret.
func TestErrorsShowLineAndValue(t *testing.T) {
	path := filepath.Join(t.TempDir(), "env")
	for line, want := range map[string]string{
		"ORGKEYS_MAX=five":                               `ORGKEYS_MAX="five": is not a number`,
		"ORGKEYS_MAXX=5":                                 "ORGKEYS_MAXX is not a setting",
		"ORGKEYS_LISTEN=0.0.0.0:3000":                    "ORGKEYS_LISTEN is 0.0.0.0:3000",
		"ORGKEYS_AUDIT_FILE=/nope/x":                     "there is no directory /nope",
		"ORGKEYS_DATABASE_URL=mysql://u:canary@h/d":      "ORGKEYS_DATABASE_URL: is not",
		"ORGKEYS_ISSUER=https://canary:canary@i ":        "ORGKEYS_ISSUER",
		"ORGKEYS_TRUSTED_PROXIES=canary@x":               "ORGKEYS_TRUSTED_PROXIES: item 1 is not",
		"ORGKEYS_AUDIT_SINKS=file,canary":                "ORGKEYS_AUDIT_SINKS",
		"ORGKEYS_MAX=canary-0123456789":                  "ORGKEYS_MAX: is not a number",
		"ORGKEYS_LOG_LEVEL=canary-0123456789":            "ORGKEYS_LOG_LEVEL: is none of",
		"ORGKEYS_VAULT_TOKEN_FILE=x":                     "ORGKEYS_VAULT_TOKEN_FILE is only for ORGKEYS_KEYSTORE=vault",
		"MAX=5":                                          "MAX is neither a setting",
		"just text":                                      "not a line of NAME=VALUE",
		"ORGKEYS_LOG_LEVEL=info\nORGKEYS_LOG_LEVEL=info": "ORGKEYS_LOG_LEVEL is given twice (line 2",
	} {
		if err := os.WriteFile(path, []byte("\n"+line+"\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		_, err := config.Load(nil, path)
		if err == nil || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), " of "+path) || !strings.Contains(err.Error(), "line 2") {
			t.Errorf("%q: %v; want %q and line 2", line, err, want)
		}
		if err != nil && strings.Contains(err.Error(), "canary") {
			t.Errorf("%q: the error shows a secret: %v", line, err)
		}
	}
	if _, err := load(t, "ORGKEYS_MAX=five"); err == nil || strings.Contains(err.Error(), "line") {
		t.Errorf("from the environment: %v", err)
	}
}

// Beside a Service called orgkeys, or orgkeys-redis, every pod has these.
func TestWhatKubernetesInjectsIsNoSetting(t *testing.T) {
	var environ []string
	for _, service := range []string{"ORGKEYS", "ORGKEYS_REDIS", "ORGKEYS_VAULT", "ORGKEYS_2"} {
		for name, value := range map[string]string{
			"_SERVICE_HOST": "10.0.0.7", "_SERVICE_PORT": "3000", "_SERVICE_PORT_HTTP": "3000", "_SERVICE_PORT_ADMIN_2": "4000",
			"_PORT": "tcp://10.0.0.7:3000", "_PORT_3000_TCP": "tcp://10.0.0.7:3000", "_PORT_3000_TCP_PROTO": "tcp",
			"_PORT_3000_TCP_PORT": "3000", "_PORT_3000_TCP_ADDR": "10.0.0.7", "_PORT_53_UDP": "udp://[fd00::7]:53", "_PORT_53_UDP_ADDR": "fd00::7",
		} {
			environ = append(environ, service+name+"="+value)
		}
	}
	if _, err := load(t, environ...); err != nil {
		t.Error(err)
	}
	for _, misspelt := range []string{
		"ORGKEYS_PORT=3000", "ORGKEYS_PORT=127.0.0.1:3000", "ORGKEYS_PORT=https://h:1", "ORGKEYS_PORTS=tcp://10.0.0.7:3000", "ORGKEYS_SERVICE_HOST=orgkeys.example",
		"ORGKEYS_SERVICE_PORT=", "ORGKEYS_PORT_3000=tcp://10.0.0.7:3000", "ORGKEYS_PORT_3000_TCP_NAME=tcp", "ORGKEYS_SERVICE_HOSTS=10.0.0.7", "ORGKEYS_HOST=10.0.0.7",
	} {
		if _, err := load(t, misspelt); err == nil {
			t.Errorf("%s is accepted", misspelt)
		}
	}
	for _, s := range config.Settings() {
		if strings.HasSuffix(s.Name, "_PORT") || strings.HasSuffix(s.Name, "_SERVICE_HOST") || strings.Contains(s.Name, "_SERVICE_PORT") {
			t.Errorf("%s is a name that Kubernetes gives", s.Name)
		}
	}
}
