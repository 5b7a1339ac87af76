package sqlstore_test

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"encoding/base64"
	"errors"
	"log/slog"
	"sync"
	"testing"
	"time"

	"github.com/orgkeys/orgkeys/internal/audit"
	"github.com/orgkeys/orgkeys/internal/audit/archive"
	"github.com/orgkeys/orgkeys/internal/audit/tiles"
	"github.com/orgkeys/orgkeys/internal/audit/verify"
	"github.com/orgkeys/orgkeys/internal/authz"
	"github.com/orgkeys/orgkeys/internal/sqlstore"
)

// What an auditor gets is the same from both databases.
func TestEvidence(t *testing.T) {
	onBoth(t, func(t *testing.T, db *sqlstore.DB, _ string) {
		public, private, err := ed25519.GenerateKey(nil)
		if err != nil {
			t.Fatal(err)
		}
		files := map[string][]byte{"a.rego": []byte("package a\n")}
		revision := authz.Revision(files)
		for range 2 { // keeping again changes nothing
			must(t, db.KeepPolicy(t.Context(), revision, files))
			must(t, db.KeepReceiptKeys(t.Context(), "vault", map[int]ed25519.PublicKey{1: public}))
		}
		quiet := slog.New(slog.DiscardHandler)
		checkpoints := audit.NewCheckpointer(audit.NewLog(db, quiet), db, audit.LocalSigner{Private: private}, time.Hour, quiet)
		for range 3 {
			for range 5 {
				e := audit.New(audit.KeysListed, "acme")
				e.Actor, e.Policy = audit.Actor{Kind: authz.Person, ID: "u-1"}, revision
				e.Personal = audit.Personal{Name: "Ada"}
				must(t, db.Record(t.Context(), e))
			}
			if _, err := db.Sequence(t.Context(), 100, audit.Condition{}); err != nil {
				t.Fatal(err)
			}
			must(t, checkpoints.Sign(t.Context()))
		}
		entries, err := db.Entries(t.Context(), 0, 100)
		must(t, err)
		for _, e := range entries {
			receipt := append([]byte("vault:v1:"), base64Of(ed25519.Sign(private, e.Leaf))...)
			must(t, db.Acknowledge(t.Context(), "vault", e.Index+1, [][]byte{receipt}))
		}
		keys, err := db.CheckpointKeys(t.Context())
		if err != nil || len(keys) != 1 {
			t.Fatalf("keys %q, %v", keys, err)
		}

		var export bytes.Buffer
		_, err = archive.Write(t.Context(), &export, db, nil, t.TempDir(), "a test", nil)
		must(t, err)
		report, err := archive.Verify(t.Context(), &export, keys, archive.Outside{}, nil)
		if err != nil || report.Manifest.Size != 15 || report.Checkpoints != 3 || report.Receipts != 15 {
			t.Errorf("%+v, %v", report, err)
		}
		if _, err := archive.Prove(t.Context(), db, "7"); err != nil {
			t.Error(err)
		}

		t.Run("erasing", func(t *testing.T) {
			n, err := db.Erase(t.Context(), "u-1", func(_ string, n int64) audit.Event {
				if n != 15 {
					t.Errorf("the event says %d", n)
				}
				e := audit.New(audit.PersonErased, "")
				e.Object = "u-1"
				return e
			})
			if err != nil || n != 15 {
				t.Errorf("erased %d, %v", n, err)
			}
			verified, err := verify.Verify(t.Context(), db, nil, nil)
			if err != nil || verified.Erased != 15 || verified.Unsequenced != 1 {
				t.Errorf("%+v, %v", verified, err)
			}
		})
		t.Run("a sealed key", func(t *testing.T) {
			for range 2 {
				must(t, db.KeepCheckpointKey(t.Context(), "other+00000000+AA", []byte("sealed")))
			}
			sealed, err := db.SealedCheckpointKey(t.Context())
			if err != nil || string(sealed) != "sealed" {
				t.Errorf("%q, %v", sealed, err)
			}
		})
		t.Run("superseding", func(t *testing.T) {
			must(t, db.Supersede(t.Context(), 2))
			last, err := db.LastSigned(t.Context())
			left, leftErr := db.SignedAfter(t.Context(), 0)
			if err := errors.Join(err, leftErr); err != nil || last.Seq != 1 || last.Size != 5 || len(left) != 1 {
				t.Errorf("the newest is %d of %d, %v", last.Seq, len(left), err)
			}
		})
	})
}

func base64Of(b []byte) string { return base64.StdEncoding.EncodeToString(b) }

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// gated is a signer whose first signature waits until it may go on.
type gated struct {
	audit.Signer
	once          sync.Once
	reached, goOn chan struct{}
}

func (g *gated) SignCheckpoint(ctx context.Context, text []byte) ([]byte, ed25519.PublicKey, error) {
	g.once.Do(func() { close(g.reached); <-g.goOn })
	return g.Signer.SignCheckpoint(ctx, text)
}

// An export whose checkpoints shrink is refused, so none is stored behind a larger one:
// not of two that are signed at once, nor of a replica that was stopped in between.
func TestSignedCheckpointsNeverShrink(t *testing.T) {
	onBoth(t, func(t *testing.T, db *sqlstore.DB, location string) {
		_, private, err := ed25519.GenerateKey(nil)
		must(t, err)
		quiet := slog.New(slog.DiscardHandler)
		signer := &gated{Signer: audit.LocalSigner{Private: private}, reached: make(chan struct{}), goOn: make(chan struct{})}
		checkpoints := audit.NewCheckpointer(audit.NewLog(db, quiet), db, signer, time.Hour, quiet)
		grow := func() {
			must(t, db.Record(t.Context(), audit.New(audit.KeysListed, "acme")))
			_, err := db.Sequence(t.Context(), 100, audit.Condition{})
			must(t, err)
		}
		stored := func() (all []audit.Signed) {
			all, err := db.SignedAfter(t.Context(), 0)
			must(t, err)
			for i := range all[1:] {
				if all[i+1].Size < all[i].Size {
					t.Errorf("a checkpoint of %d events is stored behind one of %d", all[i+1].Size, all[i].Size)
				}
			}
			return all
		}
		grow()
		first := make(chan error, 1)
		go func() { first <- checkpoints.Sign(t.Context()) }()
		<-signer.reached
		grow()
		meanwhile, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
		defer cancel()
		_ = checkpoints.Sign(meanwhile) // it may wait, or leave it to the other
		close(signer.goOn)
		must(t, <-first)
		must(t, checkpoints.Sign(t.Context()))
		if all := stored(); len(all) == 0 || all[len(all)-1].Size != 2 {
			t.Fatalf("%d checkpoints are stored", len(all))
		}

		keys, err := db.CheckpointKeys(t.Context())
		must(t, err)
		late := stored()[0]
		must(t, db.KeepSigned(t.Context(), late, keys[0]))
		stored()

		// A version before stored them as they came.
		export := func() {
			t.Helper()
			var to bytes.Buffer
			_, err := archive.Write(t.Context(), &to, db, nil, t.TempDir(), "a test", nil)
			must(t, err)
			if _, err := archive.Verify(t.Context(), &to, keys, archive.Outside{}, nil); err != nil {
				t.Errorf("an export with a checkpoint out of order: %v", err)
			}
		}
		statement(t, raw(t, location), "INSERT INTO signed_checkpoints (size, text) VALUES ($1, $2)", late.Size, late.Note)
		export()
		grow()
		must(t, checkpoints.Sign(t.Context()))
		export()
	})
}

// An export reads receipts while events are moved to the archive, and misses none.
func TestReceiptsThatAreMovedMeanwhileAreRead(t *testing.T) {
	onBoth(t, func(t *testing.T, db *sqlstore.DB, location string) {
		archive := tiles.Archive{Store: tiles.NewDir(t.TempDir())}
		db.UseArchive(archive)
		receipts := make([][]byte, 2*tiles.Width)
		for i := range receipts {
			receipts[i] = []byte{'r', byte(i), byte(i / tiles.Width)}
		}
		must(t, db.Acknowledge(t.Context(), "vault", int64(len(receipts)), receipts))
		found, err := db.ReceiptsWhile(t.Context(), "vault", 0, int64(len(receipts)), func() {
			must(t, archive.Keep(t.Context(), "vault", 0, receipts[:tiles.Width]))
			statement(t, raw(t, location), "DELETE FROM event_receipts WHERE idx < $1", tiles.Width)
			statement(t, raw(t, location), "UPDATE log_archive SET moved = $1", tiles.Width)
		})
		must(t, err)
		if len(found) != len(receipts) {
			t.Fatalf("%d receipts, want %d", len(found), len(receipts))
		}
		for i, r := range found {
			if r.Index != int64(i) || !bytes.Equal(r.Receipt, receipts[i]) {
				t.Fatalf("receipt %d is %d, %q", i, r.Index, r.Receipt)
			}
		}
	})
}
