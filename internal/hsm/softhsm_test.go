//go:build cgo

package hsm

import (
	"bytes"
	"errors"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/miekg/pkcs11"

	"github.com/orgkeys/orgkeys/internal/orgkey"
)

// checkUsable opens the token under dir and uses it.
func checkUsable(t *testing.T, dir string) {
	t.Helper()
	cfg, _, err := InitSoftHSM(dir)
	if err != nil {
		t.Fatalf("InitSoftHSM: %v", err)
	}
	token, err := Open(t.Context(), cfg)
	if err != nil {
		t.Fatalf("Open: %v", err)
	}
	defer func() {
		if err := token.Close(); err != nil {
			t.Errorf("Close: %v", err)
		}
	}()
	if err := KeepSoftHSM(dir); err != nil {
		t.Error(err)
	}
	item := orgkey.Sealed{Binding: orgkey.Binding{Org: "acme", ID: "one"}}
	if item.Ciphertext, err = token.Seal(bounded(t), item.Binding, []byte("value")); err != nil {
		t.Errorf("Seal: %v", err)
	}
	if _, err := token.Open(bounded(t), []orgkey.Sealed{item}); err != nil {
		t.Errorf("Open: %v", err)
	}
	if n := objects(t, token, pkcs11.NewAttribute(pkcs11.CKA_TOKEN, true)); n != 1 {
		t.Errorf("%d objects in the token, want the sealing key only", n)
	}
}

func TestInitSoftHSMIsDoneOnce(t *testing.T) {
	dir := t.TempDir()
	first, created, err := InitSoftHSM(dir)
	if err != nil || !created {
		t.Fatalf("the first time: created %v, %v", created, err)
	}
	pin, err := os.ReadFile(first.PINFile)
	if err != nil {
		t.Fatal(err)
	}
	second, created, err := InitSoftHSM(dir)
	if err != nil || created || second != first {
		t.Errorf("the second time: created %v, %+v, %v", created, second, err)
	}
	if again, err := os.ReadFile(first.PINFile); err != nil || string(again) != string(pin) {
		t.Errorf("the PIN changed: %v", err)
	}
	checkUsable(t, dir)
}

func TestInitSoftHSMKeepsItsFilesPrivate(t *testing.T) {
	dir := t.TempDir()
	cfg, _, err := InitSoftHSM(dir)
	if err != nil {
		t.Fatal(err)
	}
	err = filepath.WalkDir(dir, func(path string, _ fs.DirEntry, err error) error {
		if err != nil || path == dir {
			return err
		}
		info, err := os.Stat(path)
		if err == nil && info.Mode().Perm()&0o077 != 0 {
			t.Errorf("%s has mode %v", path, info.Mode())
		}
		if strings.HasSuffix(path, staging) {
			t.Errorf("%s is left", path)
		}
		return err
	})
	if err != nil {
		t.Error(err)
	}
	pin, err := readPIN(cfg.PINFile)
	if err != nil || len(pin) != 32 {
		t.Errorf("PIN of %d bytes, %v", len(pin), err)
	}
}

// Whatever an interrupted InitSoftHSM leaves, the next one makes a token of it.
func TestInitSoftHSMAfterACrash(t *testing.T) {
	write := func(t *testing.T, path, content string) {
		t.Helper()
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for name, leave := range map[string]func(t *testing.T, dir string){
		"half a PIN": func(t *testing.T, dir string) { write(t, filepath.Join(dir, "pin.new"), "01") },
		"a PIN":      func(t *testing.T, dir string) { write(t, filepath.Join(dir, "pin"), "0123456789") },
		"an empty store": func(t *testing.T, dir string) {
			write(t, filepath.Join(dir, "pin"), "0123456789")
			if err := os.Mkdir(filepath.Join(dir, "tokens.new"), 0o700); err != nil {
				t.Fatal(err)
			}
		},
		"a token without PIN": func(t *testing.T, dir string) {
			write(t, filepath.Join(dir, "pin"), "0123456789")
			if err := os.Mkdir(filepath.Join(dir, "tokens.new"), 0o700); err != nil {
				t.Fatal(err)
			}
			if err := useSoftHSM(filepath.Join(dir, "softhsm2.conf.new"), filepath.Join(dir, "tokens.new")); err != nil {
				t.Fatal(err)
			}
			module, err := FindSoftHSM()
			if err != nil {
				t.Fatal(err)
			}
			lib := begin(t, Config{Module: module})
			defer func() { _ = lib.Finalize() }()
			if err := lib.InitToken(0, "forgotten", softHSMLabel); err != nil {
				t.Fatal(err)
			}
		},
		"a whole token not yet in its place": func(t *testing.T, dir string) {
			if _, _, err := InitSoftHSM(dir); err != nil {
				t.Fatal(err)
			}
			if err := os.Rename(filepath.Join(dir, "tokens"), filepath.Join(dir, "tokens.new")); err != nil {
				t.Fatal(err)
			}
		},
		"no configuration": func(t *testing.T, dir string) {
			if _, _, err := InitSoftHSM(dir); err != nil {
				t.Fatal(err)
			}
			if err := os.Remove(filepath.Join(dir, "softhsm2.conf")); err != nil {
				t.Fatal(err)
			}
		},
		"the configuration of another directory": func(t *testing.T, dir string) {
			if _, _, err := InitSoftHSM(dir); err != nil {
				t.Fatal(err)
			}
			write(t, filepath.Join(dir, "softhsm2.conf"), "directories.tokendir = /nowhere\n")
		},
		"a login that has emptied the token's record": func(t *testing.T, dir string) { cutRecord(t, dir, func([]byte) []byte { return nil }) },
		"half of the token's record":                  func(t *testing.T, dir string) { cutRecord(t, dir, func(r []byte) []byte { return r[:len(r)/2] }) },
		"zeros for the token's record": func(t *testing.T, dir string) {
			cutRecord(t, dir, func(r []byte) []byte { return make([]byte, len(r)) })
		},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			leave(t, dir)
			checkUsable(t, dir)
		})
	}
}

// What is kept beside a good token is not put in its place.
func TestABadCopyOfTheRecordHarmsNothing(t *testing.T) {
	for name, text := range map[string]string{"larger": strings.Repeat("x", 4096), "empty": "", "zeros": strings.Repeat("\x00", 320), "shorter": "orgkeys"} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			checkUsable(t, dir)
			kept := filepath.Join(dir, "token.object")
			if err := os.WriteFile(kept, []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
			checkUsable(t, dir)
			if err := os.Truncate(records(t, dir)[0], 0); err != nil {
				t.Fatal(err)
			}
			checkUsable(t, dir) // the copy was mended by the start before
		})
	}
	t.Run("unreadable", func(t *testing.T) {
		dir := t.TempDir()
		checkUsable(t, dir)
		kept := filepath.Join(dir, "token.object")
		if err := errors.Join(os.Remove(kept), os.Mkdir(kept, 0o700)); err != nil {
			t.Fatal(err)
		}
		if _, _, err := InitSoftHSM(dir); err != nil {
			t.Error(err)
		}
	})
	t.Run("the record is bad, and whole to look at", func(t *testing.T) {
		dir := t.TempDir()
		checkUsable(t, dir)
		path, kept := records(t, dir)[0], filepath.Join(dir, "token.object")
		good, err := os.ReadFile(kept)
		if err != nil {
			t.Fatal(err)
		}
		bad := bytes.Clone(good)
		bad[280] ^= 1
		if err := os.WriteFile(path, bad, 0o600); err != nil {
			t.Fatal(err)
		}
		cfg, _, err := InitSoftHSM(dir)
		if err != nil {
			t.Fatal(err)
		}
		if token, err := Open(t.Context(), cfg); err == nil {
			t.Error("it opens", token.Close())
		}
		if b, err := os.ReadFile(kept); err != nil || !bytes.Equal(b, good) {
			t.Errorf("the good copy is gone: %v", err)
		}
	})
	t.Run("made while another process is at the record", func(t *testing.T) {
		dir := t.TempDir()
		checkUsable(t, dir)
		if err := errors.Join(os.Truncate(records(t, dir)[0], 0), KeepSoftHSM(dir)); err != nil {
			t.Fatal(err)
		}
		checkUsable(t, dir)
	})
	t.Run("as bad as the record", func(t *testing.T) {
		dir := t.TempDir()
		checkUsable(t, dir)
		path := records(t, dir)[0]
		if err := errors.Join(os.Truncate(path, 0), os.WriteFile(filepath.Join(dir, "token.object"), []byte("not one"), 0o600)); err != nil {
			t.Fatal(err)
		}
		if _, _, err := InitSoftHSM(dir); err != nil {
			t.Error(err)
		}
		if info, err := os.Stat(path); err != nil || info.Size() != 0 {
			t.Errorf("what is left of the record was replaced: %v", err)
		}
	})
	t.Run("another token's, which is larger", func(t *testing.T) {
		dir := t.TempDir()
		checkUsable(t, dir)
		record, err := os.ReadFile(records(t, dir)[0])
		if err != nil {
			t.Fatal(err)
		}
		other := append(bytes.Clone(record), "more"...)
		other[len(record)-1] ^= 1
		if err := os.WriteFile(filepath.Join(dir, "token.object"), other, 0o600); err != nil {
			t.Fatal(err)
		}
		checkUsable(t, dir)
	})
}

func records(t *testing.T, dir string) []string {
	t.Helper()
	records, err := filepath.Glob(filepath.Join(dir, "tokens", "*", "token.object"))
	if err != nil || len(records) != 1 {
		t.Fatalf("the token has %d records, %v", len(records), err)
	}
	return records
}

// cutRecord makes a token, uses it, and leaves of its record what cut returns.
func cutRecord(t *testing.T, dir string, cut func([]byte) []byte) {
	t.Helper()
	checkUsable(t, dir)
	path := records(t, dir)[0]
	record, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, cut(record), 0o600); err != nil {
		t.Fatal(err)
	}
}

func TestInitSoftHSMKilledAtAnyMoment(t *testing.T) {
	started := time.Now()
	if out, err := childCommand(t, "init", t.TempDir()).CombinedOutput(); err != nil {
		t.Fatalf("child: %v\n%s", err, out)
	}
	whole := time.Since(started)
	for range 12 {
		dir := t.TempDir()
		for range 3 { // the second and third go on with what they find
			cmd := childCommand(t, "init", dir)
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			time.Sleep(rand.N(whole)) // the moment of the crash, not a wait for anything
			_ = cmd.Process.Kill()    // may have ended
			_ = cmd.Wait()
		}
		checkUsable(t, dir)
	}
}

func TestInitSoftHSMNeverReplacesAToken(t *testing.T) {
	dir := t.TempDir()
	cfg, _, err := InitSoftHSM(dir)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(cfg.PINFile); err != nil {
		t.Fatal(err)
	}
	if _, _, err := InitSoftHSM(dir); err == nil {
		t.Error("a token without its PIN was accepted, or replaced")
	}
	if _, err := os.Stat(cfg.PINFile); err == nil {
		t.Error("a new PIN was made beside an old token")
	}
}

func TestInitSoftHSMRefusesPathsItCannotWriteDown(t *testing.T) {
	for _, name := range []string{"a#b", "a=b", "a\nb"} {
		if _, _, err := InitSoftHSM(filepath.Join(t.TempDir(), name)); err == nil {
			t.Errorf("%q was accepted", name)
		}
	}
}

func TestPINFile(t *testing.T) {
	for name, c := range map[string]struct {
		content string
		mode    fs.FileMode
		pin     string // "": refused
	}{
		"owner only":              {"1234", 0o600, "1234"},
		"read only":               {"1234", 0o400, "1234"},
		"a line's end after it":   {"1234\r\n", 0o600, "1234"},
		"spaces belong to it":     {" 12 34 ", 0o600, " 12 34 "},
		"the longest":             {strings.Repeat("1", 255), 0o600, strings.Repeat("1", 255)},
		"mounted for its group":   {"1234", 0o440, "1234"},
		"readable by the group":   {"1234", 0o640, ""},
		"readable by others":      {"1234", 0o604, ""},
		"writable by the group":   {"1234", 0o620, ""},
		"empty":                   {"", 0o600, ""},
		"nothing but a line end":  {"\n", 0o600, ""},
		"too long":                {strings.Repeat("1", 256), 0o600, ""},
		"too long by very much":   {strings.Repeat("1", 10_000), 0o600, ""},
		"too long after its line": {"1234\n" + strings.Repeat("1", 10_000), 0o600, ""},
	} {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "pin")
			if err := os.WriteFile(path, []byte(c.content), 0o600); err != nil {
				t.Fatal(err)
			}
			if err := os.Chmod(path, c.mode); err != nil {
				t.Fatal(err)
			}
			pin, err := readPIN(path)
			if (err == nil) != (c.pin != "") || string(pin) != c.pin {
				t.Errorf("%q, %v", pin, err)
			}
		})
	}
	if _, err := readPIN(t.TempDir()); err == nil {
		t.Error("a directory was read")
	}
}

// A server and a command that start for the first time in one directory, at once.
func TestOneTokenIsMadeByProcessesAtOnce(t *testing.T) {
	for range 3 {
		dir := t.TempDir()
		var wg sync.WaitGroup
		for range 4 {
			wg.Go(func() {
				if out, err := childCommand(t, "init", dir).CombinedOutput(); err != nil {
					t.Errorf("%v\n%s", err, out)
				}
			})
		}
		wg.Wait()
		if made, err := filepath.Glob(filepath.Join(dir, softHSMTokens, "*")); err != nil || len(made) != 1 {
			t.Errorf("%d tokens, %v", len(made), err)
		}
		checkUsable(t, dir)
	}
}
