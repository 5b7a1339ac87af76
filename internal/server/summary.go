package server

import (
	"context"
	"fmt"
	"log/slog"
	"time"

	"github.com/orgkeys/orgkeys/internal/audit"
	"github.com/orgkeys/orgkeys/internal/authn"
)

// summary records how many unauthenticated callers were refused, for each reason.
type summary struct {
	failures *authn.Failures
	record   func(context.Context, ...audit.Event) error // of events that it may have recorded already
	unsent   []audit.Event                               // that may have been recorded; they are repeated as they are
}

// run does so once per minute.
func (s *summary) run(ctx context.Context, log *slog.Logger) {
	ticker := time.NewTicker(summaryInterval)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
		case <-ticker.C:
		}
		if err := s.report(context.WithoutCancel(ctx)); err != nil {
			log.Warn("the summary of unauthenticated callers is not in the audit log yet", "error", err)
		}
		if ctx.Err() != nil {
			return
		}
	}
}

func (s *summary) report(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	if err := s.send(ctx); err != nil {
		return err
	}
	for reason, n := range s.failures.Flush() {
		e := audit.New(audit.UnknownCallers, "")
		e.Actor = audit.Actor{Kind: audit.System, ID: "authn"}
		e.Outcome, e.Reason = audit.Denied, reason
		e.Detail = map[string]string{"count": fmt.Sprint(n)}
		s.unsent = append(s.unsent, e)
	}
	return s.send(ctx)
}

func (s *summary) send(ctx context.Context) error {
	if len(s.unsent) == 0 {
		return nil
	}
	err := s.record(ctx, s.unsent...)
	if err == nil {
		s.unsent = nil
	}
	return err
}
