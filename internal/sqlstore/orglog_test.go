package sqlstore_test

import (
	"fmt"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/orgkeys/orgkeys/internal/audit"
	"github.com/orgkeys/orgkeys/internal/orglog"
	"github.com/orgkeys/orgkeys/internal/session"
	"github.com/orgkeys/orgkeys/internal/sqlstore"
)

func TestOrgEventsPageByPageAndByEveryFilter(t *testing.T) {
	t.Parallel()
	onBoth(t, func(t *testing.T, db *sqlstore.DB, _ string) {
		names := someEvents(t, db)
		if _, err := db.Sequence(t.Context(), 3, audit.Condition{}); err != nil {
			t.Fatal(err)
		}
		read := func(f orglog.Filter) (got []string, last int64) {
			t.Helper()
			f.Org = "acme"
			found, err := db.OrgEvents(t.Context(), f)
			if err != nil {
				t.Fatal(err)
			}
			for _, s := range found {
				e, err := audit.Decode(s.Leaf)
				if err != nil {
					t.Fatal(err)
				}
				got, last = append(got, names[e.ID]), s.Number
			}
			return got, last
		}
		all, _ := read(orglog.Filter{Take: 100})
		if len(all) != len(names) || !slices.Contains(all, "all deleted") {
			t.Fatalf("the events are %q", all)
		}
		var pages []string
		for before := int64(0); ; {
			page, last := read(orglog.Filter{Take: 4, Before: before})
			if len(page) == 0 {
				break
			}
			pages, before = append(pages, page...), last
		}
		if !slices.Equal(pages, all) {
			t.Errorf("page by page the events are %q", pages)
		}
		for name, c := range map[string]struct {
			f    orglog.Filter
			want []string
		}{
			"an object":        {orglog.Filter{Object: "k-1"}, []string{"k-1 deleted", "k-1 delivered", "k-1 created"}},
			"types":            {orglog.Filter{Types: []string{"secret.put", "access.denied"}}, []string{"secret", "denial"}},
			"an actor":         {orglog.Filter{Actor: "k-1", Types: []string{"node.registered"}}, []string{"n-1 repeated", "n-1 updated", "n-1 created"}},
			"a person":         {orglog.Filter{Person: "ada", Object: "k-2"}, nil},
			"a window":         {orglog.Filter{From: noon.Add(11 * time.Minute), Until: noon.Add(13 * time.Minute)}, []string{"secret", "denial"}},
			"a quotation":      {orglog.Filter{Actor: "' OR ''='"}, nil},
			"before the first": {orglog.Filter{Before: 1}, nil},
		} {
			c.f.Take = 100
			got, _ := read(c.f)
			slices.Sort(got) // someEvents records in no order
			slices.Sort(c.want)
			if !slices.Equal(got, c.want) {
				t.Errorf("%s: %q, want %q", name, got, c.want)
			}
		}
		for name, c := range map[string]struct {
			f    orglog.Filter
			n    int
			want string // the newest n of what an index leads to, oldest first
		}{
			"the second":              {orglog.Filter{Org: "acme"}, 2, all[1]},
			"the last":                {orglog.Filter{Org: "acme"}, len(all), all[len(all)-1]},
			"more than there are":     {orglog.Filter{Org: "acme"}, len(all) + 1, ""},
			"a filter is not counted": {orglog.Filter{Org: "acme", Actor: "nobody", Types: []string{"secret.put"}}, 2, all[1]},
			"an object's":             {orglog.Filter{Org: "acme", Object: "k-1"}, 4, ""},
			"before the first":        {orglog.Filter{Org: "acme", Before: 1}, 1, ""},
		} {
			floor, err := db.OrgFloor(t.Context(), c.f, c.n)
			if err != nil || (floor == 0) != (c.want == "") {
				t.Errorf("%s: the floor is %d, %v", name, floor, err)
			}
			if floor == 0 {
				continue
			}
			if above, _ := read(orglog.Filter{Floor: floor, Take: 100}); len(above) != c.n || above[c.n-1] != c.want {
				t.Errorf("%s: from the floor on there are %q", name, above)
			}
			if second, err := db.OrgFloor(t.Context(), orglog.Filter{Org: "acme", Before: floor}, 1); c.n == 2 && (err != nil || second == 0 || second >= floor) {
				t.Errorf("%s: below the floor the newest is %d, %v", name, second, err)
			}
		}
		first, err := db.OrgEvents(t.Context(), orglog.Filter{Org: "other", Take: 1})
		if err != nil || len(first) != 1 {
			t.Fatalf("%v, %v", first, err)
		}
		e, err := audit.Decode(first[0].Leaf)
		if err != nil {
			t.Fatal(err)
		}
		if _, there, err := db.OrgEvent(t.Context(), "acme", e.ID, ""); there || err != nil {
			t.Errorf("another organization's event is there, %v", err)
		}
		if _, there, err := db.OrgEvent(t.Context(), "other", e.ID, "bob"); there || err != nil {
			t.Errorf("another person's event is there, %v", err)
		}
		if _, there, err := db.OrgEvent(t.Context(), "other", e.ID, "ada"); !there || err != nil {
			t.Errorf("one's own event is not there, %v", err)
		}
		reserve(t, db, "acme", 5)
		id := released(t, db, "acme", 5)
		counts, err := db.OrgCounts(t.Context(), "acme", noon)
		if err != nil || len(counts.Occupants) != 2 || counts.Occupants[0].State != "reserved" || counts.Occupants[1].ID != id || counts.Occupants[1].State != "released" ||
			counts.Unconfirmed != 1 || counts.EventsByHour[0] != len(names) {
			t.Errorf("the counts are %+v, %v", counts, err)
		}
	})
}

func TestConsoleSessions(t *testing.T) {
	t.Parallel()
	onBoth(t, func(t *testing.T, db *sqlstore.DB, _ string) {
		put := func(id, holder string, life time.Duration) {
			t.Helper()
			if err := db.KeepSession(t.Context(), session.Stored{ID: id, Holder: holder, Sealed: []byte(id), Expires: time.Now().Add(life)}, 3); err != nil {
				t.Fatal(err)
			}
		}
		there := func(id string) bool {
			t.Helper()
			s, there, err := db.Session(t.Context(), id)
			if err != nil || there && string(s.Sealed) != id {
				t.Fatalf("%+v, %v", s, err)
			}
			return there
		}
		put("over", "ada", -time.Second)
		for i := range 5 {
			put(fmt.Sprint(i), "ada", time.Duration(10-i)*time.Minute) // the newest expires first
		}
		put("bob", "bob", time.Minute)
		for id, want := range map[string]bool{"over": false, "0": false, "1": false, "2": true, "3": true, "4": true, "bob": true, "nobody": false} {
			if there(id) != want {
				t.Errorf("session %s: %t", id, !want)
			}
		}
		if err := db.DropSession(t.Context(), "3"); err != nil || there("3") {
			t.Errorf("a session that was ended is there, %v", err)
		}
		if err := db.DropSession(t.Context(), "3"); err != nil {
			t.Error(err)
		}
		var at sync.WaitGroup
		for i := range 12 {
			at.Go(func() {
				if err := db.KeepSession(t.Context(), session.Stored{ID: fmt.Sprint("at once ", i), Holder: "eve", Sealed: []byte("x"), Expires: time.Now().Add(time.Hour)}, 3); err != nil {
					t.Error(err)
				}
			})
		}
		at.Wait()
		n := 0
		for i := range 12 {
			if _, there, err := db.Session(t.Context(), fmt.Sprint("at once ", i)); err != nil {
				t.Error(err)
			} else if there {
				n++
			}
		}
		if n != 3 {
			t.Errorf("of twelve that began at once %d are there", n)
		}
	})
}
