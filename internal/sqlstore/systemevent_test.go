package sqlstore_test

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	_ "github.com/jackc/pgx/v5/stdlib" // registers the driver "pgx"

	"github.com/orgkeys/orgkeys/internal/audit"
	"github.com/orgkeys/orgkeys/internal/authz"
	"github.com/orgkeys/orgkeys/internal/org"
	"github.com/orgkeys/orgkeys/internal/sqlstore"
	"github.com/orgkeys/orgkeys/internal/systemevent"
)

var noon = time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)

// at records an event that happened minutes after noon.
func at(t *testing.T, db *sqlstore.DB, minutes int, kind audit.Type, reason string, org org.ID, who audit.Actor, object string) string {
	t.Helper()
	e := audit.New(kind, org)
	e.Time, e.Reason, e.Actor, e.Object = noon.Add(time.Duration(minutes)*time.Minute), reason, who, object
	if who.Kind == authz.Person {
		e.Personal = audit.Personal{Name: "Ada", Email: "ada@example.org"}
	}
	if err := errors.Join(db.Record(t.Context(), e), db.Backdate(t.Context(), e.ID, e.Time)); err != nil {
		t.Fatal(err)
	}
	return e.ID
}

var (
	ada     = audit.Actor{Kind: authz.Person, ID: "ada"}
	bob     = audit.Actor{Kind: authz.Person, ID: "bob"}
	byKey   = audit.Actor{Kind: authz.Node, ID: "k-1"}
	sweeper = audit.Actor{Kind: audit.System, ID: "ada"} // of the same name as a person
)

// someEvents records events of acme's and others', and returns the names of
// the former by their IDs.
func someEvents(t *testing.T, db *sqlstore.DB) map[string]string {
	t.Helper()
	names := map[string]string{
		at(t, db, 0, audit.KeyCreated, "", "acme", ada, "k-1"):                  "k-1 created",
		at(t, db, 1, audit.KeyDelivered, "", "acme", ada, "k-1"):                "k-1 delivered",
		at(t, db, 2, audit.NodeRegistered, "created", "acme", byKey, "n-1"):     "n-1 created",
		at(t, db, 3, audit.NodeRegistered, "updated", "acme", byKey, "n-1"):     "n-1 updated",
		at(t, db, 4, audit.NodeRegistered, "repeated", "acme", byKey, "n-1"):    "n-1 repeated",
		at(t, db, 5, audit.KeyWithdrawn, "expired", "acme", sweeper, "k-2"):     "k-2 withdrawn",
		at(t, db, 6, audit.NodeUnregistered, "deleted", "acme", byKey, "n-1"):   "n-1 unregistered",
		at(t, db, 7, audit.NodeUnregistered, "repeated", "acme", byKey, "n-1"):  "n-1 unregistered again",
		at(t, db, 8, audit.NodeDeleted, "", "acme", bob, "n-2"):                 "n-2 deleted",
		at(t, db, 9, audit.KeyDeleted, "", "acme", bob, "k-1"):                  "k-1 deleted",
		at(t, db, 10, audit.KeysListed, "", "acme", ada, ""):                    "list",
		at(t, db, 11, audit.AccessDenied, "insufficient_role", "acme", bob, ""): "denial",
		at(t, db, 12, audit.SecretPut, "", "acme", ada, "env_s3"):               "secret",
		at(t, db, 13, audit.KeysDeleted, "", "acme", ada, ""):                   "all deleted",
		at(t, db, 9, audit.KeyCreated, "", "acme", bob, "k-3"):                  "k-3 created",
	}
	at(t, db, 5, audit.KeyCreated, "", "other", ada, "k-9")
	at(t, db, 5, audit.KeyDeleted, "", "other", ada, "k-1")
	return names
}

var everyKind = []systemevent.Kind{
	{Type: audit.KeyCreated}, {Type: audit.KeyDelivered}, {Type: audit.KeyWithdrawn}, {Type: audit.KeyDeleted},
	{Type: audit.NodeRegistered, Reason: "created"}, {Type: audit.NodeRegistered, Reason: "updated"},
	{Type: audit.NodeUnregistered, Reason: "deleted"}, {Type: audit.NodeDeleted},
}

func TestSystemEventsByEveryFilter(t *testing.T) {
	all := []string{"k-3 created", "k-1 deleted", "n-2 deleted", "n-1 unregistered", "k-2 withdrawn", "n-1 updated", "n-1 created", "k-1 delivered", "k-1 created"}
	onBoth(t, func(t *testing.T, db *sqlstore.DB, _ string) {
		names := someEvents(t, db)
		if _, err := db.Sequence(t.Context(), 3, audit.Condition{}); err != nil { // the others have no index, and happened all the same
			t.Fatal(err)
		}
		for _, c := range []struct {
			name   string
			change func(f *systemevent.Filter)
			total  int
			want   []string
		}{
			{"no filter", func(*systemevent.Filter) {}, 9, all},
			{"another organization", func(f *systemevent.Filter) { f.Org = "Acme" }, 0, nil},
			{"another organization's object", func(f *systemevent.Filter) { f.Object = "k-9" }, 0, nil},
			{"an object of both organizations", func(f *systemevent.Filter) { f.Object = "k-1" }, 3, []string{"k-1 deleted", "k-1 delivered", "k-1 created"}},
			{"the first minute is included", func(f *systemevent.Filter) { f.From = noon.Add(9 * time.Minute) }, 2, all[:2]},
			{"a moment later is not", func(f *systemevent.Filter) { f.From = noon.Add(9*time.Minute + time.Microsecond) }, 0, nil},
			{"the end is not included", func(f *systemevent.Filter) { f.Before = noon.Add(time.Minute) }, 1, all[8:]},
			{"a window", func(f *systemevent.Filter) { f.From, f.Before = noon.Add(2*time.Minute), noon.Add(6*time.Minute) }, 3, all[4:7]},
			{"one kind", func(f *systemevent.Filter) { f.Kinds = everyKind[:1] }, 2, []string{"k-3 created", "k-1 created"}},
			{"a kind by its reason", func(f *systemevent.Filter) { f.Kinds = everyKind[5:6] }, 1, []string{"n-1 updated"}},
			{"two kinds", func(f *systemevent.Filter) { f.Kinds = everyKind[6:] }, 2, []string{"n-2 deleted", "n-1 unregistered"}},
			{"no kind", func(f *systemevent.Filter) { f.Kinds = nil }, 0, nil},
			{"an actor, of whatever kind", func(f *systemevent.Filter) { f.Actor = "ada" }, 3, []string{"k-2 withdrawn", "k-1 delivered", "k-1 created"}},
			{"a person", func(f *systemevent.Filter) { f.Person = "ada" }, 2, []string{"k-1 delivered", "k-1 created"}},
			{"a person who is no other actor", func(f *systemevent.Filter) { f.Person, f.Actor = "ada", "bob" }, 0, nil},
			{"a person of a key's name", func(f *systemevent.Filter) { f.Person = "k-1" }, 0, nil},
			{"a name with a quotation mark", func(f *systemevent.Filter) { f.Actor = "' OR ''='" }, 0, nil},
			{"a page", func(f *systemevent.Filter) { f.Skip, f.Take = 2, 3 }, 9, all[2:5]},
			{"the last page", func(f *systemevent.Filter) { f.Skip, f.Take = 8, 3 }, 9, all[8:]},
			{"beyond the last page", func(f *systemevent.Filter) { f.Skip = 9 }, 9, nil},
		} {
			t.Run(c.name, func(t *testing.T) {
				f := systemevent.Filter{Org: "acme", Reader: "ada", Kinds: everyKind, From: noon, Take: 100, Count: 100}
				c.change(&f)
				found, total, err := db.SystemEvents(t.Context(), f)
				if err != nil {
					t.Fatal(err)
				}
				var got []string
				for _, s := range found {
					e, err := audit.Decode(s.Leaf)
					if err != nil {
						t.Fatal(err)
					}
					if (s.Personal != nil) != (e.Actor.Kind == authz.Person) {
						t.Errorf("%s: personal part %q", names[e.ID], s.Personal)
					}
					got = append(got, names[e.ID])
				}
				if total != c.total || !slices.Equal(got, c.want) {
					t.Errorf("%q of %d, want %q of %d", got, total, c.want, c.total)
				}
			})
		}
	})
}

func TestSystemEventsThatWereRead(t *testing.T) {
	onBoth(t, func(t *testing.T, db *sqlstore.DB, _ string) {
		someEvents(t, db)
		f := systemevent.Filter{Org: "acme", Reader: "eve", Kinds: everyKind, From: noon, Take: 100, Count: 100}
		found, _, err := db.SystemEvents(t.Context(), f)
		if err != nil {
			t.Fatal(err)
		}
		m := systemevent.Marks{Org: "acme", Reader: "eve", Read: true}
		for _, s := range found[2:] {
			m.Numbers = append(m.Numbers, s.Number)
		}
		marked := func(m systemevent.Marks) (n int64) {
			t.Helper()
			if err := db.MarkSystemEvents(t.Context(), m, everyKind, func(changed int64) audit.Event {
				n = changed
				return audit.New(audit.EventsMarked, m.Org)
			}); err != nil {
				t.Fatal(err)
			}
			return n
		}
		for _, want := range []int64{7, 0} {
			if n := marked(m); n != want {
				t.Errorf("marked %d, want %d", n, want)
			}
		}
		f.Unread = true
		for reader, want := range map[string]int{"eve": 2, "bob": 9} {
			f.Reader = reader
			unread, total, err := db.SystemEvents(t.Context(), f)
			if err != nil || total != want || len(unread) != want {
				t.Errorf("%s: %d of %d unread, want %d: %v", reader, len(unread), total, want, err)
			}
		}
		m.Read = false
		if n := marked(m); n != 7 {
			t.Errorf("unmarked %d", n)
		}
	})
}

// The feed's cost depends on the organization's own changes, not on what else
// the log holds: every condition is the index's, whatever is asked.
func TestSystemEventsAreFoundByTheIndexAlone(t *testing.T) {
	everything := systemevent.Filter{
		Org: "acme", Kinds: everyKind, From: noon, Before: noon.Add(time.Hour), Object: "k-1", Actor: "ada", Person: "ada", Reader: "ada", Unread: true, Take: 20, Count: 1000,
	}
	onBoth(t, func(t *testing.T, db *sqlstore.DB, location string) {
		raw := fill(t, location, 20_000, 100)
		for name, f := range map[string]systemevent.Filter{
			"the default": {Org: "acme", Kinds: everyKind, From: noon, Take: 20, Count: 1000}, "every filter": everything,
		} {
			plan := explain(t, raw, location, f)
			if strings.Count(plan, "events_changes") != 2 || strings.Contains(plan, "SCAN events") || strings.Contains(plan, "Seq Scan on events ") {
				t.Errorf("%s:\n%s", name, plan)
			}
			if sqlite := !strings.HasPrefix(location, "postgres"); sqlite && strings.Count(plan, "COVERING INDEX events_changes") != 2 ||
				!sqlite && len(indexOnly.FindAllString(plan, -1)) != 2 {
				t.Errorf("%s reads more than the index:\n%s", name, plan)
			}
		}
	})
}

// What a page costs has a bound, however long the time that it asks about.
func TestACountOfSystemEventsHasABound(t *testing.T) {
	onBoth(t, func(t *testing.T, db *sqlstore.DB, location string) {
		fill(t, location, 20_000, 100)
		for want, f := range map[int]systemevent.Filter{
			100: {Org: "acme", Kinds: everyKind, From: noon, Take: 20, Count: 100},
			20:  {Org: "acme", Kinds: everyKind, From: noon, Before: noon.Add(3100 * time.Microsecond), Take: 20, Count: 100},
		} {
			page, total, err := db.SystemEvents(t.Context(), f)
			if err != nil || total != want || len(page) != 20 {
				t.Errorf("a page of %d has %d, %v", want, total, err)
			}
		}
	})
}

var indexOnly = regexp.MustCompile(`Index Only Scan (Backward )?using events_changes`)

// fill adds events of organizations past sqlstore, and returns the connection that
// did it.
func fill(t *testing.T, location string, events, orgs int) *sql.DB {
	t.Helper()
	driver, numbers := "sqlite3", fmt.Sprintf("WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < %d) ", events)
	if strings.HasPrefix(location, "postgres") {
		driver, numbers = "pgx", fmt.Sprintf("WITH n(i) AS (SELECT generate_series(1, %d)) ", events)
	}
	raw, err := sql.Open(driver, location)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { raw.Close() })
	insert := "INSERT INTO events (id, idx, occurred_at, type, org_id, actor_kind, actor, object, leaf, mac) " + numbers + fmt.Sprintf(
		"SELECT 'e-' || i, i, %[1]d + i, CASE i %% 3 WHEN 0 THEN 'orgkey.listed' ELSE 'orgkey.created' END, CASE i %% %[2]d WHEN 0 THEN 'acme' ELSE 'org-' || (i %% %[2]d) END, 'user', 'ada', 'k-1', '', '' FROM n",
		noon.UnixMicro(), orgs)
	if driver == "pgx" {
		insert = strings.Replace(insert, "'', '' FROM n", `''::bytea, ''::bytea FROM n`, 1)
	}
	for _, statement := range []string{insert, map[string]string{"sqlite3": "ANALYZE", "pgx": "VACUUM ANALYZE events"}[driver]} {
		if _, err := raw.ExecContext(t.Context(), statement); err != nil {
			t.Fatal(err)
		}
	}
	return raw
}

func explain(t *testing.T, raw *sql.DB, location string, f systemevent.Filter) string {
	t.Helper()
	statement, args := sqlstore.SystemEventsStatement(f)
	return planOf(t, raw, location, statement, args...)
}

// planOf is how a database would answer a statement.
func planOf(t *testing.T, raw *sql.DB, location, statement string, args ...any) string {
	t.Helper()
	explain := "EXPLAIN QUERY PLAN "
	if strings.HasPrefix(location, "postgres") {
		explain = "EXPLAIN "
	}
	rows, err := raw.QueryContext(context.Background(), explain+statement, args...)
	if err != nil {
		t.Fatal(err)
	}
	defer rows.Close()
	columns, err := rows.Columns()
	if err != nil {
		t.Fatal(err)
	}
	var plan []string
	for rows.Next() {
		cells := make([]any, len(columns))
		into := make([]any, len(columns))
		for i := range cells {
			into[i] = &cells[i]
		}
		if err := rows.Scan(into...); err != nil {
			t.Fatal(err)
		}
		plan = append(plan, fmt.Sprint(cells[len(cells)-1]))
	}
	if err := rows.Err(); err != nil {
		t.Fatal(err)
	}
	return strings.Join(plan, "\n")
}
