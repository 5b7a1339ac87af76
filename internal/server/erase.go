package server

import (
	"context"
	"log/slog"
	"slices"
	"strconv"

	"github.com/orgkeys/orgkeys/internal/audit"
	"github.com/orgkeys/orgkeys/internal/authn"
	"github.com/orgkeys/orgkeys/internal/config"
	"github.com/orgkeys/orgkeys/internal/sqlstore"
)

// ErasePerson erases a person's data from the log, beside a server or without one, and
// returns how many events held some, and by which IDs the log knows the person.
func ErasePerson(ctx context.Context, cfg config.Config, db *sqlstore.DB, subject, reason string, log *slog.Logger) (n int64, known []string, err error) {
	if err := OpenToRecord(ctx, cfg, db, log); err != nil {
		return 0, nil, err
	}
	n, err = db.Erase(ctx, subject, func(id string, n int64) audit.Event {
		if !slices.Contains(known, id) { // an attempt may be repeated
			known = append(known, id)
		}
		e := audit.New(audit.PersonErased, "")
		e.Actor = audit.Actor{Kind: audit.System, ID: "operator"}
		if n > 0 || !authn.IsPersonal(config.PseudonymAddresses, id) && !authn.IsPersonal(cfg.Pseudonyms, id) {
			e.Object = id // what would name the person, and the log does not have yet, must not come into it
		}
		e.Detail = map[string]string{"events": strconv.FormatInt(n, 10), "reason": reason}
		return e
	})
	return n, known, err
}
