package e2e

import (
	"testing"

	"github.com/orgkeys/orgkeys/internal/chaos/cluster"
)

// The replicas' suite once more, behind a real PgBouncer in each mode that works.
func TestReplicasBehindPgBouncer(t *testing.T) {
	if !long() { // it takes minutes, and runs other tests once more
		return
	}
	for _, mode := range []string{"transaction", "session"} {
		t.Run(mode, func(t *testing.T) {
			t.Setenv(cluster.PoolerMode, mode)
			t.Run("the sequencer", TestTheSequencersPlaceIsTakenOver)
			t.Run("deleted on one, refused on another", TestPromise6_DeletedOnOneReplicaRefusedOnAnother)
			if long() {
				t.Run("the quota", TestPromise3_AcrossReplicas)
				t.Run("a rolling restart", TestRollingRestartLosesNoRequest)
				return
			}
			c := cluster.Start(t, 2)
			contend(t, c, 2, 12)
		})
	}
}
