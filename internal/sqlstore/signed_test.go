package sqlstore_test

import (
	"bytes"
	"crypto/ed25519"
	"database/sql"
	"encoding/binary"
	"fmt"
	"log/slog"
	"slices"
	"testing"
	"time"

	"golang.org/x/mod/sumdb/tlog"

	"github.com/orgkeys/orgkeys/internal/audit"
	"github.com/orgkeys/orgkeys/internal/audit/archive"
	"github.com/orgkeys/orgkeys/internal/audit/verify"
	"github.com/orgkeys/orgkeys/internal/sqlstore"
)

// Signed checkpoints do not grow by a row a minute for ever: the newest 1,024 stay, and of
// the older ones some 512 whenever their number doubles; the first of each key among them.
// What is left verifies, proves and exports as before.
func TestSignedCheckpointsDoNotGrowForEver(t *testing.T) {
	const events, rotated = 3000, 300 // the key was rotated there
	onBoth(t, func(t *testing.T, db *sqlstore.DB, location string) {
		log := raw(t, location)
		for done := 0; done < events; done += 500 {
			all := make([]audit.Event, 500)
			for i := range all {
				all[i] = audit.New(audit.KeysListed, "acme")
			}
			must(t, db.Record(t.Context(), all...))
			if n, err := db.Sequence(t.Context(), 500, audit.Condition{}); err != nil || n != 500 {
				t.Fatalf("sequenced %d, %v", n, err)
			}
		}
		var origin string
		must(t, log.QueryRow("SELECT origin FROM log_head").Scan(&origin))
		before, _ := checkpointKey(t, db, origin)
		after, private := checkpointKey(t, db, origin)
		tx, err := log.Begin()
		must(t, err)
		entries, err := db.Entries(t.Context(), 0, events)
		must(t, err)
		var tree verify.Frontier
		for size := int64(1); size < events; size++ {
			signed := after
			if size <= rotated {
				signed = before
			}
			tree.Push(tlog.RecordHash(entries[size-1].Leaf))
			c := audit.Checkpoint{Origin: origin, Size: size, Root: tree.Root()}
			statement(t, tx, "INSERT INTO signed_checkpoints (size, text) VALUES ($1, $2)", size, signed(c))
		}
		must(t, tx.Commit())

		quiet := slog.New(slog.DiscardHandler)
		sign := func() {
			t.Helper()
			c := audit.NewCheckpointer(audit.NewLog(db, quiet), db, audit.LocalSigner{Private: private}, time.Hour, quiet)
			must(t, c.Sign(t.Context()))
		}
		sign()
		left := signedSizes(t, log)
		newest := left[len(left)-1]
		if most := 1024 + 512*2; newest != events || len(left) > most || len(left) < 1024+512 {
			t.Errorf("%d are left of %d, and may be %d; the newest is of %d events", len(left), events, most, newest)
		}
		if left[0] != 1 || !slices.Contains(left, rotated+1) {
			t.Errorf("the first of a key is gone: the oldest left is of %d events", left[0])
		}
		for i, size := range left[1:] {
			if gap, age := size-left[i], newest-left[i]; gap > 1 && gap*256 > age {
				t.Errorf("between %d and %d events, of %d, none is left", left[i], size, newest)
			}
		}
		sign() // nothing new
		if again := signedSizes(t, log); !slices.Equal(again, left) {
			t.Errorf("%d became %d", len(left), len(again))
		}

		copy := &verify.Copy{}
		must(t, copy.AddKept(t.Context(), db, nil))
		if report, err := verify.Verify(t.Context(), db, copy, nil); err != nil || report.Signed != events {
			t.Errorf("verified up to %d, %v", report.Signed, err)
		}
		keys, err := archive.SigningKeys(t.Context(), db)
		if err != nil || len(keys) != 2 {
			t.Errorf("%d keys, %v", len(keys), err)
		}
		var export bytes.Buffer
		_, err = archive.Write(t.Context(), &export, db, nil, t.TempDir(), "a test", nil)
		must(t, err)
		if report, err := archive.Verify(t.Context(), &export, keys, archive.Outside{}, nil); err != nil || report.Checkpoints != int64(len(left)) {
			t.Errorf("%d checkpoints of %d in the export, %v", report.Checkpoints, len(left), err)
		}
		if _, err := archive.Prove(t.Context(), db, "7"); err != nil {
			t.Error(err)
		}

		// What a rollback sets aside stays as it is, and no longer stands for anything.
		must(t, db.Supersede(t.Context(), 2500))
		aside := 0
		must(t, log.QueryRow("SELECT count(*) FROM signed_checkpoints WHERE superseded = 1").Scan(&aside))
		must(t, db.ThinSigned(t.Context()))
		if n := 0; log.QueryRow("SELECT count(*) FROM signed_checkpoints WHERE superseded = 1").Scan(&n) != nil || n != aside || aside != 501 {
			t.Errorf("%d were set aside, and %d are there", aside, n)
		}
	})
}

// checkpointKey makes a key, stores its public half, and returns what makes signed notes with it.
func checkpointKey(t *testing.T, db *sqlstore.DB, origin string) (func(audit.Checkpoint) string, ed25519.PrivateKey) {
	t.Helper()
	public, private, err := ed25519.GenerateKey(nil)
	must(t, err)
	vkey, err := audit.VerifierKey(origin, public)
	must(t, err)
	keys, err := audit.ParseKeys(vkey)
	must(t, err)
	must(t, db.KeepCheckpointKey(t.Context(), vkey, nil))
	return func(c audit.Checkpoint) string {
		signature := append(binary.BigEndian.AppendUint32(nil, keys[0].KeyHash()), ed25519.Sign(private, []byte(c.Text()))...)
		return fmt.Sprintf("%s\n— %s %s\n", c.Text(), origin, base64Of(signature))
	}, private
}

func signedSizes(t *testing.T, db *sql.DB) (all []int64) {
	t.Helper()
	rows, err := db.Query("SELECT size FROM signed_checkpoints ORDER BY seq")
	must(t, err)
	defer rows.Close()
	for rows.Next() {
		var size int64
		must(t, rows.Scan(&size))
		all = append(all, size)
	}
	must(t, rows.Err())
	return all
}
