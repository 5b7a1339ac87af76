// Package providertest runs real OpenID providers for tests: the programs of
// internal/authn/providers, each over https on a loopback port of its own.
package providertest

import (
	"bufio"
	"crypto/tls"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/orgkeys/orgkeys/internal/sourcetree"
	"github.com/orgkeys/orgkeys/internal/testca"
)

// Provider is one that runs.
type Provider struct {
	Issuer string
	CA     *testca.CA // signed its certificate
}

// Start runs the program with that name until the test ends. The arguments come after
// the certificate and its key.
func Start(t testing.TB, name string, args ...string) *Provider {
	t.Helper()
	p := &Provider{CA: testca.New(t)}
	certificate := p.CA.Issue(t, name)
	command := append(program(t, name), certificate.Cert, certificate.Key)
	cmd := exec.Command(command[0], append(command[1:], args...)...)
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = stdin.Close(); _ = cmd.Wait() }) // it ends with its input
	line, err := bufio.NewReader(stdout).ReadString('\n')
	if err != nil {
		t.Fatalf("%s does not print its issuer: %v", name, err)
	}
	go func() { _, _ = io.Copy(io.Discard, stdout) }()
	p.Issuer = strings.TrimSpace(line)
	return p
}

// program is the command that runs the provider with that name, which is built if it has not been yet.
func program(t testing.TB, name string) []string {
	t.Helper()
	root, err := sourcetree.Root()
	if err != nil {
		t.Fatal(err)
	}
	build := exec.CommandContext(t.Context(), filepath.Join(root, "internal", "authn", "providers", "build"))
	build.Stderr = os.Stderr
	out, err := build.Output()
	if err != nil {
		t.Fatalf("building the providers: %v", err)
	}
	path := filepath.Join(strings.TrimSpace(string(out)), name)
	script := filepath.Join(path, "server.mjs")
	if _, err := os.Stat(script); err == nil {
		return []string{"node", script}
	}
	return []string{path}
}

// Client trusts the provider's authority alone.
func (p *Provider) Client(t testing.TB) *http.Client {
	t.Helper()
	transport := &http.Transport{TLSClientConfig: &tls.Config{RootCAs: p.CA.Pool()}}
	t.Cleanup(transport.CloseIdleConnections)
	return &http.Client{Transport: transport, Timeout: 30 * time.Second}
}
