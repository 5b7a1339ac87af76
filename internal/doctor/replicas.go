package doctor

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/orgkeys/orgkeys/internal/sqlstore"
)

// clock judges how far this process's clock is ahead of another.
func (d *doctor) clock(whose string, ahead, tolerated time.Duration) {
	const remedy = "have every machine follow NTP"
	switch {
	case ahead.Abs() > clockBroken:
		d.fail("clock", remedy, "this machine's is %s from %s", ahead.Round(time.Millisecond), whose)
	case ahead.Abs() > tolerated:
		d.warn("clock", remedy, "this machine's is %s from %s", ahead.Round(time.Millisecond), whose)
	default:
		d.ok("clock", "agrees with %s", whose)
	}
}

// replicas compares the running replicas with each other and with this
// configuration.
func (d *doctor) replicas(ctx context.Context, db *sqlstore.DB, revision string) {
	live, err := db.Replicas(ctx)
	ahead, clockErr := db.ClockAhead(ctx)
	if err := errors.Join(err, clockErr); err != nil {
		d.fail("replicas", "see the database's own log", "%v", err)
		return
	}
	d.clock("the database's", ahead, clockDoubt)
	d.connections(ctx, db, len(live))
	mine := sqlstore.Replica{Version: d.version, Policy: revision, Max: d.cfg.Max}
	differing := 0
	for _, r := range live {
		if differences := differ(r, mine); len(differences) > 0 {
			differing++
			d.warn("replicas", "give all replicas the same configuration and version; during a rolling upgrade this is expected",
				"%s differs from this configuration: %s", r.Address, strings.Join(differences, ", "))
		}
		if r.ClockAhead.Abs() > clockDoubt {
			d.warn("replicas", "have every machine follow NTP", "%s: its clock is %s from the database's", r.Address, r.ClockAhead.Round(time.Millisecond))
		}
	}
	if differing == 0 {
		d.ok("replicas", "%d running, all with the same configuration", len(live))
	}
}

// connections compares how many connections all replicas may open with how many
// PostgreSQL allows.
func (d *doctor) connections(ctx context.Context, db *sqlstore.DB, replicas int) {
	given, err := db.Connections(ctx)
	if err != nil {
		d.fail("connections", "see the database's own log", "%v", err)
		return
	}
	replicas = max(replicas, 1)
	wanted := replicas * d.cfg.DatabaseConnections
	if db.ThroughPooler() {
		d.ok("connections", "%d replicas may open %d connections to the pooler: make sure that its max_client_conn and pool sizes suffice", replicas, wanted)
		return
	}
	if wanted > given {
		d.warn("connections", "raise max_connections in postgresql.conf, lower ORGKEYS_DATABASE_CONNECTIONS, or run fewer replicas; a rolling restart needs room for one more",
			"%d replicas may open %d connections, but PostgreSQL allows %d", replicas, wanted, given)
		return
	}
	d.ok("connections", "%d replicas may open %d of the %d connections that PostgreSQL allows", replicas, wanted, given)
}

func differ(r, mine sqlstore.Replica) []string {
	var all []string
	if r.Max != mine.Max {
		all = append(all, fmt.Sprintf("ORGKEYS_MAX is %d, not %d", r.Max, mine.Max))
	}
	if mine.Policy != "" && r.Policy != mine.Policy {
		all = append(all, fmt.Sprintf("its policy is %s, not %s", r.Policy, mine.Policy))
	}
	if r.Version != mine.Version {
		all = append(all, fmt.Sprintf("its version is %q, not %q", r.Version, mine.Version))
	}
	return all
}
