//go:build cgo

package hsm

import (
	"bytes"
	"path/filepath"
	"strings"
	"testing"

	"github.com/miekg/pkcs11"

	"github.com/orgkeys/orgkeys/internal/orgkey"
	"github.com/orgkeys/orgkeys/internal/sqlstore"
)

func database(t *testing.T) *sqlstore.DB {
	t.Helper()
	db, err := sqlstore.Open(t.Context(), filepath.Join(t.TempDir(), "orgkeys.db"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = db.Close() })
	if err := db.Migrate(t.Context()); err != nil {
		t.Fatal(err)
	}
	return db
}

// before is a token and a database as a version left them that recorded no
// CKA_ID: with more keys of the label than the one that sealed.
func before(t *testing.T, others int) (Config, *sqlstore.DB) {
	t.Helper()
	cfg, db := softHSM(t), database(t)
	inToken(t, cfg, func(lib *module, h pkcs11.SessionHandle) {
		removeSealingKey(t, lib, h)
		plantSealingKey(t, lib, h, true, false)
		key, err := lookUpSealingKey(lib, h)
		if err != nil {
			t.Fatal(err)
		}
		head, err := db.Head(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		binding := orgkey.Binding{Purpose: orgkey.EventKey, Org: head.Origin}
		sealed, err := sealingKey{format: formatGCM, cipher: key}.encrypt(lib, h, binding.Context(), []byte("value"))
		if err != nil {
			t.Fatal(err)
		}
		if err := db.KeepEventKey(t.Context(), head.Origin, sealed); err != nil {
			t.Fatal(err)
		}
		for range others {
			plantSealingKey(t, lib, h, true, false)
		}
	})
	return cfg, db
}

func opensSample(t *testing.T, cfg Config, db *sqlstore.DB) []byte {
	t.Helper()
	cfg.Register = db
	token, err := Open(t.Context(), cfg)
	if err != nil {
		t.Fatalf("Open: %v", err)
	}
	defer token.Close()
	sample, _, err := db.SealedSample(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if opened, err := token.Open(t.Context(), []orgkey.Sealed{sample}); err != nil || string(opened[0]) != "value" {
		t.Errorf("what was sealed does not open: %v", err)
	}
	return token.SealingKeyID()
}

// A key from before IDs were recorded goes on working, also where two starts
// had made two: the one that opens what the database holds is taken, and named.
func TestAKeyFromBeforeIDsWereRecorded(t *testing.T) {
	for name, others := range map[string]int{"alone": 0, "beside one that sealed nothing": 1, "beside three": 3} {
		t.Run(name, func(t *testing.T) {
			cfg, db := before(t, others)
			looking := cfg
			looking.ChangeNothing = true
			opensSample(t, looking, db)
			if id, err := db.ChosenKey(t.Context(), "seal"); id != nil || err != nil {
				t.Errorf("who only looks has recorded %x, %v", id, err)
			}
			first := opensSample(t, cfg, db)
			recorded, err := db.ChosenKey(t.Context(), "seal")
			if err != nil || len(first) == 0 || !bytes.Equal(first, recorded) {
				t.Errorf("in use is %x, recorded %x, %v", first, recorded, err)
			}
			if again := opensSample(t, cfg, db); !bytes.Equal(again, first) {
				t.Errorf("the next start uses %x, and not %x", again, first)
			}
		})
	}
}

// Where none of the token's keys opens what the database holds, none is made
// and none is taken.
func TestNoKeyOpensWhatTheDatabaseHolds(t *testing.T) {
	_, db := before(t, 0)
	cfg := softHSM(t)
	cfg.Register, cfg.CreateSealingKey = db, true
	token, err := Open(t.Context(), cfg)
	if err == nil {
		_ = token.Close()
		t.Fatal("another token's key was taken")
	}
	if id, err := db.ChosenKey(t.Context(), "seal"); id != nil || err != nil {
		t.Errorf("recorded: %x, %v", id, err)
	}
}

// A key of which another start has made one half so far is not in the way, and is
// removed if that start died. One that nobody announced has lost its other half.
func TestHalfOfAKey(t *testing.T) {
	for announced, says := range map[bool]string{true: "", false: "has no HMAC key"} {
		cfg, db := softHSM(t), database(t)
		cfg.noGCM, cfg.CreateSealingKey, cfg.Register = true, true, db
		id := newKeyID()
		if announced {
			if err := db.AnnounceKey(t.Context(), purposeSeal, id); err != nil {
				t.Fatal(err)
			}
		}
		inToken(t, cfg, func(lib *module, h pkcs11.SessionHandle) {
			removeSealingKey(t, lib, h)
			key, err := generateSealingKey(lib, h, formatCBCHMAC, sealKeyLabel, id, true)
			if err == nil {
				err = lib.DestroyObject(h, key.mac)
			}
			if err != nil {
				t.Fatal(err)
			}
		})
		token, err := Open(t.Context(), cfg)
		if says != "" {
			if err == nil || !strings.Contains(err.Error(), says) {
				t.Errorf("Open = %v, want %q", err, says)
			}
			continue
		}
		if err != nil {
			t.Errorf("another start's half key: %v", err)
			continue
		}
		if n := objects(t, token, pkcs11.NewAttribute(pkcs11.CKA_TOKEN, true), pkcs11.NewAttribute(pkcs11.CKA_ID, id)); n != 0 {
			t.Errorf("%d objects of it are left", n)
		}
		if err := token.Close(); err != nil {
			t.Error(err)
		}
	}
}
