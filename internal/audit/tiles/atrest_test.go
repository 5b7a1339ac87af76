package tiles_test

import (
	"context"
	"errors"
	"sync"
	"testing"
	"time"

	"github.com/orgkeys/orgkeys/internal/audit"
	"github.com/orgkeys/orgkeys/internal/audit/audittest"
	"github.com/orgkeys/orgkeys/internal/audit/tiles"
	"github.com/orgkeys/orgkeys/internal/audit/verify"
	"github.com/orgkeys/orgkeys/internal/sqlstore"
)

// watched is a store whose reads are told of before they are answered.
type watched struct {
	tiles.Store
	reading func(path string)
}

func (w watched) Read(ctx context.Context, path string) ([]byte, error) {
	w.reading(path)
	return w.Store.Read(ctx, path)
}

// verifyWatched verifies the log while each read of the archive is told of.
func (e movable) verifyWatched(t *testing.T, reading func(path string)) verify.Report {
	t.Helper()
	db, err := sqlstore.Open(t.Context(), e.location)
	audittest.Must(t, err)
	t.Cleanup(func() { db.Close() })
	db.UseArchive(tiles.Archive{Store: watched{e.Store, reading}})
	report, err := e.verify(t, db)
	if err != nil || report.Unread != nil {
		t.Fatalf("verifying the log: %v, %v", err, report.Unread)
	}
	return report
}

// However slow an archive is, no snapshot of the database waits for it: what is deleted
// meanwhile is not kept.
func TestNoSnapshotWaitsForTheArchive(t *testing.T) {
	t.Parallel()
	onBoth(t, func(t *testing.T, location string) {
		e := newMovable(t, location)
		e.run(t, e.move(t), 512, 0)
		reads := 0
		report := e.verifyWatched(t, func(path string) {
			reads++
			audittest.Must(t, e.DB.Record(t.Context(), e.Key(audit.KeysListed, "")))
			if location[0] == 'p' {
				if n := e.count(t, "pg_stat_activity WHERE datname = current_database() AND (backend_xmin IS NOT NULL OR xact_start IS NOT NULL) AND pid <> pg_backend_pid()"); n > 0 {
					t.Errorf("%d transactions are open while %s is read", n, path)
				}
				return
			}
			var busy, pages, moved int
			audittest.Must(t, e.Raw.QueryRow("PRAGMA wal_checkpoint(TRUNCATE)").Scan(&busy, &pages, &moved))
			if busy != 0 {
				t.Errorf("somebody reads the database while %s is read", path)
			}
		})
		if report.Archived != 512 || reads < 5 {
			t.Errorf("%+v after %d reads", report, reads)
		}
	})
}

// What is moved, removed and erased while the archive is read is found where it is then.
func TestVerifyingWhileTheLogIsMoved(t *testing.T) {
	t.Parallel()
	onBoth(t, func(t *testing.T, location string) {
		e := newMovable(t, location)
		hold := func(next int) {
			e.Exec(t, "DELETE FROM sink_progress WHERE sink = 'away'")
			_, err := e.Raw.Exec("INSERT INTO sink_progress (sink, next) VALUES ('away', $1)", next)
			audittest.Must(t, err)
		}
		hold(300)
		e.run(t, e.move(t), 256, 0)
		var move, remove, erase sync.Once
		report := e.verifyWatched(t, func(path string) {
			if path == "tile/entries/000" {
				move.Do(func() {
					hold(600)
					e.run(t, e.move(t), 256, 0)
				})
			}
			if path == "tile/entries/001" {
				remove.Do(func() {
					m := e.move(t)
					m.Keep = time.Nanosecond
					if done, err := m.Run(t.Context(), e.Archive, e.DB); err != nil || done.Removed != 512 {
						t.Errorf("removed %d entries, %v", done.Removed, err)
					}
				})
				erase.Do(func() { audittest.Must(t, <-e.erase(t, "u-1")) })
			}
		})
		if report.Archived != 512 || report.Removed != 512 {
			t.Errorf("%+v", report)
		}
		e.sign(t)
		e.wantGood(t)
	})
}

// Nobody takes an entry that is gone for one that was removed.
func TestAStolenEntryIsMissedWhileTheLogIsMoved(t *testing.T) {
	t.Parallel()
	e := newMovable(t, newPostgres(t))
	e.run(t, e.move(t), 512, 0)
	e.DB.UseArchive(tiles.Archive{Store: watched{e.Store, func(path string) {
		if path == "tile/entries/001" {
			audittest.Must(t, e.RemoveAll(t.Context(), path))
		}
	}}})
	e.wantProblem(t, "a stolen bundle", 256)
}

// A log is moved again and again beside those who read it.
func TestReadingBesideMoving(t *testing.T) {
	t.Parallel()
	onBoth(t, func(t *testing.T, location string) {
		e := newMovable(t, location)
		leaves, receipts := e.leaves(t, 512), e.receipts(t)
		moved := e.moving(t)
		for ended := false; !ended; {
			ended = len(moved) > 0
			if report, err := e.verify(t, e.DB); err != nil || report.Unread != nil {
				t.Errorf("verifying: %v, %v", err, report.Unread)
			}
			for i, leaf := range e.leaves(t, 512) {
				if string(leaf) != string(leaves[i]) {
					t.Fatalf("event %d is another", i)
				}
			}
			if got := e.receipts(t); len(got) != len(receipts) {
				t.Errorf("%d receipts, and there were %d", len(got), len(receipts))
			}
		}
		audittest.Must(t, <-moved)
	})
}

func (e movable) receipts(t *testing.T) []audit.Receipt {
	t.Helper()
	found, err := e.DB.Receipts(t.Context(), "vault", 0, 1000)
	audittest.Must(t, err)
	return found
}

// Receipts that are moved between two reads are in the archive.
func TestReceiptsThatAreMovedMeanwhile(t *testing.T) {
	t.Parallel()
	e := newMovable(t, newPostgres(t))
	before := e.receipts(t)
	of, err := e.DB.BundleReceipts(t.Context(), 0)
	audittest.Must(t, err)
	audittest.Must(t, errors.Join(e.Keep(t.Context(), "vault", 0, of["vault"]), e.Flush(t.Context())))
	tx, err := e.Raw.Begin()
	audittest.Must(t, err)
	_, err = tx.Exec("LOCK TABLE event_receipts IN ACCESS EXCLUSIVE MODE")
	audittest.Must(t, err)
	read := make(chan []audit.Receipt, 1)
	go func() {
		found, err := e.DB.Receipts(context.WithoutCancel(t.Context()), "vault", 0, 1000)
		if err != nil {
			t.Error(err)
		}
		read <- found
	}()
	for end := time.Now().Add(4 * time.Second); e.count(t, "pg_locks WHERE NOT granted") == 0; time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("nobody waits for the receipts")
		}
	}
	for _, statement := range []string{"DELETE FROM event_receipts WHERE idx < 256", "UPDATE log_archive SET moved = 256"} {
		_, err := tx.Exec(statement)
		audittest.Must(t, err)
	}
	audittest.Must(t, tx.Commit())
	if after := <-read; len(after) != len(before) {
		t.Errorf("%d receipts were read, and there are %d", len(after), len(before))
	}
}

// Personal parts go with the entries, also between the reading of both.
func TestVerifyingWhileEntriesAreRemoved(t *testing.T) {
	t.Parallel()
	onBoth(t, func(t *testing.T, location string) {
		e := newMovable(t, location)
		e.run(t, e.move(t), 512, 0)
		var remove sync.Once
		report := e.verifyWatched(t, func(path string) {
			if path == "receipts/vault/000" { // its entries were read before
				remove.Do(func() {
					m := e.move(t)
					m.Keep = time.Nanosecond
					e.run(t, m, 0, 512)
				})
			}
		})
		if report.Archived != 512 || report.Removed != 512 || report.Erased != 0 {
			t.Errorf("%+v", report)
		}
	})
}
