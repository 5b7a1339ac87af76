package main

import (
	"context"
	"errors"
	"fmt"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/orgkeys/orgkeys/internal/audit"
	"github.com/orgkeys/orgkeys/internal/config"
	"github.com/orgkeys/orgkeys/internal/orgkey"
	"github.com/orgkeys/orgkeys/internal/sqlstore"
)

// openEventKey opens the sealed key that authenticates events, or makes it, and
// gives it to db. Before, db records nothing.
func openEventKey(ctx context.Context, sealer orgkey.Sealer, db *sqlstore.DB) error {
	head, err := db.Head(ctx)
	if err != nil {
		return err
	}
	binding := orgkey.Binding{Purpose: orgkey.EventKey, Org: head.Origin}
	sealed, err := db.SealedEventKey(ctx, head.Origin)
	if err == nil && sealed == nil {
		if err = makeEventKey(ctx, sealer, db, binding); err == nil {
			sealed, err = db.SealedEventKey(ctx, head.Origin) // another replica's, if that was first
		}
	}
	if err != nil {
		return fmt.Errorf("looking for the key that authenticates events: %w", err)
	}
	opened, err := sealer.Open(ctx, []orgkey.Sealed{{Binding: binding, Ciphertext: sealed}})
	if errors.Is(err, orgkey.ErrSealBroken) {
		err = fmt.Errorf("%w; the sealing key is not the one that this database was sealed under: restore it, or if min_decryption_version of orgkeys-seal/keys/seal was raised in Vault, lower it and run orgkeys rewrap first", err)
	}
	if err != nil {
		return fmt.Errorf("opening the key that authenticates events: %w", err)
	}
	defer clear(opened[0])
	if len(opened[0]) != len(audit.EventKey{}) {
		return fmt.Errorf("opening the key that authenticates events: it has %d bytes", len(opened[0]))
	}
	db.UseEventKey(audit.EventKey(opened[0]))
	return nil
}

func makeEventKey(ctx context.Context, sealer orgkey.Sealer, db *sqlstore.DB, binding orgkey.Binding) error {
	key := audit.NewEventKey()
	defer clear(key[:])
	sealed, err := sealer.Seal(ctx, binding, key[:])
	if err != nil {
		return err
	}
	return db.KeepEventKey(ctx, binding.Org, sealed)
}

// openToRecord lets a command record events beside a server or without one.
func openToRecord(ctx context.Context, cfg config.Config, dir *dataDir, db *sqlstore.DB) error {
	b, err := openBackend(ctx, cfg, dir, db, newLogger(cfg))
	if err != nil {
		return err
	}
	return errors.Join(openEventKey(ctx, b.sealer, db), b.close())
}

// unauthenticated reports events in the database that were refused a place in
// the log.
func unauthenticated(ctx context.Context, db *sqlstore.DB) error {
	n, err := db.Unauthenticated(ctx)
	if err == nil && n > 0 {
		err = &audit.UnauthenticatedError{Count: int(n)}
	}
	return err
}

var eventsRefused = prometheus.NewDesc("orgkeys_audit_events_unauthenticated", "Events in the database that orgkeys did not record and that get no place in the log.", nil, nil)

// refusedCollector shows nothing while the database cannot be asked.
type refusedCollector struct{ db *sqlstore.DB }

func (refusedCollector) Describe(ch chan<- *prometheus.Desc) { ch <- eventsRefused }

func (c refusedCollector) Collect(ch chan<- prometheus.Metric) {
	ctx, cancel := context.WithTimeout(context.Background(), askTimeout)
	defer cancel()
	if n, err := c.db.Unauthenticated(ctx); err == nil {
		ch <- prometheus.MustNewConstMetric(eventsRefused, prometheus.GaugeValue, float64(n))
	}
}
