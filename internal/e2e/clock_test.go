package e2e

import (
	"database/sql"
	"encoding/json"
	"net"
	"testing"
	"time"

	"github.com/orgkeys/orgkeys/internal/chaos/cluster"
	"github.com/orgkeys/orgkeys/internal/e2e/harness"
)

// Promise 7: a replica whose clock is ten minutes ahead of the database's, which is
// what the other replicas judge by, ends no enrollment and no reservation early,
// and dates no event.
func TestPromise7_AReplicasClockEndsNoEnrollment(t *testing.T) {
	c := cluster.ConfigureOnHSM(t, 1, harness.Set("ORGKEYS_DELIVERY_TTL", "60s"), harness.Set("ORGKEYS_RESERVATION_TTL", "10s"))
	admin, err := sql.Open("pgx", c.Database)
	must(t, err)
	defer admin.Close()
	for _, statement := range []string{
		"CREATE SCHEMA behind",
		"CREATE FUNCTION behind.clock_timestamp() RETURNS timestamptz LANGUAGE sql VOLATILE AS 'SELECT pg_catalog.clock_timestamp() - interval ''10 minutes'''",
		"ALTER DATABASE orgkeys SET search_path = behind, pg_catalog",
	} {
		_, err := admin.Exec(statement)
		must(t, err)
	}
	s := c.Replicas[0]
	s.Start(t)
	org := harness.Org()
	key := s.Generate(t, org)

	m := mint(t, s, org, `{"ttlSeconds":60}`)
	time.Sleep(2 * time.Second) // the sweeper comes by
	if state := show(t, s, org, m.ID).State; state != "open" {
		t.Errorf("an enrollment that lasts a minute is %s at once", state)
	}
	enrolled := fetch(t, enrollment(t, s.API, m.Token, newRecipient(t), 20*time.Second))
	if claims := show(t, s, org, m.ID).Claims; len(claims) != 1 || claims[0].KeyID != enrolled.KeyID || claims[0].State != "received" {
		t.Errorf("after the receipt: %+v", claims)
	}
	if n := len(s.List(t, org)); n != 1 {
		t.Errorf("%d keys are listed, want 1", n)
	}
	nodes := from(net.IPv4(127, 0, 0, 9))
	for _, path := range []string{"/secrets", "/register"} {
		if status := ask(t, nodes, s, path, key, org); status != 200 {
			t.Errorf("%s of a node whose clock is the replica's: %d", path, status)
		}
	}

	dated, err := admin.Query("SELECT leaf FROM behind.events")
	must(t, err)
	defer dated.Close()
	events := 0
	for dated.Next() {
		var leaf []byte
		must(t, dated.Scan(&leaf))
		var e harness.Leaf
		must(t, json.Unmarshal(leaf, &e))
		at, err := time.Parse(time.RFC3339, e.Time)
		must(t, err)
		if behind := time.Since(at); behind < 9*time.Minute || behind > 12*time.Minute {
			t.Errorf("%s is of %s, %s ago: not by the database's clock", e.Type, e.Time, behind)
		}
		events++
	}
	if must(t, dated.Err()); events < 6 {
		t.Errorf("%d events", events)
	}
}
