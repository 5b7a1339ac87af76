package doctor

import (
	"context"
	"errors"
	"os"
	"time"

	"github.com/orgkeys/orgkeys/internal/audit"
	"github.com/orgkeys/orgkeys/internal/audit/rollback"
	"github.com/orgkeys/orgkeys/internal/config"
	"github.com/orgkeys/orgkeys/internal/server"
	"github.com/orgkeys/orgkeys/internal/sqlstore"
)

func (d *doctor) sinks(ctx context.Context, db *sqlstore.DB, sinks []audit.Sink) {
	if inside, err := server.OnlySinkInside(d.cfg); err == nil && inside {
		d.warn("audit sinks", server.OnlySinkRemedy, "%s", server.OnlySinkProblem)
	}
	for _, sink := range sinks {
		name := "sink " + sink.Name()
		// Asking the file sink would create the file, or repair an incomplete line.
		if sink.Name() == config.SinkFile {
			if _, err := os.Stat(d.cfg.AuditFile); errors.Is(err, os.ErrNotExist) {
				d.warn(name, "orgkeys serve writes it again from the database; find out who removed it", "%s does not exist", d.cfg.AuditFile)
				continue
			}
			sink = audit.AskFileSink(d.cfg.AuditFile)
		}
		err := audit.NewLog(db, d.log, sink).CheckExtends(ctx)
		d.sink(name, err)
	}
}

// rollbackRemedy is for a sink that the log does not extend.
const rollbackRemedy = "find out why; after a failover of the database or a restored backup, accept the loss: docs/operations.md, Failover, and orgkeys audit accept-rollback --reason …"

// heldBack reports sinks of other replicas that are ahead of the log.
func (d *doctor) heldBack(ctx context.Context, db *sqlstore.DB) {
	ahead, err := db.SinksAhead(ctx)
	if err != nil {
		d.fail("audit log", "see the database's own log", "%v", err)
		return
	}
	for _, s := range ahead {
		d.fail("audit log", "find out why (docs/operations.md, Failover); "+rollback.Remedy(s.Holder), "no event gets an index: the log does not extend the %[3]d events in sink %[1]s of %[2]s (since %[4]s)",
			s.Sink, s.Holder, s.Size, s.Found.Format(time.RFC3339))
	}
}

func (d *doctor) sink(name string, err error) {
	switch {
	case audit.SetBack(err):
		d.fail(name, rollbackRemedy, "%v", err)
	case err != nil:
		d.fail(name, "fix the sink: no key is released until it answers", "%v", err)
	default:
		d.ok(name, "the log extends it")
	}
}
