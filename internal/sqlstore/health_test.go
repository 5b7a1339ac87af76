package sqlstore_test

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/orgkeys/orgkeys/internal/audit"
	"github.com/orgkeys/orgkeys/internal/orgkey"
	"github.com/orgkeys/orgkeys/internal/sqlstore"
)

// Promise 9: a PostgreSQL whose standby is away takes no writes, and is not
// healthy; who migrates hears why and does not wait.
func TestADatabaseWithoutItsStandbyIsNotHealthy(t *testing.T) {
	p := newPair(t, true)
	location := newDatabase(t, p.primary)
	db, silent := open(t, location), open(t, location)
	mine := sqlstore.Replica{ID: "mine", Address: "a 127.0.0.1:3000"}
	must(t, db.AnnounceReplica(t.Context(), mine))
	must(t, db.Healthy(t.Context()))
	empty, err := sqlstore.Open(t.Context(), newDatabase(t, p.primary))
	must(t, err)
	t.Cleanup(func() { empty.Close() })

	must(t, p.standby.Stop())
	said := func(what string, err error) {
		t.Helper()
		if !errors.Is(err, orgkey.ErrUnavailable) || !strings.Contains(err.Error(), `synchronous_standby_names is "s1"`) {
			t.Errorf("%s: %v", what, err)
		}
	}
	started := time.Now()
	said("migrating", empty.Migrate(t.Context()))
	said("a replica's row", db.AnnounceReplica(t.Context(), mine))
	said("asked then", db.Healthy(t.Context()))
	said("one that announces nothing, as doctor", silent.Healthy(t.Context()))
	if took := time.Since(started); took > 40*time.Second {
		t.Errorf("that took %s", took)
	}
	must(t, p.standby.Restart())
	until(t, "it is healthy again", func() bool { return db.AnnounceReplica(t.Context(), mine) == nil && db.Healthy(t.Context()) == nil })
	must(t, empty.Migrate(t.Context()))
}

// Promise 9: where there is no room left, the first write that finds it out makes
// the database unhealthy, until there is.
func TestADatabaseWithoutRoomIsNotHealthy(t *testing.T) {
	onBoth := map[string]func(t *testing.T, disk string) *sqlstore.DB{
		"sqlite": func(t *testing.T, disk string) *sqlstore.DB { return open(t, filepath.Join(disk, "orgkeys.db")) },
		"postgres": func(t *testing.T, disk string) *sqlstore.DB {
			admin := raw(t, postgres.URL("postgres"))
			space := fmt.Sprintf("s%d", time.Now().UnixNano())
			must(t, exec.Command("chown", "postgres", disk).Run())
			statement(t, admin, "CREATE TABLESPACE "+space+" LOCATION '"+disk+"'")
			t.Cleanup(func() {
				statement(t, admin, "DROP DATABASE IF EXISTS "+space+" WITH (FORCE)")
				statement(t, admin, "DROP TABLESPACE "+space)
			})
			statement(t, admin, "CREATE DATABASE "+space+" TABLESPACE "+space)
			return open(t, postgres.URL(space))
		},
	}
	for name, at := range onBoth {
		t.Run(name, func(t *testing.T) {
			disk, err := os.MkdirTemp("", "orgkeys-full-")
			must(t, err)
			must(t, exec.Command("mount", "-t", "tmpfs", "-o", "size=24m", "orgkeys-test", disk).Run())
			t.Cleanup(func() {
				if err := errors.Join(exec.Command("umount", "-l", disk).Run(), os.Remove(disk)); err != nil {
					t.Error(err)
				}
			})
			db := at(t, disk)
			must(t, db.Healthy(t.Context()))
			if name == "sqlite" { // what a process left that was killed between the two halves of a probe
				must(t, db.Change(t.Context(), func(execute func(string) error) error {
					return execute("INSERT INTO replicas (id, address, version, policy, max_keys, clock_ahead, seen_at) VALUES ('probe-before', 'x', '', '', 0, 0, 0)")
				}))
			}
			filling := filepath.Join(disk, "filling")
			_ = exec.Command("dd", "if=/dev/zero", "of="+filling, "bs=4k").Run() // until the disk is full
			long := event(audit.KeysListed, "acme", strings.Repeat("x", 800))
			until(t, "a write finds no room", func() bool {
				long.ID = fmt.Sprint(time.Now().UnixNano())
				return db.Record(t.Context(), long) != nil
			})
			for range 3 {
				if err := db.Healthy(t.Context()); !errors.Is(err, orgkey.ErrUnavailable) {
					t.Errorf("with a full disk: %v", err)
				}
			}
			must(t, os.Remove(filling))
			until(t, "it is healthy when there is room", func() bool { return db.Healthy(t.Context()) == nil })
			long.ID = "after"
			must(t, db.Record(t.Context(), long))
			if name == "sqlite" {
				var left int
				if err := raw(t, filepath.Join(disk, "orgkeys.db")).QueryRow("SELECT count(*) FROM replicas WHERE id LIKE 'probe-%'").Scan(&left); err != nil || left != 0 {
					t.Errorf("%d rows of probes are left, %v", left, err)
				}
			}
		})
	}
}
