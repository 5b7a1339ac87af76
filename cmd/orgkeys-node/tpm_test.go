package main_test

import (
	"bufio"
	"bytes"
	"context"
	"crypto"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	mathrand "math/rand/v2"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"

	"github.com/orgkeys/orgkeys/client"
	"github.com/orgkeys/orgkeys/internal/e2e/harness"
	"github.com/orgkeys/orgkeys/internal/tpm/tpmtest"
	"github.com/orgkeys/orgkeys/internal/tpmdevice"
)

// ekOf is the name of a TPM, as orgkeys-node prints it.
func ekOf(t *testing.T, device *tpmtest.TPM) string {
	t.Helper()
	out, err := exec.Command(binary, "ek", "--tpm", device.Socket).Output()
	name := strings.TrimSpace(string(out))
	if err != nil || !regexp.MustCompile(`^sha256-[0-9a-f]{64}$`).MatchString(name) {
		t.Fatalf("ek: %v %q", err, out)
	}
	return name
}

func allow(t *testing.T, s *harness.Server, org, ek string) {
	t.Helper()
	s.Do(t, harness.Request{Method: "PUT", Path: "/organization/" + org + "/device/" + ek, Token: s.Token(t, org, "OWNER"), Header: inJSON, Body: []byte(`{"note":"rack 12"}`)}).
		Want(t, http.StatusOK, "Device allowed")
}

// A node makes its key itself, and only the public half arrives.
func TestFirstBootWithAKeyOfItsOwn(t *testing.T) {
	s := harness.Start(t)
	org := harness.Org()
	s.PutSecret(t, org, "env_s3", []byte("A=1"))
	for i, terms := range []string{`{"origin":"node","ip":"192.0.2.70"}`, `{"origin":"node","scope":"organization"}`} {
		m := mint(t, s, org, terms)
		e := newEnrolling(t, s.API, m.Token)
		ip := fmt.Sprintf("192.0.2.7%d", i)
		e.run(77, "--origin node", "boot", "--wait", "forever", "--ip", ip)
		e.has("key.pem.recipient", "token")
		if err := os.Remove(filepath.Join(e.dir, "key.pem.recipient")); err != nil {
			t.Fatal(err)
		}
		e.run(0, "registered "+ip, "boot", "--origin", "node", "--ip", ip)
		e.has("key.pem", "key.pem.enrollment")
		shown := enrollments(t, s, org, m.ID)
		if !strings.Contains(shown, `"state":"received"`) || !strings.Contains(shown, `"origin":"node"`) || !strings.Contains(shown, e.fingerprint()) || !strings.Contains(shown, `"conflicts":0`) {
			t.Errorf("the administrator sees %s", shown)
		}
		e.run(0, "0 secrets written, 1 unchanged, registered", "boot", "--ip", ip)
		e.run(0, "(enrolled), 1 secrets in ", "status")
		e.run(0, "unregistered", "unregister", "--ip", ip)
	}
	m := mint(t, s, org, `{}`)
	e := newEnrolling(t, s.API, m.Token)
	e.run(77, "is for a key that the server makes", "boot", "--wait", "forever", "--origin", "node")
	e.run(64, "is neither backend nor node", "boot", "--origin", "moon")
}

// A key in the TPM that was made for the other origin says so, and is no broken TPM.
func TestAKeyInTheTPMForTheOtherOrigin(t *testing.T) {
	t.Parallel()
	s := harness.Start(t)
	device := tpmtest.Start(t)
	for made, origin := range map[string]string{"backend": "node", "node": "backend"} {
		e := newEnrolling(t, s.API, mint(t, s, harness.Org(), `{"origin":"`+origin+`"}`).Token)
		e.run(77, "remove", "enroll", "--wait", "forever", "--tpm", device.Socket, "--origin", made)
		e.run(64, "is a key in the TPM that was made for another --origin, not "+origin, "enroll", "--wait", "0s", "--tpm", device.Socket, "--origin", origin)
	}
}

// Another key that comes into --recipient-file meanwhile is not stored as the one
// that the server accepted, and other runs are kept out of its directory.
func TestTheOwnKeyThatIsStoredIsTheOneThatWasAccepted(t *testing.T) {
	t.Parallel()
	s := harness.Start(t)
	target, err := url.Parse(s.API)
	if err != nil {
		t.Fatal(err)
	}
	own := filepath.Join(t.TempDir(), "apart", "own.pem")
	other, err := client.NewOwnKey()
	if err != nil {
		t.Fatal(err)
	}
	proxy := httputil.NewSingleHostReverseProxy(target)
	var kept []byte
	proxy.ModifyResponse = func(*http.Response) error {
		if kept != nil {
			return nil
		}
		if _, err := os.Stat(filepath.Join(filepath.Dir(own), ".orgkeys-node.lock")); err != nil {
			t.Errorf("the directory is not locked: %v", err)
		}
		if kept, err = os.ReadFile(own); err != nil {
			return err
		}
		return os.WriteFile(own, pem.EncodeToMemory(&pem.Block{Type: "RSA PRIVATE KEY", Bytes: x509.MarshalPKCS1PrivateKey(other)}), 0o600)
	}
	between := httptest.NewServer(proxy)
	defer between.Close()
	e := newEnrolling(t, between.URL, mint(t, s, harness.Org(), `{"origin":"node"}`).Token)
	enroll := []string{"--wait", "0s", "--origin", "node", "--recipient-file", own}
	e.run(78, "it is not the key that the server accepted a moment ago", "enroll", enroll...)
	e.has("token")
	if err := os.WriteFile(own, kept, 0o600); err != nil {
		t.Fatal(err)
	}
	e.run(0, "enrolled key", "enroll", enroll...)
	e.has("key.pem", "key.pem.enrollment")
}

// A node's own key acts for that node only, and deleting it ends it.
func TestPromise14_AKeyThatANodeMadeActsForItOnly(t *testing.T) {
	s := harness.Start(t)
	org := harness.Org()
	device := tpmtest.Start(t)
	allow(t, s, org, ekOf(t, device))
	boot := []string{"boot", "--origin", "node"}
	first := newEnrolling(t, s.API, mint(t, s, org, `{"origin":"node"}`).Token)
	second := newEnrolling(t, s.API, mint(t, s, org, `{"origin":"node","bind":{"tpm":true}}`).Token)
	first.run(0, "registered 192.0.2.81", boot[0], append(boot[1:], "--ip", "192.0.2.81")...)
	second.run(0, "registered 192.0.2.82", boot[0], append(boot[1:], "--ip", "192.0.2.82", "--tpm", device.Socket)...)
	for _, command := range []string{"register", "secrets", "unregister"} {
		first.run(77, "belongs to another node", command, "--ip", "192.0.2.82")
		second.run(77, "belongs to another node", command, "--ip", "192.0.2.81", "--tpm", device.Socket)
	}
	// It is no organization key, says nothing to another organization, and begins
	// at the address that its enrollment names.
	if keys := s.List(t, org); len(keys) != 0 {
		t.Errorf("the organization has %+v", keys)
	}
	key := harness.ParsePrivate(t, []byte(read(t, first.key)))
	var record struct{ KeyID string }
	if err := json.Unmarshal([]byte(read(t, first.key+".enrollment")), &record); err != nil || record.KeyID == "" {
		t.Fatalf("%v %+v", err, record)
	}
	elsewhere := harness.Org()
	s.Generate(t, elsewhere)
	for _, named := range []string{"", record.KeyID} {
		node := client.Node{Client: s.Client(t, elsewhere, "OWNER"), Org: elsewhere, IP: "192.0.2.81", Region: "eu", Key: key, KeyID: named}
		if _, err := node.Secrets(t.Context()); !errors.Is(err, client.BadSignature) {
			t.Errorf("in another organization, named %q: %v", named, err)
		}
	}
	third := newEnrolling(t, s.API, mint(t, s, org, `{"origin":"node","ip":"192.0.2.83"}`).Token)
	third.run(77, "was enrolled for another address than 192.0.2.84", boot[0], append(boot[1:], "--ip", "192.0.2.84")...)
	third.run(0, "registered 192.0.2.83", "boot", "--ip", "192.0.2.83")
	var outcome struct{ KeyID string }
	if out := second.run(0, "", "status", "--json", "--tpm", device.Socket); json.Unmarshal([]byte(out), &outcome) != nil {
		t.Fatal(out)
	}
	s.Do(t, harness.Request{Method: "DELETE", Path: harness.KeyPath(org) + "/" + outcome.KeyID, Token: s.Token(t, org, "OWNER")}).
		Want(t, 200, "Organization key deleted successfully")
	second.run(77, "does not accept this key", "register", "--ip", "192.0.2.82", "--tpm", device.Socket)
	first.run(0, "registered 192.0.2.81", "register", "--ip", "192.0.2.81")
	// Nor does it outlive its node, at whatever address.
	owner := s.Client(t, org, "OWNER")
	nodes, err := owner.Nodes(t.Context(), org)
	if err != nil {
		t.Fatal(err)
	}
	deleted := 0
	for _, n := range nodes {
		if n.IP != "192.0.2.81" {
			continue
		}
		if err := owner.DeleteNode(t.Context(), org, n.ID); err != nil {
			t.Fatal(err)
		}
		deleted++
	}
	if deleted != 1 {
		t.Errorf("%d nodes at the address, want 1", deleted)
	}
	for _, ip := range []string{"192.0.2.81", "192.0.2.85"} {
		for _, command := range []string{"register", "secrets", "unregister"} {
			first.run(77, "does not accept this key", command, "--ip", ip)
		}
	}
	third.run(0, "registered 192.0.2.83", "register", "--ip", "192.0.2.83")
}

// A key in the TPM registers, fetches and opens secrets, and unregisters. The TPM
// is restarted between any two steps.
func TestFirstBootInTheTPM(t *testing.T) {
	t.Parallel()
	s := harness.Start(t)
	org := harness.Org()
	s.PutSecret(t, org, "env_s3", []byte("A=1"))
	device, second := tpmtest.Start(t), tpmtest.Start(t)
	ek := ekOf(t, device)
	inTPM := []string{"--origin", "node", "--tpm", device.Socket}
	m := mint(t, s, org, `{"origin":"node","bind":{"ek":"`+ek+`"}}`)

	// Neither a key in a file nor another TPM gets in with the token.
	e := newEnrolling(t, s.API, m.Token)
	e.run(77, "is for a key in a TPM", "enroll", "--wait", "forever", "--origin", "node")
	thief := newEnrolling(t, s.API, m.Token)
	thief.run(77, "the server does not allow the TPM", "enroll", "--wait", "forever", "--origin", "node", "--tpm", second.Socket)
	if shown := enrollments(t, s, org, m.ID); !strings.Contains(shown, `"conflicts":2`) || !strings.Contains(shown, `"state":"open"`) {
		t.Errorf("the administrator sees %s", shown)
	}
	e.run(64, "is a key in a file, and --tpm is set", "enroll", append([]string{"--wait", "0s"}, inTPM...)...)
	if err := os.Remove(filepath.Join(e.dir, "key.pem.recipient")); err != nil {
		t.Fatal(err)
	}

	e.run(0, "enrolled key", "enroll", inTPM...)
	e.has("key.pem", "key.pem.enrollment")
	text, err := os.ReadFile(e.key)
	if err != nil || !tpmdevice.IsKey(text) {
		t.Fatalf("the key file has %q, %v", text, err)
	}
	shown := enrollments(t, s, org, m.ID)
	if !strings.Contains(shown, `"ek":"`+ek+`","evidence":"enrollment"`) || !strings.Contains(shown, `"state":"received"`) {
		t.Errorf("the administrator sees %s", shown)
	}
	device.Restart(t)
	e.run(0, "1 secrets written, 0 unchanged, registered 192.0.2.7", "boot", "--tpm", device.Socket)
	if text, err := os.ReadFile(filepath.Join(e.dir, "env_s3")); err != nil || string(text) != "A=1" {
		t.Errorf("env_s3 holds %q, %v", text, err)
	}
	// A machine with the organization's key goes on beside it.
	beside := newMachine(t, s.API)
	beside.install(s.Generate(t, org).PEM)
	if out, err := beside.command(org, "boot", "--ip", "192.0.2.200").CombinedOutput(); err != nil {
		t.Errorf("with the organization's key: %v %s", err, out)
	}
	device.Restart(t)
	e.run(0, " in the TPM "+device.Socket+" (enrolled), 1 secrets in ", "status", "--tpm", device.Socket)
	e.run(0, "unregistered", "unregister", "--tpm", device.Socket)

	// What is wrong with the TPM is told apart.
	e.run(78, "there is no TPM at /nonexistent", "boot", "--wait", "0s", "--tpm", "/nonexistent")
	e.run(78, "was cleared, or is not the one that made the key", "boot", "--wait", "0s", "--tpm", second.Socket)
	device.Clear(t)
	e.run(78, "was cleared, or is not the one that made the key", "status", "--tpm", device.Socket)
	// The EK outlives it: a new token brings a new key.
	if err := os.Remove(e.key); err != nil {
		t.Fatal(err)
	}
	e.put(mint(t, s, org, `{"origin":"node","bind":{"ek":"`+ek+`"}}`).Token)
	e.run(0, "registered 192.0.2.8", "boot", append([]string{"--ip", "192.0.2.8"}, inTPM...)...)
}

// onceWaiting runs a command, calls do as soon as it waits for something with text in
// it, and checks that it ends well.
func (e *enrolling) onceWaiting(text string, do func(), command string, more ...string) {
	e.t.Helper()
	cmd := e.command(command, more...)
	stderr, err := cmd.StderrPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		e.t.Fatal(err)
	}
	var out strings.Builder
	waited := false
	for lines := bufio.NewScanner(stderr); lines.Scan(); {
		fmt.Fprintln(&out, lines.Text())
		if !waited && strings.Contains(lines.Text(), "waiting: ") && strings.Contains(lines.Text(), text) {
			waited = true
			do()
		}
	}
	if err := cmd.Wait(); err != nil || !waited {
		e.t.Fatalf("%s %q: %v, waited %t, printed %s", command, more, err, waited, &out)
	}
}

// A driver makes a TPM's device later than a unit starts, at any boot.
func TestATPMThatComesLaterIsWaitedFor(t *testing.T) {
	t.Parallel()
	s := harness.Start(t)
	org := harness.Org()
	s.PutSecret(t, org, "env_s3", []byte("A=1"))
	device := tpmtest.Start(t)
	allow(t, s, org, ekOf(t, device))
	path := filepath.Join(filepath.Dir(device.Socket), "later")
	appear := func() {
		if err := os.Symlink(device.Socket, path); err != nil {
			t.Error(err)
		}
	}
	vanish := func() {
		if err := os.Remove(path); err != nil {
			t.Error(err)
		}
	}
	waits := []string{"--wait", "2m", "--tpm", path}
	e := newEnrolling(t, s.API, mint(t, s, org, `{"origin":"node"}`).Token)
	e.onceWaiting("there is no TPM at "+path, appear, "boot", append(waits, "--origin", "node")...)
	for _, command := range []string{"boot", "secrets", "register", "unregister"} {
		vanish()
		e.onceWaiting("there is no TPM at "+path, appear, command, waits...)
	}
	device.Stop(t)
	e.onceWaiting("there is no TPM at "+path, func() { device.Restart(t) }, "boot", waits...)

	// Nor is a sealed key given up that came while the TPM was away.
	target, err := url.Parse(s.API)
	if err != nil {
		t.Fatal(err)
	}
	came := false
	proxy := httputil.NewSingleHostReverseProxy(target)
	proxy.ModifyResponse = func(r *http.Response) error {
		body, err := io.ReadAll(r.Body)
		r.Body = io.NopCloser(bytes.NewReader(body))
		if bytes.Contains(body, []byte(`"sealed":`)) && !came {
			came = true
			vanish()
		}
		return err
	}
	between := httptest.NewServer(proxy)
	defer between.Close()
	e = newEnrolling(t, between.URL, mint(t, s, org, `{"bind":{"tpm":true}}`).Token)
	e.onceWaiting("there is no TPM at "+path, appear, "boot", append(waits, "--ip", "192.0.2.8")...)
}

// Deployed scripts with the organization's key, nodes that made their keys with
// nothing but openssl, and nodes with a TPM are one organization: each of them
// works beside the others, and goes on when another one's key is deleted.
func TestDeployedScriptsBesideNodesWithATPM(t *testing.T) {
	t.Parallel()
	s := harness.Start(t)
	org := harness.Org()
	value := "A='1'\nB=\x00\xff\n"
	s.PutSecret(t, org, "env_s3", []byte(value))
	device := tpmtest.Start(t)
	inTPM := []string{"--ip", "192.0.2.91", "--tpm", device.Socket}
	e := newEnrolling(t, s.API, mint(t, s, org, `{"origin":"node","bind":{"ek":"`+ekOf(t, device)+`"}}`).Token)
	boots := func() {
		t.Helper()
		e.run(0, "registered 192.0.2.91", "boot", append([]string{"--origin", "node"}, inTPM...)...)
	}
	boots()

	dir := t.TempDir()
	deployed, token, own := filepath.Join(dir, "deployed.pem"), filepath.Join(dir, "token"), filepath.Join(dir, "own")
	organization := s.Generate(t, org)
	if err := os.WriteFile(deployed, organization.PEM, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(token, []byte(mint(t, s, org, `{"origin":"node"}`).Token), 0o600); err != nil {
		t.Fatal(err)
	}
	script := func(path string, args ...string) (string, error) {
		cmd := exec.Command(path, args...)
		cmd.Env = append(os.Environ(), "no_proxy=*", "NO_PROXY=*")
		out, err := cmd.CombinedOutput()
		return string(out), err
	}
	if out, err := script("../../examples/enroll.sh", "--server", s.API, "--token-file", token, "--dir", own, "--origin", "node"); err != nil {
		t.Fatalf("%v %s", err, out)
	}
	var answer struct{ KeyID string }
	if err := json.Unmarshal([]byte(read(t, filepath.Join(own, "enrollment.json"))), &answer); err != nil {
		t.Fatal(err)
	}
	// The script does not name its key: the service finds a node key by the address
	// that it is bound to, which one request with the key's name does.
	key := harness.ParsePrivate(t, []byte(read(t, filepath.Join(own, "private_key.pem"))))
	node := client.Node{Client: s.Client(t, org, "OWNER"), Org: org, IP: "192.0.2.92", Region: "eu-west-1", Key: key, KeyID: answer.KeyID}
	if err := node.Register(t.Context(), client.Registration{Version: "1", Status: "active"}); err != nil {
		t.Fatal(err)
	}
	// client.sh registers, opens every secret, and unregisters.
	speaks := func(key, ip string) error {
		t.Helper()
		secrets := t.TempDir()
		out, err := script("../../internal/node/testdata/client.sh", s.API, org, key, ip, "eu-west-1", secrets)
		if err != nil {
			return fmt.Errorf("%w: %s", err, out)
		}
		if got, err := os.ReadFile(filepath.Join(secrets, "env_s3")); err != nil || string(got) != value {
			return fmt.Errorf("it got %q, %w", got, err)
		}
		return nil
	}
	scripts := map[string]string{deployed: "192.0.2.93", filepath.Join(own, "private_key.pem"): "192.0.2.92"}
	for key, ip := range scripts {
		if err := speaks(key, ip); err != nil {
			t.Errorf("%s: %v", ip, err)
		}
		// Nor does any of them take the place of the node with the TPM.
		if key != deployed {
			if err := speaks(key, "192.0.2.91"); err == nil {
				t.Error("a node key registers the address of the node with the TPM")
			}
		}
	}
	boots()
	var outcome struct{ KeyID string }
	if out := e.run(0, "", "status", "--json", "--tpm", device.Socket); json.Unmarshal([]byte(out), &outcome) != nil {
		t.Fatal(out)
	}
	owner := s.Client(t, org, "OWNER")
	if err := owner.DeleteKey(t.Context(), org, outcome.KeyID); err != nil {
		t.Fatal(err)
	}
	e.run(77, "does not accept this key", "register", inTPM...)
	for key, ip := range scripts {
		if err := speaks(key, ip); err != nil {
			t.Errorf("%s, after the key in the TPM was deleted: %v", ip, err)
		}
	}
	if err := owner.DeleteKey(t.Context(), org, organization.ID); err != nil {
		t.Fatal(err)
	}
	if err := speaks(deployed, "192.0.2.93"); err == nil {
		t.Error("a deleted key of the organization works")
	}
	if err := speaks(filepath.Join(own, "private_key.pem"), "192.0.2.92"); err != nil {
		t.Errorf("after the organization's key was deleted: %v", err)
	}
}

// A recipient in the TPM opens the key that the back end made. The organization's
// list lets TPMs in, and one TPM takes no more than one use of a token.
func TestARecipientInTheTPM(t *testing.T) {
	t.Parallel()
	s := harness.Start(t)
	org := harness.Org()
	device := tpmtest.Start(t)
	m := mint(t, s, org, `{"uses":3,"bind":{"tpm":true}}`)
	e := newEnrolling(t, s.API, m.Token)
	e.run(77, "orgkeys-node ek names it", "enroll", "--wait", "forever", "--tpm", device.Socket)
	ek := ekOf(t, device)
	allow(t, s, org, ek)
	allow(t, s, org, ek)
	list := s.Do(t, harness.Request{Method: "GET", Path: "/organization/" + org + "/device", Token: s.Token(t, org, "ADMINISTRATOR")})
	if !strings.Contains(string(list.Body), ek) || !strings.Contains(string(list.Body), `"total":1`) {
		t.Errorf("the list is %s", list.Body)
	}
	e.run(0, "registered", "boot", "--tpm", device.Socket)
	if shown := enrollments(t, s, org, m.ID); !strings.Contains(shown, `"ek":"`+ek+`","evidence":"list"`) {
		t.Errorf("the administrator sees %s", shown)
	}
	again := newEnrolling(t, s.API, m.Token)
	again.run(77, "another recipient", "enroll", "--wait", "forever", "--tpm", device.Socket)
	one := "/organization/" + org + "/device/" + ek
	owner := s.Token(t, org, "OWNER")
	s.Do(t, harness.Request{Method: "GET", Path: one, Token: owner}).Want(t, 200, "Device retrieved")
	s.Do(t, harness.Request{Method: "DELETE", Path: one, Token: owner}).Want(t, 200, "Device removed. Keys in it stay: delete them if they are to end.")
	s.Do(t, harness.Request{Method: "DELETE", Path: one, Token: owner}).Want(t, 404, "Device not found")
	s.Do(t, harness.Request{Method: "PUT", Path: "/organization/" + org + "/device/sha256-xyz", Token: owner}).Want(t, 400, `ek is not "sha256-" and 64 lower-case hex digits`)
	s.Do(t, harness.Request{Method: "PUT", Path: one, Token: s.Token(t, org, "USER")}).Want(t, 403, "Insufficient permissions: only OWNER and ADMINISTRATOR roles can manage devices")
	e.run(0, "registered", "boot")
}

// A TPM of a maker that the operator trusts needs no list, and one of another
// maker is not let in.
func TestATPMOfATrustedMaker(t *testing.T) {
	t.Parallel()
	sold, authorities := tpmtest.Manufacture(t)
	other, _ := tpmtest.Manufacture(t)
	roots := filepath.Join(t.TempDir(), "roots.pem")
	if err := os.WriteFile(roots, authorities, 0o600); err != nil {
		t.Fatal(err)
	}
	s := harness.Start(t, harness.Set("ORGKEYS_TPM_ROOTS_FILE", roots))
	org := harness.Org()
	m := mint(t, s, org, `{"origin":"node","bind":{"tpm":true},"uses":2}`)
	e := newEnrolling(t, s.API, m.Token)
	e.run(77, "the server does not allow the TPM", "enroll", "--wait", "forever", "--origin", "node", "--tpm", other.Socket)
	e = newEnrolling(t, s.API, m.Token)
	e.run(0, "registered", "boot", "--origin", "node", "--tpm", sold.Socket)
	ek := ekOf(t, sold)
	if shown := enrollments(t, s, org, m.ID); !strings.Contains(shown, `"ek":"`+ek+`","evidence":"certificate"`) || !strings.Contains(shown, `"conflicts":1`) {
		t.Errorf("the administrator sees %s", shown)
	}
	// It has one use of the token, though it can make as many keys as it likes.
	again := newEnrolling(t, s.API, m.Token)
	again.run(77, "another recipient", "enroll", "--wait", "forever", "--origin", "node", "--tpm", sold.Socket)
	// A token for another TPM, or for none, is not one for any of a trusted maker's, or for any.
	for terms, device := range map[string]*tpmtest.TPM{`"bind":{"ek":"` + ekOf(t, other) + `"}`: sold, `"uses":1`: other} {
		m := mint(t, s, org, `{"origin":"node",`+terms+`}`)
		e := newEnrolling(t, s.API, m.Token)
		e.run(77, "the server does not allow the TPM", "enroll", "--wait", "forever", "--origin", "node", "--tpm", device.Socket)
		if shown := enrollments(t, s, org, m.ID); !strings.Contains(shown, `"claims":[]`) {
			t.Errorf("with %s: %s", terms, shown)
		}
	}
	// Where the enrollment names the TPM, that is why it is let in.
	m = mint(t, s, org, `{"origin":"node","bind":{"ek":"`+ek+`"}}`)
	e = newEnrolling(t, s.API, m.Token)
	e.run(0, "registered", "boot", "--ip", "192.0.2.8", "--origin", "node", "--tpm", sold.Socket)
	if shown := enrollments(t, s, org, m.ID); !strings.Contains(shown, `"evidence":"enrollment"`) {
		t.Errorf("the administrator sees %s", shown)
	}
	// Nobody's certificate is believed where the operator names no maker.
	s = harness.Start(t)
	e = newEnrolling(t, s.API, mint(t, s, org, `{"origin":"node","bind":{"tpm":true}}`).Token)
	e.run(77, "the server does not allow the TPM", "enroll", "--wait", "forever", "--origin", "node", "--tpm", sold.Socket)
}

// A liar says of a key in a TPM what is not so.
type liar struct {
	ek       string
	public   []byte
	activate func(idObject, encSecret []byte) ([]byte, error)
}

func (l liar) EK(context.Context) (string, error) { return l.ek, nil }
func (l liar) PublicArea() []byte                 { return l.public }
func (l liar) Activate(_ context.Context, idObject, encSecret []byte) ([]byte, error) {
	return l.activate(idObject, encSecret)
}

// areaOf is what a TPM would say of a key made in it.
func areaOf(key *rsa.PublicKey, exponent uint32, change func(*tpm2.TPMTPublic)) []byte {
	area := tpm2.TPMTPublic{
		Type: tpm2.TPMAlgRSA, NameAlg: tpm2.TPMAlgSHA256,
		ObjectAttributes: tpm2.TPMAObject{FixedTPM: true, FixedParent: true, SensitiveDataOrigin: true, UserWithAuth: true, NoDA: true, Decrypt: true, SignEncrypt: true},
		Parameters: tpm2.NewTPMUPublicParms(tpm2.TPMAlgRSA, &tpm2.TPMSRSAParms{
			Symmetric: tpm2.TPMTSymDefObject{Algorithm: tpm2.TPMAlgNull}, Scheme: tpm2.TPMTRSAScheme{Scheme: tpm2.TPMAlgNull},
			KeyBits: tpm2.TPMKeyBits(key.N.BitLen()), Exponent: exponent,
		}),
		Unique: tpm2.NewTPMUPublicID(tpm2.TPMAlgRSA, &tpm2.TPM2BPublicKeyRSA{Buffer: key.N.Bytes()}),
	}
	change(&area)
	return tpm2.Marshal(area)
}

// Whatever is said of a key, only one that the TPM has gets in.
func TestPromise13_WhatIsSaidOfATPMIsNotBelieved(t *testing.T) {
	t.Parallel()
	s := harness.Start(t)
	org := harness.Org()
	real := tpmtest.Start(t)
	d := tpmdevice.Device{Path: real.Socket}
	allow(t, s, org, ekOf(t, real))
	endorsement, err := d.Endorsement(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	key, err := d.Create(t.Context(), tpmdevice.Speaking)
	if err != nil {
		t.Fatal(err)
	}
	software, err := client.NewOwnKey()
	if err != nil {
		t.Fatal(err)
	}
	m := mint(t, s, org, `{"origin":"node","bind":{"tpm":true},"uses":2}`)
	announce := func(own crypto.Signer, l client.TPM) error {
		e, err := client.NewEnrollment(s.Client(t, org, "OWNER"), []byte(m.Token), nil)
		if err != nil {
			t.Fatal(err)
		}
		defer e.Close()
		e.TPM = l
		_, err = e.Announce(t.Context(), own)
		return err
	}
	guess := func([]byte, []byte) ([]byte, error) { return make([]byte, 32), nil }
	withKey := func(idObject, encSecret []byte) ([]byte, error) {
		return key.Activate(t.Context(), idObject, encSecret)
	}
	as := func(change func(*tpm2.TPMTPublic)) client.TPM {
		return liar{endorsement.PEM, areaOf(&software.PublicKey, 0, change), guess}
	}
	attribute := func(change func(*tpm2.TPMAObject)) client.TPM {
		return as(func(p *tpm2.TPMTPublic) { change(&p.ObjectAttributes) })
	}
	for what, c := range map[string]struct {
		tpm  client.TPM
		want error
	}{
		"a key in a file, with a guess": {as(func(*tpm2.TPMTPublic) {}), client.BadSignature},
		"a key in a file, the TPM's challenge answered for another": {
			liar{endorsement.PEM, areaOf(&software.PublicKey, 65537, func(*tpm2.TPMTPublic) {}), func(i, e []byte) ([]byte, error) {
				secret, err := withKey(i, e)
				if !errors.Is(err, tpmdevice.ErrDecryption) {
					t.Errorf("the TPM answers a challenge for another key: %v", err)
				}
				return secret, nil
			}}, client.BadSignature},
		"the public area of another key": {liar{endorsement.PEM, key.PublicArea(), withKey}, client.RecipientUnacceptable},
		"without fixedTPM":               {attribute(func(a *tpm2.TPMAObject) { a.FixedTPM = false }), client.RecipientUnacceptable},
		"without fixedParent":            {attribute(func(a *tpm2.TPMAObject) { a.FixedParent = false }), client.RecipientUnacceptable},
		"without sensitiveDataOrigin":    {attribute(func(a *tpm2.TPMAObject) { a.SensitiveDataOrigin = false }), client.RecipientUnacceptable},
		"restricted":                     {attribute(func(a *tpm2.TPMAObject) { a.Restricted = true }), client.RecipientUnacceptable},
		"signs only":                     {attribute(func(a *tpm2.TPMAObject) { a.Decrypt = false }), client.RecipientUnacceptable},
		"decrypts only":                  {attribute(func(a *tpm2.TPMAObject) { a.SignEncrypt = false }), client.RecipientUnacceptable},
		"used by a policy":               {attribute(func(a *tpm2.TPMAObject) { a.AdminWithPolicy = true }), client.RecipientUnacceptable},
		"SHA-384 Name":                   {as(func(p *tpm2.TPMTPublic) { p.NameAlg = tpm2.TPMAlgSHA384 }), client.RecipientUnacceptable},
		"bytes behind it":                {liar{endorsement.PEM, append(bytes.Clone(key.PublicArea()), 0), withKey}, client.RecipientUnacceptable},
		"half of it":                     {liar{endorsement.PEM, key.PublicArea()[:40], withKey}, client.RecipientUnacceptable},
		"no EK":                          {liar{"", key.PublicArea(), withKey}, client.InvalidRequest},
	} {
		t.Run(what, func(t *testing.T) {
			if err := announce(software, c.tpm); !errors.Is(err, c.want) {
				t.Errorf("%v, want %v", err, c.want)
			}
		})
	}
	// The other form of the exponent is another Name, which the TPM does not have.
	other := areaOf(key.Public().(*rsa.PublicKey), 65537, func(*tpm2.TPMTPublic) {})
	if err := announce(key, liar{endorsement.PEM, other, func(i, e []byte) ([]byte, error) {
		if _, err := withKey(i, e); err == nil {
			t.Error("the TPM answers for the other form of its key")
		}
		return make([]byte, 32), nil
	}}); !errors.Is(err, client.BadSignature) {
		t.Errorf("with the other Name: %v", err)
	}
	// A public half that somebody loaded has every attribute, and answers nothing.
	real.Do(t, func(raw transport.TPM) {
		area, err := tpm2.Unmarshal[tpm2.TPMTPublic](areaOf(&software.PublicKey, 0, func(p *tpm2.TPMTPublic) {}))
		if err != nil {
			t.Fatal(err)
		}
		loaded, err := tpm2.LoadExternal{InPublic: tpm2.New2B(*area), Hierarchy: tpm2.TPMRHOwner}.Execute(raw)
		if err != nil {
			t.Fatalf("loading a public half: %v", err)
		}
		_, err = tpm2.RSADecrypt{
			KeyHandle:  tpm2.AuthHandle{Handle: loaded.ObjectHandle, Name: loaded.Name, Auth: tpm2.PasswordAuth(nil)},
			CipherText: tpm2.TPM2BPublicKeyRSA{Buffer: make([]byte, 256)}, InScheme: tpm2.TPMTRSADecrypt{Scheme: tpm2.TPMAlgNull},
		}.Execute(raw)
		if err == nil {
			t.Error("a public half decrypts")
		}
		if _, err := (tpm2.FlushContext{FlushHandle: loaded.ObjectHandle}).Execute(raw); err != nil {
			t.Error(err)
		}
	})
	if shown := enrollments(t, s, org, m.ID); !strings.Contains(shown, `"claims":[]`) {
		t.Errorf("a lie got in: %s", shown)
	}
	// The truth gets in, and again.
	for range 2 {
		if err := announce(key, key); err != nil {
			t.Fatal(err)
		}
	}
	// Nor is its key taken a second time, by another enrollment.
	m = mint(t, s, org, `{"origin":"node"}`)
	if err := announce(key, key); !errors.Is(err, client.RecipientUnacceptable) {
		t.Errorf("one key by two enrollments: %v", err)
	}
}

// However often the node is killed, at whatever moment, and its TPM reset, it ends
// with one key, which the server knows.
func TestPromise12_ANodeKilledAtAnyMomentEndsWithOneKeyInItsTPM(t *testing.T) {
	t.Parallel()
	kills := 12
	if os.Getenv("ORGKEYS_TEST_LONG") != "" {
		kills = 200
	}
	s := harness.Start(t)
	org := harness.Org()
	device := tpmtest.Start(t)
	ek := ekOf(t, device)
	for killed, round := 0, 0; killed < kills; round++ {
		m := mint(t, s, org, `{"origin":"node","bind":{"ek":"`+ek+`"}}`)
		e := newEnrolling(t, s.API, m.Token)
		for ended := false; !ended; {
			cmd := e.command("enroll", "--wait", "2m", "--origin", "node", "--tpm", device.Socket)
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			done := make(chan error, 1)
			go func() { done <- cmd.Wait() }()
			select {
			case err := <-done:
				if ended = err == nil; !ended {
					t.Fatalf("enroll: %v", err)
				}
			case <-time.After(time.Duration(mathrand.IntN(400)) * time.Millisecond):
				_ = cmd.Process.Kill() // it may have ended meanwhile
				ended = <-done == nil
				if killed++; killed%3 == 0 {
					device.Restart(t)
				}
			}
		}
		e.run(0, "was enrolled before", "enroll", "--tpm", device.Socket)
		e.has("key.pem", "key.pem.enrollment")
		var outcome struct{ KeyFingerprint, State string }
		if out := e.run(0, "", "status", "--json", "--tpm", device.Socket); json.Unmarshal([]byte(out), &outcome) != nil || outcome.State != "enrolled" {
			t.Fatalf("status says %+v", outcome)
		}
		if shown := enrollments(t, s, org, m.ID); !strings.Contains(shown, outcome.KeyFingerprint) || !strings.Contains(shown, `"conflicts":0`) || strings.Count(shown, `"keyId"`) != 1 {
			t.Fatalf("round %d: the node has %s, the administrator sees %s", round, outcome.KeyFingerprint, shown)
		}
	}
}

// An administrator's own key needs a policy that lets them.
func TestAnAdministratorsOwnKeyIsOffByDefault(t *testing.T) {
	s := harness.Start(t)
	org := harness.Org()
	key, err := client.NewOwnKey()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Client(t, org, "OWNER").AddKey(t.Context(), org, key); !errors.Is(err, client.InsufficientRole) {
		t.Errorf("without a policy of one's own: %v", err)
	}
	policy := t.TempDir()
	text := read(t, "../../policies/authz.rego")
	changed := strings.Replace(text, `"orgkey.add": {}`, `"orgkey.add": {"OWNER": "organization"}`, 1)
	if changed == text {
		t.Fatal("the policy has no orgkey.add")
	}
	if err := os.WriteFile(filepath.Join(policy, "authz.rego"), []byte(changed), 0o600); err != nil {
		t.Fatal(err)
	}
	s = harness.Start(t, harness.Set("ORGKEYS_POLICY_DIR", policy))
	owner := s.Client(t, org, "OWNER")
	first, err := owner.AddKey(t.Context(), org, key)
	if err != nil {
		t.Fatal(err)
	}
	if again, err := owner.AddKey(t.Context(), org, key); err != nil || again.KeyID != first.KeyID {
		t.Errorf("the same key again: %+v, %v", again, err)
	}
	keys := s.List(t, org)
	if len(keys) != 1 || !keys[0].Public(t).Equal(&key.PublicKey) {
		t.Errorf("the organization has %+v", keys)
	}
	stranger, err := client.NewOwnKey()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := owner.AddKey(t.Context(), org, mismatched{key, stranger}); !errors.Is(err, client.BadSignature) {
		t.Errorf("another's signature: %v", err)
	}
	short, err := rsa.GenerateKey(rand.Reader, 3072)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := owner.AddKey(t.Context(), org, short); !errors.Is(err, client.RecipientUnacceptable) {
		t.Errorf("another size: %v", err)
	}
	node := client.Node{Client: owner, Org: org, IP: "192.0.2.9", Region: "eu", Key: key}
	if err := node.Register(t.Context(), client.Registration{Version: "1", Status: "active"}); err != nil {
		t.Error(err)
	}
}

// mismatched has the public half of one key, and signs with another.
type mismatched struct{ public, private *rsa.PrivateKey }

func (m mismatched) Public() crypto.PublicKey { return &m.public.PublicKey }

func (m mismatched) Sign(_ io.Reader, digest []byte, o crypto.SignerOpts) ([]byte, error) {
	return m.private.Sign(nil, digest, o)
}

// The program is small enough for a machine image, and needs nothing beside it.
func TestTheProgramIsSmallAndStatic(t *testing.T) {
	info, err := os.Stat(binary)
	if err != nil || info.Size() > 12<<20 {
		t.Errorf("%d bytes, %v; want at most 12 MiB", info.Size(), err)
	}
	if out, err := exec.Command("ldd", binary).CombinedOutput(); err == nil {
		t.Errorf("it is not static: %s", out)
	}
}
