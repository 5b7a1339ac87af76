package main_test

import (
	"errors"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"go.yaml.in/yaml/v3"

	"github.com/orgkeys/orgkeys/internal/e2e/harness"
	"github.com/orgkeys/orgkeys/internal/e2e/systemd"
)

// userData is what examples/cloud-init.yaml has cloud-init do.
type userData struct {
	Users []any `yaml:"users"`
	Files []struct {
		Path        string `yaml:"path"`
		Owner       string `yaml:"owner"`
		Permissions string `yaml:"permissions"`
		Defer       bool   `yaml:"defer"`
		Content     string `yaml:"content"`
	} `yaml:"write_files"`
	Run [][]string `yaml:"runcmd"`
}

// withoutKey is a machine as newBox's, without settings and key.
func withoutKey(t *testing.T, f *front) *box {
	b := newBox(t, f)
	b.Remove("orgkeys-node/env")
	b.Remove("orgkeys-node/key.pem")
	return b
}

// A machine that is made from the example enrolls and boots, under the real
// systemd and the shipped unit, with the files that cloud-init would write; so do
// the units that need its secrets.
func TestCloudInitExample(t *testing.T) {
	if systemd.AsRoot(t) {
		return
	}
	f := newFront(t, harness.Start(t))
	m := mint(t, f.Server, f.org, `{}`)
	b := withoutKey(t, f)
	b.boot()
	b.waits()

	text := read(t, "../../examples/cloud-init.yaml")
	var data userData
	if err := yaml.Unmarshal([]byte(text), &data); err != nil || !strings.HasPrefix(text, "#cloud-config\n") {
		t.Fatalf("not user data: %v", err)
	}
	user, ok := data.Users[1].(map[string]any)
	if !ok || user["name"] != "orgkeys-node" || !strings.Contains(read(t, "orgkeys-node.service"), "\nUser=orgkeys-node\n") {
		t.Errorf("the example's user is %v", data.Users[1])
	}
	of := strings.NewReplacer("https://orgkeys.example", f.url, "oke1.00000000-0000-4000-8000-000000000000."+strings.Repeat("A", 43), m.Token)
	owners := map[string]int{"": 0, "root:root": 0, "orgkeys-node:orgkeys-node": nodeUser}
	for _, file := range data.Files {
		mode, err := strconv.ParseUint(file.Permissions, 8, 32)
		owner, known := owners[file.Owner]
		if err != nil || !known || owner == nodeUser && !file.Defer {
			t.Fatalf("%s: mode %q, owner %q, deferred %t", file.Path, file.Permissions, file.Owner, file.Defer)
		}
		content := of.Replace(file.Content)
		if content == file.Content {
			t.Errorf("%s has nothing that is a machine's own", file.Path)
		}
		// cloud-init's write_files makes directories 0755, of root.
		to := b.Path(file.Path)
		if err := errors.Join(os.MkdirAll(filepath.Dir(to), 0o755), os.WriteFile(to, []byte(content), 0o600), os.Chown(to, owner, owner),
			os.Chmod(to, os.FileMode(mode))); err != nil {
			t.Fatal(err)
		}
	}
	for _, command := range data.Run {
		if out, err := b.Inside(command...); err != nil {
			t.Errorf("%q: %v %s", command, err, out)
		}
	}
	b.isUp()
	if _, err := os.Stat(b.Path("/var/lib/orgkeys-node/token")); !os.IsNotExist(err) {
		t.Errorf("the token's file after the receipt: %v", err)
	}
	if shown := enrollments(t, f.Server, f.org, m.ID); !strings.Contains(shown, `"state":"received"`) {
		t.Errorf("the administrator sees %s", shown)
	}
	if out, err := b.Inside("systemctl", "reload", "orgkeys-node"); err != nil {
		t.Errorf("a refresh with the enrolled key: %v %s", err, out)
	}
}

// A token that systemd hands to the shipped unit as a credential does, too, and
// the key lasts over boots with and without it.
func TestTokenInTheCredentialStore(t *testing.T) {
	if systemd.AsRoot(t) {
		return
	}
	f := newFront(t, harness.Start(t))
	m := mint(t, f.Server, f.org, `{}`)
	b := withoutKey(t, f)
	b.Put("orgkeys-node/env", "ORGKEYS_NODE_SERVER="+f.url+"\nORGKEYS_NODE_IP=192.0.2.7\nORGKEYS_NODE_REGION=eu\n", 0o644, 0)
	b.Put("credstore/orgkeys-node.token", m.Token, 0o600, 0)
	b.boot()
	b.isUp()
	key, err := os.ReadFile(b.Path("/var/lib/orgkeys-node/key.pem"))
	if err != nil || !strings.Contains(enrollments(t, f.Server, f.org, m.ID), `"state":"received"`) {
		t.Fatalf("no key came: %v", err)
	}
	if log, err := b.Inside("journalctl", "--no-pager", "--unit=orgkeys-node"); err != nil || !strings.Contains(log, "remove its source") {
		t.Errorf("it does not say that the token stays: %v %s", err, log)
	}
	again := func() {
		t.Helper()
		if out, err := b.Inside("systemctl", "restart", "orgkeys-node"); err != nil {
			t.Errorf("%v %s", err, out)
		}
		b.isUp()
		if now, err := os.ReadFile(b.Path("/var/lib/orgkeys-node/key.pem")); err != nil || string(now) != string(key) {
			t.Errorf("the key changed: %v", err)
		}
	}
	again()
	b.Remove("credstore/orgkeys-node.token")
	again()
}
