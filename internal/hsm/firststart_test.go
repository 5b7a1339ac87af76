//go:build cgo

package hsm

import (
	"bytes"
	"context"
	"database/sql"
	"encoding/hex"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/miekg/pkcs11"

	"github.com/orgkeys/orgkeys/internal/orgkey"
	"github.com/orgkeys/orgkeys/internal/sqlstore"
	"github.com/orgkeys/orgkeys/internal/sqlstore/pgtest"
)

func long() bool { return os.Getenv("ORGKEYS_TEST_LONG") != "" }

// childDatabase is the database that a child's start has.
const childDatabase = "ORGKEYS_HSM_TEST_DATABASE"

// firstStart is what a replica's first start does with the token: it opens it,
// seals the key that authenticates events, and signs. It prints the keys it uses.
func firstStart(ctx context.Context) (err error) {
	db, err := sqlstore.Open(ctx, os.Getenv(childDatabase))
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, db.Close()) }()
	sealed, err := db.HasSealed(ctx)
	if err != nil {
		return err
	}
	cfg := configFromEnv()
	cfg.Register, cfg.CreateSealingKey = lingering{db}, !sealed
	cfg.noGCM = os.Getenv(kind) == "SoftHSM, CBC and HMAC"
	token, err := Open(ctx, cfg)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, token.Close()) }()
	head, err := db.Head(ctx)
	if err != nil {
		return err
	}
	binding := orgkey.Binding{Purpose: orgkey.EventKey, Org: head.Origin}
	kept, err := token.Seal(ctx, binding, []byte("the key that authenticates events"))
	if err != nil {
		return err
	}
	if err := db.KeepEventKey(ctx, head.Origin, kept); err != nil {
		return err
	}
	if kept, err = db.SealedEventKey(ctx, head.Origin); err != nil {
		return err
	}
	if _, err := token.Open(ctx, []orgkey.Sealed{{Binding: binding, Ciphertext: kept}}); err != nil {
		return fmt.Errorf("what another start sealed: %w", err)
	}
	if _, _, err := token.SignCheckpoint(ctx, []byte("text")); err != nil && !errors.Is(err, ErrNoEd25519) {
		return err
	}
	_, err = fmt.Printf("%x %x\n", token.sealID, token.signID)
	return err
}

// lingering is a register that has others come to the same point before a key is made.
type lingering struct{ *sqlstore.DB }

func (l lingering) AnnounceKey(ctx context.Context, purpose string, id []byte) error {
	err := l.DB.AnnounceKey(ctx, purpose, id)
	time.Sleep(300 * time.Millisecond)
	return err
}

// Replicas that start for the first time on one token agree on one sealing key
// and one checkpoint key, whatever dies when, and leave nothing else behind.
func TestFirstStartsOfReplicasMakeOneKey(t *testing.T) {
	location := filepath.Join(t.TempDir(), "orgkeys.db")
	driver, name := "sqlite3", "file:"+location+"?_busy_timeout=5000"
	if os.Getenv(kind) == "" {
		server, err := pgtest.Start()
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = server.Close() })
		location = server.URL("postgres")
		driver, name = "pgx", location
	}
	db, err := sqlstore.Open(t.Context(), location)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = db.Close() })
	if err := db.Migrate(t.Context()); err != nil {
		t.Fatal(err)
	}
	raw, err := sql.Open(driver, name)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = raw.Close() })
	cfg := freshToken(t)
	rounds := 4
	if long() {
		rounds = 200
	}
	f := &firstStarts{t: t, raw: raw, cfg: cfg, location: location, took: time.Second}
	for round := range rounds {
		f.reset()
		f.round(round%2 == 1)
		if t.Failed() {
			t.Fatalf("in round %d", round)
		}
	}
	t.Logf("%d rounds, %d starts killed, %d starts that came to their end, %d records of the token put back", rounds, f.killed, f.ended, f.repaired)
}

type firstStarts struct {
	t             *testing.T
	raw           *sql.DB
	cfg           Config
	location      string
	took          time.Duration // of a start, so that kills come during one
	killed, ended int
	repaired      int
}

// reset empties the token and forgets in the database what was in it.
func (f *firstStarts) reset() {
	f.t.Helper()
	for _, table := range []string{"token_keys", "token_keys_announced", "event_keys"} {
		if _, err := f.raw.ExecContext(f.t.Context(), "DELETE FROM "+table); err != nil {
			f.t.Fatal(err)
		}
	}
	f.repair()
	inToken(f.t, f.cfg, func(lib *module, h pkcs11.SessionHandle) {
		found, err := find(lib, h, 100, pkcs11.NewAttribute(pkcs11.CKA_TOKEN, true))
		for _, object := range found {
			err = errors.Join(err, lib.DestroyObject(h, object))
		}
		if err != nil {
			f.t.Fatal(err)
		}
	})
	f.keep()
}

// A login that is killed may leave the token's own record torn: SoftHSM's, which its
// copy brings back, or opencryptoki's, for which docs/hsm.md has the way.
func (f *firstStarts) repair() {
	f.t.Helper()
	var err error
	switch {
	case strings.HasSuffix(f.cfg.Module, "softhsm2.so"):
		dir := filepath.Dir(f.cfg.PINFile)
		err = restoreRecord(filepath.Join(dir, softHSMTokens), filepath.Join(dir, softHSMRecord))
	case opencryptokiRecordIsTorn():
		f.repaired++
		var listed []byte
		if listed, err = os.ReadFile("/dev/shm/var.lib.opencryptoki.swtok"); err == nil {
			err = os.WriteFile(opencryptokiRecord, listed[264:264+232], 0o660)
		}
	}
	if err != nil {
		f.t.Fatal(err)
	}
}

const opencryptokiRecord = "/var/lib/opencryptoki/swtok/NVTOK.DAT"

func opencryptokiRecordIsTorn() bool {
	info, err := os.Stat(opencryptokiRecord)
	return os.Getenv(kind) == "opencryptoki" && err == nil && info.Size() == 0
}

func (f *firstStarts) keep() {
	if strings.HasSuffix(f.cfg.Module, "softhsm2.so") {
		if err := KeepSoftHSM(filepath.Dir(f.cfg.PINFile)); err != nil {
			f.t.Fatal(err)
		}
	}
}

// start runs one, and kills it after the given time; 0: not at all.
func (f *firstStarts) start(life time.Duration) (said string, killed bool, err error) {
	var out, trouble bytes.Buffer
	replica := f.cfg
	replica.AttemptFile = AttemptFile(f.t.TempDir()) // each has a data directory of its own
	cmd := childCommand(f.t, "first start", "", append(configEnv(replica), childDatabase+"="+f.location)...)
	cmd.Stdout, cmd.Stderr = &out, &trouble
	if err := cmd.Start(); err != nil {
		return "", false, err
	}
	if life > 0 {
		timer := time.AfterFunc(life, func() { _ = cmd.Process.Kill() })
		defer timer.Stop()
	}
	err = cmd.Wait()
	var exit *exec.ExitError
	if errors.As(err, &exit) && exit.ExitCode() == -1 {
		return "", true, nil
	}
	if err != nil {
		err = fmt.Errorf("%w: %s", err, trouble.Bytes())
	}
	return strings.TrimSpace(out.String()), false, err
}

func (f *firstStarts) round(kills bool) {
	var wg sync.WaitGroup
	var mu sync.Mutex
	all := map[string]int{}
	// Another program uses the token meanwhile, which makes opencryptoki lose objects.
	onlooker := childCommand(f.t, "looking on", "", configEnv(f.cfg)...)
	if err := onlooker.Start(); err != nil {
		f.t.Fatal(err)
	}
	for range 3 {
		wg.Go(func() {
			life := time.Duration(0)
			if kills {
				life = time.Duration(rand.Int64N(int64(f.took)))
			}
			began := time.Now()
			said, killed, err := f.start(life)
			mu.Lock()
			defer mu.Unlock()
			switch {
			case killed:
				f.killed++
			// One that is killed during its login leaves the token's record torn
			// for the others: only a start puts SoftHSM's back, and nothing opencryptoki's.
			case err != nil && kills && (strings.HasSuffix(f.cfg.Module, "softhsm2.so") || opencryptokiRecordIsTorn()):
			case err != nil:
				f.t.Errorf("a start: %v", err)
			case err == nil:
				f.took = (f.took + time.Since(began)) / 2
				f.ended++
				all[said]++
			}
		})
	}
	wg.Wait()
	_ = onlooker.Process.Kill()
	_ = onlooker.Wait()
	f.repair()
	said, _, err := f.start(0)
	if err != nil {
		inToken(f.t, f.cfg, func(lib *module, h pkcs11.SessionHandle) {
			found, err := find(lib, h, 100, pkcs11.NewAttribute(pkcs11.CKA_TOKEN, true))
			for _, object := range found {
				id, _ := readAttribute(lib, h, object, pkcs11.CKA_ID)
				label, _ := readAttribute(lib, h, object, pkcs11.CKA_LABEL)
				f.t.Logf("in the token: %s with CKA_ID %x, %v", label, id, err)
			}
		})
		f.t.Fatalf("the last start: %v", err)
	}
	all[said]++
	if len(all) != 1 {
		f.t.Errorf("the starts use different keys: %v", all)
	}
	f.checkToken(said)
}

// checkToken finds in the token what said names, and nothing else.
func (f *firstStarts) checkToken(said string) {
	f.t.Helper()
	sealID, signID, _ := strings.Cut(said, " ")
	inToken(f.t, f.cfg, func(lib *module, h pkcs11.SessionHandle) {
		found, err := find(lib, h, 100, pkcs11.NewAttribute(pkcs11.CKA_TOKEN, true))
		if err != nil {
			f.t.Fatal(err)
		}
		for _, object := range found {
			id, err := readAttribute(lib, h, object, pkcs11.CKA_ID)
			if text := hex.EncodeToString(id); err != nil || text != sealID && text != sealID+hex.EncodeToString(macID(nil)) && text != signID {
				f.t.Errorf("an object with CKA_ID %q is left, %v; in use are %s", text, err, said)
			}
		}
		if want := 2; len(found) > want+2 || len(found) == 0 {
			f.t.Errorf("%d objects in the token", len(found))
		}
	})
}

// lookOn has the module find the token, again and again, until it is killed.
func lookOn(cfg Config) error {
	for {
		lib, err := load(cfg.Module)
		if err == nil {
			err = lib.initialize(cfg.InitArgs)
		}
		if err != nil {
			return err
		}
		_, _ = cfg.findToken(lib) // a start that is killed leaves none for a moment
		_ = lib.Finalize()
		time.Sleep(5 * time.Millisecond)
	}
}

// underLoad opens the token and makes keys and seals until it is killed. It says
// when it has begun.
func underLoad(ctx context.Context) error {
	cfg := configFromEnv()
	cfg.CreateSealingKey = true
	cfg.noGCM = os.Getenv(kind) == "SoftHSM, CBC and HMAC"
	token, err := Open(ctx, cfg)
	if err != nil {
		return err
	}
	fmt.Println("begun")
	for {
		if err := generateOne(ctx, token); err != nil {
			return err
		}
	}
}

// Processes that are killed while they make keys leave the sealing key as it
// was, what it sealed opens, and nothing stays in the token.
func TestKilledUnderLoad(t *testing.T) {
	cfg := freshToken(t)
	first, err := Open(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	item := orgkey.Sealed{Binding: orgkey.Binding{Org: "acme", ID: "one"}}
	if item.Ciphertext, err = first.Seal(bounded(t), item.Binding, []byte("value")); err != nil {
		t.Fatal(err)
	}
	if err := first.Close(); err != nil {
		t.Fatal(err)
	}
	f := &firstStarts{t: t, cfg: cfg}
	f.keep()
	kills := 3
	if long() {
		kills = 100
	}
	for range kills {
		cmd := childCommand(t, "under load", "", configEnv(cfg)...)
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		var trouble bytes.Buffer
		cmd.Stderr = &trouble
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		if _, err := out.Read(make([]byte, 8)); err != nil {
			t.Fatalf("the child did not begin: %v\n%s", err, trouble.Bytes())
		}
		time.Sleep(time.Duration(rand.Int64N(int64(500 * time.Millisecond))))
		if err := cmd.Process.Kill(); err != nil {
			t.Fatal(err)
		}
		_ = cmd.Wait()
		f.repair()
	}
	t.Logf("%d kills under load, %d records of the token put back", kills, f.repaired)
	token := open(t, cfg)
	opened, err := token.Open(bounded(t), []orgkey.Sealed{item})
	if err != nil || string(opened[0]) != "value" {
		t.Errorf("what was sealed before does not open: %v", err)
	}
	want := 1
	if token.life.sealingKey.format == formatCBCHMAC {
		want = 2
	}
	if n := objects(t, token, pkcs11.NewAttribute(pkcs11.CKA_TOKEN, true)); n != want {
		t.Errorf("%d objects in the token, want %d", n, want)
	}
	if n := privateKeys(t, token); n != 0 {
		t.Errorf("%d private keys are left", n)
	}
	if err := generateOne(bounded(t), token); err != nil {
		t.Error(err)
	}
}
