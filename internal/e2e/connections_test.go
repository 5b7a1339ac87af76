package e2e

import (
	"database/sql"
	"net/http"
	"strconv"
	"sync"
	"testing"
	"time"

	"github.com/orgkeys/orgkeys/internal/chaos/cluster"
	"github.com/orgkeys/orgkeys/internal/e2e/harness"
)

// ORGKEYS_DATABASE_CONNECTIONS is how many connections a process opens when more
// requests than that need one, and not one more.
func TestTheMostConnectionsToTheDatabase(t *testing.T) {
	for _, most := range []int{5, 9} {
		t.Run(strconv.Itoa(most), func(t *testing.T) {
			t.Parallel()
			c := cluster.ConfigureOnHSM(t, 1, harness.Set("ORGKEYS_DATABASE_CONNECTIONS", strconv.Itoa(most)))
			r := c.Replicas[0]
			r.Start(t)
			admin, err := sql.Open("pgx", c.Database)
			must(t, err)
			defer admin.Close()
			org := harness.Org()
			list(t, c, org)
			held, err := admin.Begin() // whoever lists keys waits, with a connection
			must(t, err)
			defer func() { _ = held.Rollback() }()
			_, err = held.Exec("LOCK TABLE org_keys IN ACCESS EXCLUSIVE MODE")
			must(t, err)
			token := c.Owner(t, org)
			var requests sync.WaitGroup
			for range 3 * most {
				requests.Go(func() {
					_, _ = r.Try(t.Context(), harness.Request{Method: http.MethodGet, Path: harness.KeyPath(org), Token: token})
				})
			}
			open := func() (n int) {
				must(t, admin.QueryRow("SELECT count(*) FROM pg_stat_activity WHERE application_name = 'orgkeys'").Scan(&n))
				return n
			}
			harness.Eventually(t, harness.Patience, "all connections are open", func() bool { return open() >= most })
			for range 20 { // time for one more
				if n := open(); n > most {
					t.Errorf("%d connections are open", n)
					break
				}
				time.Sleep(50 * time.Millisecond)
			}
			must(t, held.Rollback())
			requests.Wait()
		})
	}
}
