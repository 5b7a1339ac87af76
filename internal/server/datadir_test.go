package server

import (
	"log/slog"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/orgkeys/orgkeys/internal/config"
	"github.com/orgkeys/orgkeys/internal/sqlstore"
)

// Machines from one image have one host name, and their data directories one path.
func TestReplicasOfOneImageHaveNamesOfTheirOwn(t *testing.T) {
	holder := func(path string) string {
		t.Helper()
		dir, err := OpenDataDir(path)
		if err != nil {
			t.Fatal(err)
		}
		defer dir.Close()
		own, err := dir.own()
		if err != nil {
			t.Fatal(err)
		}
		name, err := sqlstore.Holder("/var/lib/orgkeys", own)
		if err != nil {
			t.Fatal(err)
		}
		return name
	}
	one, other := filepath.Join(t.TempDir(), "data"), filepath.Join(t.TempDir(), "data")
	first := holder(one)
	if holder(one) != first {
		t.Error("a replica has another name after a restart")
	}
	if holder(other) == first {
		t.Error("two replicas have one name")
	}
}

// Whatever opens the back end, a server or a command, holds what a core dump would show.
func TestWhoOpensTheBackEndHidesItsMemory(t *testing.T) {
	dumpable := func() int {
		t.Helper()
		n, err := unix.PrctlRetInt(unix.PR_GET_DUMPABLE, 0, 0, 0, 0)
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	mask := unix.Umask(0o022)
	t.Cleanup(func() { unix.Umask(mask) })
	if err := unix.Prctl(unix.PR_SET_DUMPABLE, 1, 0, 0, 0); err != nil {
		t.Fatal(err)
	}
	cfg := config.Config{Keystore: config.KeystoreVault, VaultAuth: config.VaultTokenFile, VaultTokenFile: filepath.Join(t.TempDir(), "none")}
	if b, err := openBackend(t.Context(), cfg, t.TempDir(), nil, slog.New(slog.DiscardHandler)); err == nil {
		b.close()
		t.Fatal("a Vault without a token was opened")
	}
	if n := dumpable(); n != 0 {
		t.Errorf("the process's dumpable flag is %d", n)
	}
}
