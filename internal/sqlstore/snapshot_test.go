package sqlstore_test

import (
	"context"
	"testing"

	"github.com/orgkeys/orgkeys/internal/audit"
	"github.com/orgkeys/orgkeys/internal/audit/verify"
	"github.com/orgkeys/orgkeys/internal/sqlstore"
)

// A log that grows while it is verified is no forgery. It is longer than a page.
func TestALogIsVerifiedWhileItGrows(t *testing.T) {
	onBoth(t, func(t *testing.T, db *sqlstore.DB, _ string) {
		grow := func(ctx context.Context, n int) error {
			events := make([]audit.Event, n)
			for i := range events {
				events[i] = audit.New(audit.KeysListed, "acme")
			}
			if err := db.Record(ctx, events...); err != nil {
				return err
			}
			_, err := db.Sequence(ctx, n, audit.Condition{})
			return err
		}
		if err := grow(t.Context(), 2500); err != nil {
			t.Fatal(err)
		}
		ctx, stop := context.WithCancel(t.Context())
		ended := make(chan struct{})
		go func() {
			defer close(ended)
			for ctx.Err() == nil {
				if err := grow(ctx, 3); err != nil && ctx.Err() == nil {
					t.Error(err)
					return
				}
			}
		}()
		for range 20 {
			report, err := verify.Verify(t.Context(), db, nil, nil)
			if err == nil && report.Log.Size < 2500 {
				t.Errorf("%d events", report.Log.Size)
			}
			if err != nil {
				t.Error(err)
				break
			}
		}
		stop()
		<-ended
	})
}
