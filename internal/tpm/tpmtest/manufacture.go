package tpmtest

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
)

// Manufacture starts a TPM as its maker sells it: with endorsement keys, RSA-2048
// and P-384, and their certificates in it. authorities are those of the maker, PEM.
func Manufacture(t testing.TB) (p *TPM, authorities []byte) {
	t.Helper()
	dir := t.TempDir()
	in := func(name string) string { return filepath.Join(dir, name) }
	for _, name := range []string{"state", "ca"} {
		if err := os.Mkdir(in(name), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	for name, text := range map[string]string{
		"ca.conf":    fmt.Sprintf("statedir = %s\nsigningkey = %s\nissuercert = %s\ncertserial = %s\n", in("ca"), in("ca/key.pem"), in("ca/issuer.pem"), in("ca/serial")),
		"options":    "--platform-manufacturer Test\n--platform-version 1\n--platform-model Test\n",
		"setup.conf": fmt.Sprintf("create_certs_tool = /usr/bin/swtpm_localca\ncreate_certs_tool_config = %s\ncreate_certs_tool_options = %s\n", in("ca.conf"), in("options")),
	} {
		if err := os.WriteFile(in(name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	cmd := exec.Command("swtpm_setup", "--tpm2", "--tpmstate", in("state"), "--config", in("setup.conf"), "--create-ek-cert", "--lock-nvram")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("swtpm_setup is needed (Debian: swtpm-tools): %v %s", err, out)
	}
	for _, name := range []string{"ca/issuer.pem", "ca/swtpm-localca-rootca-cert.pem"} {
		text, err := os.ReadFile(in(name))
		if err != nil {
			t.Fatal(err)
		}
		authorities = append(authorities, text...)
	}
	return start(t, in("state")), authorities
}
