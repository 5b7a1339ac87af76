package main_test

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"

	"go.yaml.in/yaml/v3"

	"github.com/orgkeys/orgkeys/internal/e2e/harness"
	"github.com/orgkeys/orgkeys/internal/e2e/systemd"
	"github.com/orgkeys/orgkeys/internal/snippet"
	"github.com/orgkeys/orgkeys/internal/tpm/tpmtest"
	"github.com/orgkeys/orgkeys/internal/tpmdevice"
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

	// cloud-init has more to do than to wait for a server, or for an approval.
	f.stop()
	b.cloudInit(read(t, "../../examples/cloud-init.yaml"), "https://orgkeys.example", f.url, "oke1.00000000-0000-4000-8000-000000000000."+strings.Repeat("A", 43), m.Token)
	b.waits()
	f.begin(t)
	b.isUp()
	if _, err := os.Stat(b.Path("/var/lib/orgkeys-node/enroll.token")); !os.IsNotExist(err) {
		t.Errorf("the token's file after the receipt: %v", err)
	}
	if shown := enrollments(t, f.Server, f.org, m.ID); !strings.Contains(shown, `"state":"received"`) {
		t.Errorf("the administrator sees %s", shown)
	}
	if out, err := b.Inside("systemctl", "reload", "orgkeys-node"); err != nil {
		t.Errorf("a refresh with the enrolled key: %v %s", err, out)
	}
}

// cloudInit does with user data what cloud-init would. Each file has something of
// the machine's own in it, which replacements say, as strings.NewReplacer takes them.
func (b *box) cloudInit(text string, replacements ...string) {
	t := b.t
	t.Helper()
	var data userData
	if err := yaml.Unmarshal([]byte(text), &data); err != nil || !strings.HasPrefix(text, "#cloud-config\n") {
		t.Fatalf("not user data: %v", err)
	}
	user, ok := data.Users[1].(map[string]any)
	if !ok || user["name"] != "orgkeys-node" || !strings.Contains(read(t, "orgkeys-node.service"), "\nUser=orgkeys-node\n") {
		t.Errorf("the example's user is %v", data.Users[1])
	}
	of := strings.NewReplacer(replacements...)
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
		// A job that waits for the node's server is none of cloud-init's to wait for.
		bounded := append([]string{"timeout", strconv.FormatFloat(harness.Patience.Seconds(), 'f', 0, 64)}, command...)
		if out, err := b.Inside(bounded...); err != nil {
			t.Errorf("%q: %v %s", command, err, out)
		}
	}
	harness.Eventually(t, harness.Patience, "changed secrets are fetched every hour", func() bool {
		return b.Property("orgkeys-node-refresh.timer", "ActiveState") == "active" && b.Property("orgkeys-node-refresh.timer", "UnitFileState") == "enabled"
	})
}

// tssGroup is the group that may open a machine's TPM.
const tssGroup = 972

// plug gives the machine a TPM, as /dev/tpmrm0, which root and tssGroup may open.
func (b *box) plug(device *tpmtest.TPM) {
	b.t.Helper()
	path := b.Path("/dev/tpmrm0")
	l, err := net.Listen("unix", path)
	if err == nil {
		err = errors.Join(os.Chown(path, 0, tssGroup), os.Chmod(path, 0o660))
	}
	if err != nil {
		b.t.Fatal(err)
	}
	b.t.Cleanup(func() { _ = l.Close() })
	go func() {
		for {
			from, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer from.Close()
				to, err := net.Dial("unix", device.Socket)
				if err != nil {
					return
				}
				defer to.Close()
				go func() {
					_, _ = io.Copy(to, from) // ends with either connection
					_ = to.Close()
				}()
				_, _ = io.Copy(from, to)
			}()
		}
	}()
}

// A machine image, made as docs/nodes.md says, boots for the first time, under the
// real systemd and the shipped unit, with the user data that orgkeysctl prints and
// a TPM that the unit's user may not open by itself.
func TestAMachineImageWithATPM(t *testing.T) {
	if systemd.AsRoot(t) {
		return
	}
	parts := regexp.MustCompile(`(?s)\x60/etc/systemd/system/(orgkeys-node\.service\.d/[a-z]+\.conf)\x60.*?\x60\x60\x60ini\n(.*?)\x60\x60\x60`).FindStringSubmatch(read(t, "../../docs/nodes.md"))
	if parts == nil {
		t.Fatal("docs/nodes.md has no drop-in of the image")
	}
	dropIn := regexp.MustCompile(`(?m)^ +`).ReplaceAllString(parts[2], "")
	f := newFront(t, harness.Start(t))
	device := tpmtest.Start(t)
	ek := ekOf(t, device)
	allow(t, f.Server, f.org, ek)
	m := mint(t, f.Server, f.org, `{"origin":"node","bind":{"tpm":true},"uses":20}`)
	b := withoutKey(t, f)
	b.Put("systemd/system/"+parts[1], dropIn, 0o644, 0)
	b.Put("group", read(t, b.Path("/etc/group"))+fmt.Sprintf("tss:x:%d:\n", tssGroup), 0o644, 0)
	b.boot()
	b.waits()
	b.plug(device)
	var data strings.Builder
	if err := snippet.Write(&data, "cloud-init", snippet.Enrollment{Server: f.url, ID: m.ID, Token: m.Token, OwnKey: true, TPM: true}); err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(data.String(), "# The unit opens the TPM only with a drop-in") {
		t.Errorf("the user data do not say what the unit needs: %s", data.String())
	}
	b.cloudInit(strings.Replace(data.String(), m.Token, "oke1.TOKEN", 1), "=ADDRESS", "=192.0.2.7", "=REGION", "=eu", "oke1.TOKEN", m.Token)
	b.isUp()
	key := read(t, b.Path("/var/lib/orgkeys-node/key.pem"))
	if !tpmdevice.IsKey([]byte(key)) {
		t.Error("the key is not one of the TPM's")
	}
	if shown := enrollments(t, f.Server, f.org, m.ID); !strings.Contains(shown, `"ek":"`+ek+`","evidence":"list"`) || !strings.Contains(shown, `"conflicts":0`) {
		t.Errorf("the administrator sees %s", shown)
	}
	for _, command := range []string{"reload", "restart"} {
		if out, err := b.Inside("systemctl", command, "orgkeys-node"); err != nil {
			t.Errorf("%s: %v %s", command, err, out)
		}
	}
	b.isUp()
	if now := read(t, b.Path("/var/lib/orgkeys-node/key.pem")); now != key {
		t.Error("a later boot has another key")
	}
}

// A credential that comes after the unit's start is none for it until it is started
// again, which the unit is.
func TestACredentialThatComesLater(t *testing.T) {
	if systemd.AsRoot(t) {
		return
	}
	f := newFront(t, harness.Start(t))
	m := mint(t, f.Server, f.org, `{}`)
	b := withoutKey(t, f)
	b.Put("systemd/system/orgkeys-node.service.d/soon.conf", "[Service]\nRestartSec=1\n", 0o644, 0)
	b.boot()
	b.waits()
	b.Put("credstore/orgkeys-node.token", m.Token, 0o600, 0)
	b.Put("orgkeys-node/env", "ORGKEYS_NODE_SERVER="+f.url+"\nORGKEYS_NODE_IP=192.0.2.7\nORGKEYS_NODE_REGION=eu\n", 0o644, 0)
	harness.Eventually(t, 2*harness.Patience, "the unit is active", func() bool {
		return b.Property("orgkeys-node.service", "ActiveState") == "active"
	})
	if shown := enrollments(t, f.Server, f.org, m.ID); !strings.Contains(shown, `"state":"received"`) {
		t.Errorf("the administrator sees %s", shown)
	}
	if log, err := b.Inside("journalctl", "--no-pager", "--unit=orgkeys-node"); err != nil || !strings.Contains(log, "there is no credential orgkeys-node.token") {
		t.Errorf("it does not say what was missing: %v %s", err, log)
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
	// One that is over is said, and stops neither the node nor what needs it.
	over := mint(t, f.Server, f.org, `{}`)
	if err := f.Client(t, f.org, "OWNER").RevokeEnrollment(t.Context(), f.org, over.ID); err != nil {
		t.Fatal(err)
	}
	b.Put("credstore/orgkeys-node.token", over.Token, 0o600, 0)
	again()
	f.putSecret(t, "env_s3", "v1 of a refresh")
	file := "/var/lib/orgkeys-node/enroll.token" // a refresh has no credentials
	b.Put("orgkeys-node/env", read(t, b.Path("/etc/orgkeys-node/env"))+"ORGKEYS_NODE_TOKEN_FILE="+file+"\n", 0o644, 0)
	if err := errors.Join(os.WriteFile(b.Path(file), []byte(over.Token), 0o600), os.Chown(b.Path(file), nodeUser, nodeUser)); err != nil {
		t.Fatal(err)
	}
	if out, err := b.Inside("systemctl", "reload", "orgkeys-node"); err != nil {
		t.Errorf("%v %s", err, out)
	}
	if text := read(t, b.Path("/var/lib/orgkeys-node/env_s3")); text != "v1 of a refresh" {
		t.Errorf("after a refresh the secret is %q", text)
	}
	if log, err := b.Inside("journalctl", "--no-pager", "--unit=orgkeys-node"); err != nil || strings.Count(log, "with the key that was there: enrollment "+over.ID+" is over") != 2 {
		t.Errorf("it does not say that the token is refused: %v %s", err, log)
	}
}
