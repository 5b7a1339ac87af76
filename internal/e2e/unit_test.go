package e2e

import (
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/orgkeys/orgkeys/internal/e2e/harness"
	"github.com/orgkeys/orgkeys/internal/e2e/systemd"
	"github.com/orgkeys/orgkeys/internal/freeport"
	"github.com/orgkeys/orgkeys/internal/hsm/hsmtest"
)

// serviceUser is the user that the unit runs as, in the machines of these tests.
const serviceUser = 991

// installed is a machine on which orgkeys is installed as the unit's comments say.
type installed struct {
	*systemd.Machine
	t       *testing.T
	address string
}

// before prepares what else it needs before it boots.
func newInstalled(t *testing.T, before func(*installed)) *installed {
	t.Helper()
	unit, err := os.ReadFile(filepath.Join(harness.ModuleRoot(t), "cmd", "orgkeys", "orgkeys.service"))
	must(t, err)
	port, err := freeport.Find(1)
	must(t, err)
	m := &installed{systemd.New(t, []systemd.User{{Name: "orgkeys", ID: serviceUser}}), t, fmt.Sprintf("127.0.0.1:%d", port)}
	m.Put("systemd/system/orgkeys.service", string(unit), 0o644, 0)
	m.configure("ORGKEYS_DATA_DIR=/var/lib/orgkeys")
	before(m)
	m.Boot(harness.Binary(t), "orgkeys")
	return m
}

// configure writes the unit's one file of settings.
func (m *installed) configure(lines ...string) {
	m.t.Helper()
	port, err := strconv.Atoi(m.address[strings.LastIndex(m.address, ":")+1:])
	must(m.t, err)
	lines = append(lines, "ORGKEYS_LISTEN="+m.address, fmt.Sprintf("ORGKEYS_ADMIN_LISTEN=127.0.0.1:%d", port+1), "ORGKEYS_AUDIT_FILE=/var/log/orgkeys/audit.jsonl")
	m.Put("orgkeys/env", strings.Join(lines, "\n")+"\n", 0o600, serviceUser)
}

// as runs a command as the service's user.
func (m *installed) as(args ...string) string {
	m.t.Helper()
	out, err := m.Inside(append([]string{"setpriv", "--reuid=orgkeys", "--regid=orgkeys", "--clear-groups"}, args...)...)
	if err != nil {
		m.t.Fatalf("%v: %v\n%s", args, err, out)
	}
	return out
}

func (m *installed) systemctl(args ...string) {
	m.t.Helper()
	if out, err := m.Inside(append([]string{"systemctl"}, args...)...); err != nil {
		m.t.Fatalf("systemctl %v: %v\n%s", args, err, out)
	}
}

// serves waits until the service is ready, and has it make a key.
func (m *installed) serves() {
	m.t.Helper()
	harness.Eventually(m.t, harness.Patience, "the service is ready", func() bool {
		resp, err := http.Get("http://" + m.address + "/readyz")
		if err != nil {
			return false
		}
		resp.Body.Close()
		return resp.StatusCode == http.StatusOK
	})
	token := strings.TrimSpace(m.as("orgkeys", "--config", "/etc/orgkeys/env", "token", "--org", "acme", "--role", "OWNER"))
	request, err := http.NewRequest("POST", "http://"+m.address+harness.KeyPath("acme"), nil)
	must(m.t, err)
	request.Header.Set("Authorization", "Bearer "+token)
	resp, err := http.DefaultClient.Do(request)
	must(m.t, err)
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	must(m.t, err)
	if resp.StatusCode != http.StatusOK || !strings.Contains(string(body), "PRIVATE KEY") {
		m.t.Errorf("making a key: %d %.200s", resp.StatusCode, body)
	}
}

func (m *installed) state() string {
	return m.Property("orgkeys.service", "ActiveState") + " " + m.Property("orgkeys.service", "SubState")
}

// The shipped unit serves under the real systemd: with a token of its own, with the
// sink where documents advise it, through SIGHUP; and it is not started again after
// the token refused the PIN.
func TestTheUnitServes(t *testing.T) {
	if systemd.AsRoot(t) {
		return
	}
	m := newInstalled(t, func(*installed) {})
	m.systemctl("start", "orgkeys.service")
	m.serves()
	process := m.Property("orgkeys.service", "MainPID")
	m.systemctl("kill", "--signal=HUP", "orgkeys.service")
	time.Sleep(500 * time.Millisecond)
	if now := m.Property("orgkeys.service", "MainPID"); now != process || m.state() != "active running" {
		t.Errorf("after SIGHUP process %s is %s, and the service is %s", process, now, m.state())
	}
	m.serves()
	if sink, err := os.ReadFile(m.Path("/var/log/orgkeys/audit.jsonl")); err != nil || strings.Count(string(sink), `"orgkey.created"`) != 2 {
		t.Errorf("the sink: %v\n%s", err, sink)
	}
	if said := m.as("orgkeys", "--config", "/etc/orgkeys/env", "audit", "verify"); !strings.Contains(said, "truncation excluded") {
		t.Errorf("audit verify says %s", said)
	}

	m.systemctl("stop", "orgkeys.service")
	if result := m.Property("orgkeys.service", "Result"); result != "success" {
		t.Errorf("stopping it: %s", result)
	}
	pin := m.Path("/var/lib/orgkeys/pin")
	right, err := os.ReadFile(pin)
	must(t, err)
	must(t, os.WriteFile(pin, []byte("99999999"), 0o600))
	m.systemctl("start", "orgkeys.service")
	harness.Eventually(t, harness.Patience, "the service has ended", func() bool { return m.Property("orgkeys.service", "ExecMainStatus") == "77" })
	harness.Eventually(t, harness.Patience, "systemd has noticed", func() bool { return m.Property("orgkeys.service", "SubState") != "running" })
	if m.state() != "failed failed" || m.Property("orgkeys.service", "NRestarts") != "0" {
		t.Errorf("with a wrong PIN the service is %s", m.state())
	}
	must(t, os.WriteFile(pin, right, 0o600))
	m.systemctl("start", "orgkeys.service")
	m.serves()

	t.Run("with a data directory that the sandbox closes", func(t *testing.T) {
		m.systemctl("stop", "orgkeys.service")
		m.Put("systemd/system/orgkeys.service.d/closed.conf", "[Service]\nReadOnlyPaths=/var/lib/orgkeys\nExecStartPre=-/usr/local/bin/orgkeys --config /etc/orgkeys/env doctor\n", 0o644, 0)
		m.systemctl("daemon-reload")
		m.systemctl("start", "orgkeys.service")
		for _, said := range []string{"fail  data directory  /var/lib/orgkeys cannot be written to", "ORGKEYS_DATA_DIR must be a directory that can be written to"} {
			harness.Eventually(t, harness.Patience, said, func() bool {
				log, err := m.Inside("journalctl", "--no-pager", "--unit=orgkeys.service")
				return err == nil && strings.Contains(log, said)
			})
		}
		m.systemctl("stop", "orgkeys.service")
		m.Remove("systemd/system/orgkeys.service.d/closed.conf")
		m.systemctl("daemon-reload")
		m.systemctl("start", "orgkeys.service")
		m.serves()
	})

	t.Run("with Debian's SoftHSM, named in the file of settings", func(t *testing.T) {
		m.systemctl("stop", "orgkeys.service")
		m.Put("softhsm/softhsm2.conf", "directories.tokendir = /var/lib/softhsm/tokens\nobjectstore.backend = file\n", 0o644, 0)
		_, err := m.Inside("install", "-d", "-m", "0700", "-o", "orgkeys", "-g", "orgkeys", "/var/lib/softhsm", "/var/lib/softhsm/tokens")
		must(t, err)
		m.as("env", "SOFTHSM2_CONF=/etc/softhsm/softhsm2.conf", "softhsm2-util", "--init-token", "--free", "--label", "debian", "--so-pin", "87654321", "--pin", "123456")
		m.Put("orgkeys/pin", "123456", 0o600, serviceUser)
		m.configure("ORGKEYS_DATA_DIR=/var/lib/orgkeys/second", "SOFTHSM2_CONF=/etc/softhsm/softhsm2.conf",
			"ORGKEYS_PKCS11_URI=pkcs11:token=debian?module-path="+harness.SoftHSM+"&pin-source=file:/etc/orgkeys/pin")
		must(t, os.Remove(m.Path("/var/log/orgkeys/audit.jsonl")))
		m.systemctl("start", "orgkeys.service")
		m.serves()
		if out, err := m.Inside("find", "/var/lib/softhsm/tokens", "-name", "*.object"); err != nil || strings.Count(out, "\n") < 2 {
			t.Errorf("the token holds %s, %v", out, err)
		}
	})
}

// The shipped unit serves with opencryptoki, with what docs/hsm.md adds to it.
func TestTheUnitServesWithOpencryptoki(t *testing.T) {
	if systemd.AsRoot(t) {
		return
	}
	module := hsmtest.OpencryptokiModule(t)
	text, err := os.ReadFile(filepath.Join(harness.ModuleRoot(t), "docs", "hsm.md"))
	must(t, err)
	_, section, _ := strings.Cut(string(text), "\n### opencryptoki\n")
	section, _, _ = strings.Cut(section, "\n### ")
	parts := strings.Split(section, "```ini\n")
	if len(parts) != 3 {
		t.Fatalf("docs/hsm.md has %d drop-ins for opencryptoki", len(parts)-1)
	}
	dropIn, _, _ := strings.Cut(parts[1], "```")
	daemonDropIn, _, _ := strings.Cut(parts[2], "```")
	m := newInstalled(t, func(m *installed) {
		m.Put("group", fmt.Sprintf("root:x:0:\norgkeys:x:%d:\npkcs11:x:992:orgkeys\n", serviceUser), 0o644, 0)
		m.Put("opencryptoki/opencryptoki.conf", "version opencryptoki-3.8\nslot 3\n{\nstdll = libpkcs11_sw.so\n}\n", 0o644, 0)
		m.Put("systemd/system/pkcsslotd.service", "[Service]\nExecStart=/usr/sbin/pkcsslotd -f\n", 0o644, 0)
		m.Put("systemd/system/pkcsslotd.service.d/restart.conf", daemonDropIn, 0o644, 0)
		m.Put("systemd/system/orgkeys.service.d/opencryptoki.conf", dropIn, 0o644, 0)
		m.Put("orgkeys/pin", "123456", 0o600, serviceUser)
		m.configure("ORGKEYS_DATA_DIR=/var/lib/orgkeys", "ORGKEYS_PKCS11_MODULE="+module, "ORGKEYS_PKCS11_TOKEN_LABEL=orgkeys", "ORGKEYS_PKCS11_PIN_FILE=/etc/orgkeys/pin")
	})
	// As Debian's package makes them.
	if out, err := m.Inside("sh", "-ec", `mkdir -p /run/lock && ln -s /run/lock /var/lock && ln -s /run /var/run
		install -d -m 0770 -g pkcs11 /run/lock/opencryptoki /run/lock/opencryptoki/swtok /var/lib/opencryptoki /var/lib/opencryptoki/swtok /var/lib/opencryptoki/swtok/TOK_OBJ`); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	m.systemctl("start", "pkcsslotd.service")
	harness.Eventually(t, harness.Patience, "the slot daemon listens", func() bool {
		_, err := os.Stat(m.Path("/run/pkcsslotd.socket"))
		return err == nil
	})
	for _, args := range [][]string{
		{"--slot", "3", "--init-token", "--label", "orgkeys", "--so-pin", "87654321"},
		{"--slot", "3", "--login", "--login-type", "so", "--so-pin", "87654321", "--init-pin", "--pin", "123456"},
	} {
		if out, err := m.Inside(append([]string{"pkcs11-tool", "--module", module}, args...)...); err != nil {
			t.Fatalf("initializing the token: %v\n%s", err, out)
		}
	}
	m.systemctl("start", "orgkeys.service")
	m.serves()
	// As by a program that dies while it waits; while others use the token, the daemon stays.
	m.systemctl("stop", "orgkeys.service")
	m.systemctl("kill", "--signal=SIGPIPE", "pkcsslotd.service")
	harness.Eventually(t, harness.Patience, "the slot daemon is started again", func() bool {
		return m.Property("pkcsslotd.service", "NRestarts") != "0" && m.Property("pkcsslotd.service", "ActiveState") == "active"
	})
	m.systemctl("start", "orgkeys.service")
	m.serves()
	if n := m.Property("orgkeys.service", "NRestarts"); n != "0" {
		t.Errorf("it was started again %s times", n)
	}
}
