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
	key, err := readEventKey(ctx, sealer, db)
	if err == nil && key == nil {
		if err = makeEventKey(ctx, sealer, db); err == nil {
			key, err = readEventKey(ctx, sealer, db) // another replica's, if that was first
		}
	}
	if err != nil {
		return err
	}
	defer clear(key)
	db.UseEventKey(audit.EventKey(key))
	return nil
}

// eventKeyBinding is whose the key is: the log's.
func eventKeyBinding(ctx context.Context, db *sqlstore.DB) (orgkey.Binding, error) {
	head, err := db.Head(ctx)
	return orgkey.Binding{Purpose: orgkey.EventKey, Org: head.Origin}, err
}

// readEventKey opens the sealed key; nil if there is none yet.
func readEventKey(ctx context.Context, sealer orgkey.Sealer, db *sqlstore.DB) ([]byte, error) {
	binding, err := eventKeyBinding(ctx, db)
	if err != nil {
		return nil, err
	}
	sealed, err := db.SealedEventKey(ctx, binding.Org)
	if err != nil {
		return nil, fmt.Errorf("looking for the key that authenticates events: %w", err)
	}
	if sealed == nil {
		return nil, nil
	}
	opened, err := sealer.Open(ctx, []orgkey.Sealed{{Binding: binding, Ciphertext: sealed}})
	if errors.Is(err, orgkey.ErrSealBroken) {
		err = fmt.Errorf("%w; the sealing key is not the one that this database was sealed under, or an older state of it: restore the HSM's or Vault's newest backup, or if min_decryption_version of orgkeys-seal/keys/seal was raised in Vault, lower it and run orgkeys rewrap first", err)
	}
	if err != nil {
		return nil, fmt.Errorf("opening the key that authenticates events: %w", err)
	}
	if len(opened[0]) != len(audit.EventKey{}) {
		clear(opened[0])
		return nil, fmt.Errorf("opening the key that authenticates events: it has %d bytes", len(opened[0]))
	}
	return opened[0], nil
}

func makeEventKey(ctx context.Context, sealer orgkey.Sealer, db *sqlstore.DB) error {
	binding, err := eventKeyBinding(ctx, db)
	if err != nil {
		return err
	}
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
