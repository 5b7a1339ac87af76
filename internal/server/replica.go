package server

import (
	"context"
	"log/slog"
	"os"
	"time"

	"github.com/google/uuid"

	"github.com/orgkeys/orgkeys/internal/sqlstore"
)

// announceInterval is how often a replica says that it lives.
const announceInterval = 3 * time.Second

// announce says what this replica is until ctx ends: for orgkeys doctor, for the
// other replicas, which wait for it after a failover, and as proof that writes
// succeed, which readiness follows from.
func announce(ctx context.Context, db *sqlstore.DB, self func() sqlstore.Replica, log *slog.Logger) {
	id := uuid.NewString()
	host, err := os.Hostname()
	if err != nil {
		host = id // so that it is not mistaken for another
	}
	ticker := time.NewTicker(announceInterval)
	defer ticker.Stop()
	for {
		r := self()
		r.ID, r.Address = id, host+" "+r.Address // in containers all listen on one address
		if err := db.AnnounceReplica(ctx, r); err != nil && ctx.Err() == nil {
			log.Warn("announcing this replica", "error", err)
		}
		select {
		case <-ticker.C:
		case <-ctx.Done():
			leaving, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Second)
			defer cancel()
			if err := db.ForgetReplica(leaving, id); err != nil {
				log.Warn("removing this replica's announcement", "error", err)
			}
			return
		}
	}
}
