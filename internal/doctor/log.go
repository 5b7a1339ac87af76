package doctor

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/go-json-experiment/json"

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
			d.sinkFile(ctx, db, name)
			continue
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

// sinkFile compares the last checkpoint in the file with the log, without
// opening it for writing, because a server may be writing to it.
func (d *doctor) sinkFile(ctx context.Context, db *sqlstore.DB, name string) {
	f, err := os.Open(d.cfg.AuditFile)
	if err != nil {
		d.fail(name, "make sure that the user that runs orgkeys owns it", "%v", err)
		return
	}
	held, err := lastCheckpoint(f)
	if err := errors.Join(err, f.Close()); err != nil {
		d.fail(name, "keep the file as evidence and find out who changed it", "%v", err)
		return
	}
	d.sink(name, audit.NewLog(db, d.log, heldSink{held}).CheckExtends(ctx))
}

// lastCheckpoint finds the last checkpoint that a file sink holds; none has
// size 0. An incomplete last line is one that is being written.
func lastCheckpoint(r io.Reader) (held audit.Checkpoint, err error) {
	in := bufio.NewReader(r)
	for {
		raw, err := in.ReadBytes('\n')
		if errors.Is(err, io.EOF) {
			return held, nil
		}
		if err != nil {
			return held, err
		}
		var line struct {
			Checkpoint string `json:"checkpoint"`
		}
		if err := json.Unmarshal(raw, &line); err != nil {
			return held, fmt.Errorf("a line is not in the sink's format: %w", err)
		}
		if line.Checkpoint == "" {
			continue
		}
		if held, err = audit.ParseCheckpoint(line.Checkpoint); err != nil {
			return held, err
		}
	}
}

// heldSink is a sink of which only the last checkpoint is known.
type heldSink struct{ held audit.Checkpoint }

func (heldSink) Name() string                                         { return config.SinkFile }
func (heldSink) Shared() bool                                         { return false }
func (s heldSink) Last(context.Context) (audit.Checkpoint, error)     { return s.held, nil }
func (heldSink) KeepSigned(context.Context, string) error             { return errHeldOnly }
func (heldSink) AcceptRollback(context.Context, audit.Rollback) error { return errHeldOnly }
func (heldSink) Append(context.Context, []audit.Entry, audit.Checkpoint) ([][]byte, error) {
	return nil, errHeldOnly
}

var errHeldOnly = errors.New("doctor changes nothing")

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
