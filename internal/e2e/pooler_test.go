package e2e

import (
	"fmt"
	"path/filepath"
	"testing"

	"github.com/orgkeys/orgkeys/internal/chaos/cluster"
)

// Replicas behind a real PgBouncer, set up as docs/operations.md shows, in each
// mode that works. The short form is two replicas that share a key and its end;
// the long one is the replicas' suite, with the numbers of its own short form:
// the thousands of keys of the long one take hours, and no more of the pooler.
func TestReplicasBehindPgBouncer(t *testing.T) {
	for _, mode := range []string{"transaction", "session"} {
		t.Run(mode, func(t *testing.T) {
			t.Setenv(cluster.PoolerMode, mode)
			if !long() {
				c := cluster.ConfigureOnHSM(t, 2)
				outside := t.TempDir()
				for i, r := range c.Replicas {
					r.Configured("ORGKEYS_AUDIT_FILE", filepath.Join(outside, fmt.Sprintf("sink-%d.jsonl", i)))
					r.Start(t) // one after the other: the first makes the token
				}
				deletedAndRefused(t, c, 1, 1)
				for _, r := range c.Replicas {
					r.Stop(t)
				}
				for _, r := range c.Replicas[1:] { // which stopped last, so that its sink has all
					succeeds(t, r, "audit", "verify")
				}
				return
			}
			t.Setenv("ORGKEYS_TEST_LONG", "")
			t.Run("the sequencer", TestTheSequencersPlaceIsTakenOver)
			t.Run("deleted on one, refused on another", TestPromise6_DeletedOnOneReplicaRefusedOnAnother)
			t.Run("the quota", TestPromise3_AcrossReplicas)
			t.Run("a rolling restart", TestRollingRestartLosesNoRequest)
		})
	}
}
