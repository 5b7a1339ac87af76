package main

import (
	"crypto/rand"
	"crypto/rsa"
	"debug/elf"
	"encoding/json"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spf13/cobra"
	"go.yaml.in/yaml/v3"

	"github.com/orgkeys/orgkeys/client"
	"github.com/orgkeys/orgkeys/internal/e2e/harness"
	"github.com/orgkeys/orgkeys/internal/testca"
)

// enroll claims the key of a token as a node does, from a new recipient.
func enroll(t *testing.T, token string) error {
	t.Helper()
	c, err := client.New(client.Config{Server: server.API, Retry: client.Retry{For: 20 * time.Second, Temporary: func(err error) bool { return false }}})
	if err != nil {
		t.Fatal(err)
	}
	recipient, err := rsa.GenerateKey(rand.Reader, 3072)
	if err != nil {
		t.Fatal(err)
	}
	e, err := client.NewEnrollment(c, []byte(token), recipient)
	if err != nil {
		t.Fatal(err)
	}
	defer e.Close()
	_, err = e.Fetch(t.Context())
	return err
}

func TestEnrollments(t *testing.T) {
	t.Parallel()
	p := owner(t)
	looksLike(t, "enrollment-list-none", p.home, p.does("enrollment", "list"))
	looksLike(t, "enrollment-create", p.home, p.does("enrollment", "create", "--note", "rack 12", "--ip", "192.0.2.7"))

	var minted struct{ ID, Token string }
	out := p.does("enrollment", "create", "--json", "--approval", "--life", "1h")
	if err := json.Unmarshal([]byte(out), &minted); err != nil {
		t.Fatal(err)
	}
	looksLike(t, "enrollment-create-json", p.home, out)
	if err := enroll(t, minted.Token); err == nil {
		t.Error("a claim that nobody approved got its key")
	}
	out = p.does("enrollment", "show", minted.ID)
	looksLike(t, "enrollment-show-waiting", p.home, out)
	var shown client.Permission
	if err := json.Unmarshal([]byte(p.does("enrollment", "show", minted.ID, "--json")), &shown); err != nil || len(shown.Claims) != 1 {
		t.Fatalf("%+v, %v", shown, err)
	}
	p.fails(exitNotFound, "enrollment_not_found", "enrollment", "approve", minted.ID, strings.Repeat("0", 64))
	p.does("enrollment", "approve", minted.ID, shown.Claims[0].Recipient)
	if err := enroll(t, minted.Token); err == nil {
		t.Error("a second recipient got the key")
	}
	looksLike(t, "enrollment-show-conflict", p.home, p.does("enrollment", "show", minted.ID))
	looksLike(t, "enrollment-revoke", p.home, p.does("enrollment", "revoke", minted.ID))
	looksLike(t, "enrollment-list", p.home, p.does("enrollment", "list"))
	p.fails(exitNotFound, "enrollment_not_found", "enrollment", "show", "11ea7a05-6cc2-495a-a581-466cc1cd2067")
	p.fails(exitRefused, "invalid_request", "enrollment", "create", "--uses", "2000")
	// What the API takes for its default is not what was said.
	for _, wrong := range [][]string{{"--life", "0s"}, {"--life", "-1h"}, {"--life", "1500ms"}, {"--uses", "0"}, {"--uses", "-1"}} {
		p.fails(exitUsage, wrong[0]+" is", append([]string{"enrollment", "create"}, wrong...)...)
	}
	p.fails(exitUsage, "UTF-8", "enrollment", "create", "--note", "M\xfcnchen")
	p.fails(exitUsage, "--for is one of", "enrollment", "create", "--for", "pigeon")

	looksLike(t, "enrollment-create-file", p.home, p.does("enrollment", "create", "--token-out", "token"))
	text, err := os.ReadFile(p.path("token"))
	if info, e := os.Stat(p.path("token")); err != nil || e != nil || info.Mode() != 0o600 || !strings.HasPrefix(string(text), "oke1.") {
		t.Errorf("the token's file: %v, %v, %q", err, e, text)
	}
	if err := enroll(t, string(text)); err != nil {
		t.Errorf("the token in the file: %v", err)
	}
}

func TestDevices(t *testing.T) {
	t.Parallel()
	p := owner(t)
	ek := "sha256-" + strings.Repeat("0", 64)
	if out := p.does("device", "list"); !strings.Contains(out, "no devices") {
		t.Errorf("before any: %s", out)
	}
	p.does("device", "allow", "--note", "rack 12", ek)
	p.fails(exitRefused, "invalid_request", "device", "allow", "sha256-x")
	if out := p.does("device", "list"); !strings.Contains(out, ek) || !strings.Contains(out, "rack 12") {
		t.Errorf("the list is %s", out)
	}
	var devices []client.Device
	if err := json.Unmarshal([]byte(p.does("device", "list", "--json")), &devices); err != nil || len(devices) != 1 || devices[0].EK != ek {
		t.Errorf("%+v, %v", devices, err)
	}
	for _, flags := range [][]string{{"--ek", ek}, {"--tpm"}} {
		out := p.does(append([]string{"enrollment", "create", "--origin", "node", "--token-out", "token" + flags[0]}, flags...)...)
		if !strings.Contains(out, "origin") || !strings.Contains(out, "tpm") {
			t.Errorf("%q: %s", flags, out)
		}
	}
	p.does("device", "remove", ek)
	p.fails(exitNotFound, "device_not_found", "device", "remove", ek)
}

// Each snippet brings the token that was minted to where orgkeys-node looks for it.
func TestSnippets(t *testing.T) {
	t.Parallel()
	p := owner(t)
	texts := map[string]string{}
	for _, form := range []string{"shell", "cloud-init", "systemd"} {
		texts[form] = p.does("enrollment", "create", "--for", form)
		looksLike(t, "snippet-"+form, p.home, texts[form])
	}
	// What the enrollment asks of the node is said to the node.
	for form, want := range map[string]string{
		"shell":      "/enroll.token\" --origin node --tpm /dev/tpmrm0\n",
		"cloud-init": "/enroll.token\n      ORGKEYS_NODE_ORIGIN=node\n      ORGKEYS_NODE_TPM=/dev/tpmrm0\n  - path: ",
		"systemd":    "=$REGION\nORGKEYS_NODE_ORIGIN=node\nORGKEYS_NODE_TPM=/dev/tpmrm0\nENV\n",
	} {
		if out := p.does("enrollment", "create", "--origin", "node", "--tpm", "--for", form); !strings.Contains(out, want) {
			t.Errorf("%s of an enrollment for keys in TPMs: %s", form, out)
		} else if strings.Contains(out, "# The unit opens the TPM only with a drop-in") == (form == "shell") {
			t.Errorf("%s does not say what its unit needs: %s", form, out)
		}
	}
	token := varying[0].form

	// The shell's, with an orgkeys-node that only says what it was given.
	bin := t.TempDir()
	for name, script := range map[string]string{
		"orgkeys-node": "printf '%s ' \"$@\"; shift 9; stat -c %a \"$2\"; cat \"$2\"",
		"systemctl":    "echo \"$@\"; cat \"$ETC\"/credstore/*; stat -c %a \"$ETC\"/credstore/*",
	} {
		if err := os.WriteFile(filepath.Join(bin, name), []byte("#!/bin/sh\n"+script+"\n"), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	dir, etc := filepath.Join(p.home, "node"), filepath.Join(p.home, "etc")
	shell := func(text string) string {
		cmd := exec.CommandContext(t.Context(), "sh", "-c", text)
		cmd.Env = []string{"PATH=" + bin + ":" + os.Getenv("PATH"), "DIR=" + dir, "ETC=" + etc, "IP=192.0.2.7", "REGION=eu"}
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Errorf("%v\n%s", err, out)
		}
		return string(out)
	}
	want := "boot --server " + server.API + " --ip 192.0.2.7 --region eu --dir " + dir + " --token-file " + dir + "/enroll.token 600\n" + token.FindString(texts["shell"]) + "\n"
	if out := shell(texts["shell"]); out != want {
		t.Errorf("the shell's: %q, want %q", out, want)
	}

	var config struct {
		Files []struct {
			Path, Permissions, Owner, Content string
			Defer                             bool
		} `yaml:"write_files"`
		Run [][]string `yaml:"runcmd"`
	}
	if err := yaml.Unmarshal([]byte(texts["cloud-init"]), &config); err != nil || len(config.Files) != 2 || len(config.Run) != 3 {
		t.Fatalf("cloud-init's: %v, %+v", err, config)
	}
	if f := config.Files[1]; f.Content != token.FindString(texts["cloud-init"]) || f.Permissions != "0600" || f.Owner != "orgkeys-node:orgkeys-node" || !f.Defer {
		t.Errorf("cloud-init's token: %+v", f)
	}

	minted := token.FindString(texts["systemd"]) + "\n600\n"
	want = "enable orgkeys-node.service\n" + minted + "restart orgkeys-node.service\n" + minted
	if out := shell(strings.ReplaceAll(texts["systemd"], "/etc/", etc+"/")); out != want {
		t.Errorf("systemd's: %q, want %q", out, want)
	}
	settings, err := os.ReadFile(filepath.Join(etc, "orgkeys-node/env"))
	if want := "ORGKEYS_NODE_SERVER=" + server.API + "\nORGKEYS_NODE_IP=192.0.2.7\nORGKEYS_NODE_REGION=eu\n"; err != nil || string(settings) != want {
		t.Errorf("systemd's settings: %q, %v", settings, err)
	}
}

// A token goes to the server that it was fetched for and to no other.
func TestASessionIsForOneServer(t *testing.T) {
	t.Parallel()
	p := owner(t)
	asked := make(chan string, 10)
	other := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) { asked <- r.Header.Get("Authorization") }))
	defer other.Close()
	p.fails(exitRefused, "nobody is logged in", "key", "list", "--server", other.URL)
	p.fails(exitRefused, "nobody is logged in", "logout", "--server", other.URL)
	if len(asked) > 0 {
		t.Errorf("the other server was asked with %q", <-asked)
	}
	p.does("key", "list")
}

func TestAServerThatAsksForACertificate(t *testing.T) {
	t.Parallel()
	ca := testca.New(t)
	own := ca.Issue(t, "ada")
	s := harness.Start(t, harness.TLS(ca, ca.Issue(t, "server")), harness.Set("ORGKEYS_TLS_CLIENT_CA_FILE", ca.File))
	p := newcomer(t, s.API)
	login := p.command(t.Context(), "login", "--token-file", "-")
	login.Stdin = strings.NewReader(s.Token(t, p.org, "OWNER"))
	if out, err := login.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	p.fails(exitUnavailable, "signed by unknown authority; check --server and --ca-file", "key", "list")
	p.fails(exitUnavailable, "--tls-cert", "key", "list", "--ca-file", ca.File)
	with := []string{"--ca-file", ca.File, "--tls-cert", own.Cert, "--tls-key", own.Key}
	// The harness does not wait for a server that wants certificates.
	p.does(append([]string{"key", "list", "--wait", "20s"}, with...)...)
	if err := os.Chmod(own.Key, 0o644); err != nil {
		t.Fatal(err)
	}
	p.fails(exitConfig, "chmod 600", append([]string{"key", "list"}, with...)...)
}

func TestNodesSecretsAndEvents(t *testing.T) {
	t.Parallel()
	p := owner(t)
	p.does("key", "create", "--out", "key.pem")
	looksLike(t, "node-list-none", p.home, p.does("node", "list"))
	text, err := os.ReadFile(p.path("key.pem"))
	if err != nil {
		t.Fatal(err)
	}
	key, err := client.ParsePrivateKey(text)
	if err != nil {
		t.Fatal(err)
	}
	c, err := client.New(client.Config{Server: server.API})
	if err != nil {
		t.Fatal(err)
	}
	services := int64(5)
	node := client.Node{Client: c, Org: p.org, IP: "192.0.2.7", Region: "eu", Key: key}
	if err := node.Register(t.Context(), client.Registration{Version: "1.0", Status: "active", Provider: "S3", Services: &services}); err != nil {
		t.Fatal(err)
	}
	looksLike(t, "node-list", p.home, p.does("node", "list"))

	looksLike(t, "secret-list-none", p.home, p.does("secret", "list"))
	code, out, log := p.run("AWS_REGION=eu", "secret", "put", "env_s3")
	if code != 0 {
		t.Fatalf("%d, %s", code, log)
	}
	looksLike(t, "secret-put", p.home, out)
	if err := os.WriteFile(p.path("value"), []byte("from a file"), 0o600); err != nil {
		t.Fatal(err)
	}
	p.does("secret", "put", "other", "--file", "value")
	secrets, err := node.Secrets(t.Context())
	if err != nil || len(secrets) != 2 || string(secrets[0].Value) != "AWS_REGION=eu" || string(secrets[1].Value) != "from a file" {
		t.Errorf("the node has %q, %v", secrets, err)
	}
	looksLike(t, "secret-list", p.home, p.does("secret", "list"))
	p.fails(exitUsage, "holds no value", "secret", "put", "empty")
	if err := os.Chmod(p.path("value"), 0o644); err != nil {
		t.Fatal(err)
	}
	p.fails(exitConfig, "chmod 600", "secret", "put", "other", "--file", "value")
	if code, _, log := p.run(strings.Repeat("x", maxSecret+1), "secret", "put", "large"); code != exitUsage || !strings.Contains(log, "more than 65536") {
		t.Errorf("a secret that is too large: %d, %s", code, log)
	}
	p.fails(exitNotFound, "secret_not_found", "secret", "delete", "none")
	looksLike(t, "secret-delete", p.home, p.does("secret", "delete", "env_s3", "other"))

	var nodes []client.RegisteredNode
	if err := json.Unmarshal([]byte(p.does("node", "list", "--json")), &nodes); err != nil || len(nodes) != 1 {
		t.Fatalf("%+v, %v", nodes, err)
	}
	looksLike(t, "node-delete", p.home, p.does("node", "delete", nodes[0].ID))
	p.fails(exitNotFound, "node_already_deleted", "node", "delete", nodes[0].ID)

	looksLike(t, "event-list", p.home, p.does("event", "list"))
	looksLike(t, "event-list-deleted", p.home, p.does("event", "list", "--of", "node", "--change", "deleted", "--id", nodes[0].ID))
	var events []client.Event
	code, out, log = p.run("", "event", "list", "--json", "--limit", "2")
	if err := json.Unmarshal([]byte(out), &events); code != 0 || err != nil || len(events) != 2 || !strings.Contains(log, "there are more: --limit") {
		t.Errorf("%d, %+v, %v, %s", code, events, err, log)
	}
	looksLike(t, "event-list-none", p.home, p.does("event", "list", "--since", "2020-01-01T00:00:00Z", "--until", "2020-01-02T00:00:00Z"))
	for _, wrong := range [][]string{{"--since", "yesterday"}, {"--of", "bucket"}, {"--change", "made"}, {"--limit", "0"}} {
		p.fails(exitUsage, wrong[0], append([]string{"event", "list"}, wrong...)...)
	}
}

// misspelt are words that somebody may type in place of a name.
func misspelt(name string) []string {
	return []string{name[:len(name)-1], name + name[len(name)-1:], name[1:2] + name[:1] + name[2:], "x" + name, name + "-", "nonsense"}
}

// No word that is no command, wherever it stands, may look like a success.
func TestNoMisspeltCommandSucceeds(t *testing.T) {
	t.Setenv("HOME", t.TempDir())
	fails := func(args ...string) {
		t.Helper()
		if code := run(t.Context(), args, strings.NewReader(""), io.Discard, io.Discard); code == 0 {
			t.Errorf("orgkeysctl %q succeeds", args)
		}
	}
	commands := 0
	var walk func(cmd *cobra.Command, path []string)
	walk = func(cmd *cobra.Command, path []string) {
		commands++
		at := func(more ...string) []string { return append(slices.Clone(path), more...) }
		if !cmd.HasSubCommands() {
			fails(at("--nonsense")...)
			return
		}
		fails(path...)
		var names []string
		for _, below := range cmd.Commands() {
			names = append(names, below.Name())
			walk(below, at(below.Name()))
		}
		for _, name := range names {
			for _, word := range misspelt(name) {
				if !slices.Contains(names, word) {
					fails(at(word)...)
					fails(at(word, "--help")...)
					fails(at("--server", "x", word)...)
					fails(append([]string{"help"}, at(word)...)...)
				}
			}
		}
	}
	walk(newCommand(), nil)
	if commands < 25 {
		t.Errorf("only %d commands were found", commands)
	}
}

func TestSettings(t *testing.T) {
	t.Parallel()
	p := newcomer(t, server.API)
	p.fails(exitRefused, "nobody is logged in; log in: orgkeysctl login --server "+server.API, "key", "list")
	p.fails(exitRefused, "nobody is logged in", "whoami")
	p.fails(exitUsage, `unknown command "x"`, "key", "list", "x")
	p.fails(exitUsage, "--server", "key", "list", "--server", "http://example.org")
	p.fails(exitUsage, "belong together", "key", "list", "--tls-cert", "x")
	p.fails(exitConfig, "no such file", "key", "list", "--ca-file", "none")
	p.fails(exitConfig, "no such file", "key", "list", "--token-file", "none")
	p.logIn("OWNER")

	p.env = []string{"ORGKEYSCTL_SEVRER=x"}
	p.fails(exitUsage, "ORGKEYSCTL_SEVRER in the environment is no setting", "key", "list")
	p.env = []string{"ORGKEYSCTL_ISSUER=https://id.example"} // of another command
	p.does("key", "list")
	p.env = []string{"ORGKEYSCTL_JSON=true"}
	if out := p.does("key", "list"); out != "[]\n" {
		t.Errorf("with JSON from the environment: %q", out)
	}
	p.env = nil
	config := p.path(".config/orgkeysctl/config")
	for text, want := range map[string]string{
		"ORGKEYSCTL_ORG=other\n": "other_organization", "ORGKEYSCTL_SERVER=https://elsewhere.example\nORGKEYSCTL_ORG=!\n": "--org",
		"ORGKEYSCTL_NONE=1\n": "is no setting", "nonsense\n": "NAME=VALUE",
	} {
		if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if code, _, log := p.run("", "key", "list"); code == 0 || !strings.Contains(log, want) {
			t.Errorf("settings %q: %d, %q, want %q", text, code, log, want)
		}
	}
	if err := os.WriteFile(config, []byte("ORGKEYSCTL_ORG=other\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	p.does("key", "list", "--org", p.org)
	p.does("logout")
	p.fails(exitRefused, "nobody is logged in", "logout")
	p.fails(exitRefused, "nobody is logged in", "key", "list")
}

func TestRolesAndTokens(t *testing.T) {
	t.Parallel()
	p := newcomer(t, server.API)
	p.logIn("USER")
	looksLike(t, "whoami", p.home, p.does("whoami"))
	p.fails(exitRefused, "not allowed", "key", "list")
	p.does("node", "list")
	code, out, log := p.run("", "can-i", "orgkey.generate")
	if code != exitNo || log != "orgkeysctl: no: insufficient_role\n" {
		t.Errorf("can-i: %d, %s", code, log)
	}
	looksLike(t, "can-i-no", p.home, out)
	looksLike(t, "can-i-yes", p.home, p.does("can-i", "event.read"))
	if code, out, _ := p.run("", "can-i", "orgkey.list", "--org", "other"); code != exitNo || !strings.Contains(out, "other_organization") {
		t.Errorf("can-i in another organization: %d, %s", code, out)
	}
	if code, out, _ := p.run("", "can-i", "bucket.make"); code != exitNo || !strings.Contains(out, "unknown_action") {
		t.Errorf("can-i do what nobody can: %d, %s", code, out)
	}
	p.fails(exitRefused, "is not a name such as", "can-i", "everything")

	// A file that something else renews is read for each request, and beats the session.
	if err := os.WriteFile(p.path("token"), []byte(server.Token(t, p.org, "OWNER")), 0o600); err != nil {
		t.Fatal(err)
	}
	p.does("key", "list", "--token-file", "token")
	p.does("login", "--token-file", "token")
	p.does("key", "list")
	if err := os.WriteFile(p.path("token"), []byte("nonsense"), 0o600); err != nil {
		t.Fatal(err)
	}
	p.fails(exitRefused, "does not accept the token", "key", "list", "--org", p.org)
	p.fails(exitUsage, "which organization?", "key", "list")
	if err := os.Chmod(p.path("token"), 0o644); err != nil {
		t.Fatal(err)
	}
	p.fails(exitConfig, "chmod 600", "key", "list")
	if code, _, log := p.run("opaque", "login", "--token-file", "-"); code != exitUsage || !strings.Contains(log, "holds no JWT") {
		t.Errorf("a token that is none: %d, %s", code, log)
	}
}

func TestAServerThatIsNotThere(t *testing.T) {
	t.Parallel()
	p := newcomer(t, "http://127.0.0.1:1")
	p.logIn("OWNER")
	p.fails(exitUnavailable, "cannot be reached", "key", "list")
	p.fails(exitUnavailable, "cannot be reached", "key", "create", "--out", "key.pem")
	if _, err := os.Stat(p.path("key.pem")); err == nil {
		t.Error("a file was left")
	}
	code, _, log := p.run("", "key", "list", "--wait", "1s")
	if code != exitUnavailable || !strings.Contains(log, "trying again in") {
		t.Errorf("%d, %s", code, log)
	}
}

const mostBytes = 15_000_000 // of the program

// One static file for each platform, and small.
func TestTheProgramThatShips(t *testing.T) {
	t.Parallel()
	info, err := os.Stat(binary)
	if err != nil || info.Size() > mostBytes {
		t.Errorf("%v, %d bytes, want at most %d", err, info.Size(), mostBytes)
	}
	t.Logf("%d bytes", info.Size())
	f, err := elf.Open(binary)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if libraries, err := f.ImportedLibraries(); err != nil || len(libraries) > 0 || f.Section(".interp") != nil {
		t.Errorf("it needs %q, %v", libraries, err)
	}
	if os.Getenv("ORGKEYS_TEST_LONG") == "" {
		return // scripts/test builds it for other systems, and this for each
	}
	for _, at := range []string{"linux/amd64", "linux/arm64", "darwin/amd64", "darwin/arm64", "windows/amd64", "windows/arm64"} {
		goos, goarch, _ := strings.Cut(at, "/")
		path := filepath.Join(t.TempDir(), "orgkeysctl")
		if err := build(path, "GOOS="+goos, "GOARCH="+goarch); err != nil {
			t.Errorf("%s: %v", at, err)
			continue
		}
		if info, err := os.Stat(path); err != nil || info.Size() > mostBytes {
			t.Errorf("%s: %d bytes, want at most %d", at, info.Size(), mostBytes)
		}
	}
}

func TestCompletionAndManualPages(t *testing.T) {
	t.Parallel()
	p := newcomer(t, server.API)
	for _, shell := range []string{"bash", "zsh", "fish", "powershell"} {
		if out := p.does("completion", shell); !strings.Contains(out, "orgkeysctl") {
			t.Errorf("%s: %d bytes", shell, len(out))
		}
	}
	if out := p.does("__complete", "enrollment", "ap"); !strings.HasPrefix(out, "approve\t") {
		t.Errorf("enrollment ap<TAB>: %s", out)
	}
	p.does("man", "pages")
	pages, err := filepath.Glob(p.path("pages/*.1"))
	if err != nil || len(pages) < 25 {
		t.Errorf("%d manual pages, %v", len(pages), err)
	}
	text, err := os.ReadFile(p.path("pages/orgkeysctl-key-create.1"))
	if err != nil || !strings.Contains(string(text), ".SH OPTIONS") || !strings.Contains(string(text), "is never overwritten") {
		t.Errorf("key create's page: %v, %s", err, text)
	}
}
