package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strconv"
	"time"

	"github.com/spf13/cobra"

	"github.com/orgkeys/orgkeys/internal/audit"
	"github.com/orgkeys/orgkeys/internal/config"
	"github.com/orgkeys/orgkeys/internal/gate"
	"github.com/orgkeys/orgkeys/internal/orgkey"
	"github.com/orgkeys/orgkeys/internal/sqlstore"
	"github.com/orgkeys/orgkeys/internal/vault"
)

// rewrapBatch is how many records are rewrapped by one call and stored by one
// transaction, which a server's writers wait for.
const rewrapBatch = 100

func newRewrap() *cobra.Command {
	return &cobra.Command{
		Use:   "rewrap",
		Short: "Seal every stored record again under the newest version of Vault's key",
		Long: `Seals every stored public key and boot secret, and the key that authenticates
events, again under the newest version of the sealing key in Vault, inside Vault. Run it after
"vault write -f orgkeys-seal/keys/seal/rotate".

The server may run meanwhile, and a run that was interrupted is completed by
another: records of the newest version are left alone, and so are those that
change while it runs. One that does not open is named, and does not stop the
others. Progress goes to standard error.

What is being sealed at the moment of the rotation may be stored under the old
version a little later. So a run soon after one looks at all records again when
the version is old enough: after ORGKEYS_RESERVATION_TTL. When a run has ended
without an error, nothing needs the older versions but backups of the database,
and min_decryption_version may be raised as far as your backups allow. If it was
raised too early, lower it and run this again: nothing is lost.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg, err := load(cmd)
			if err != nil {
				return err
			}
			if cfg.Keystore != config.KeystoreVault {
				return errors.New("records are sealed by the HSM, whose key has no versions: rewrap is for ORGKEYS_KEYSTORE=vault")
			}
			return rewrap(cmd.Context(), cfg, cmd.ErrOrStderr())
		},
	}
}

func rewrap(ctx context.Context, cfg config.Config, progress io.Writer) (err error) {
	if err := hideMemory(); err != nil {
		return fmt.Errorf("keeping memory private: %w", err)
	}
	db, err := openLog(ctx, cfg)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, db.Close()) }()
	starting, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	client, err := openVaultClient(starting, cfg, newLogger(cfg))
	if err != nil {
		return err
	}
	defer client.Close()
	r := rewrapper{db: db, sealer: client.Sealer(), progress: progress, failed: map[orgkey.Binding]bool{}}
	err = r.run(ctx, max(cfg.ReservationTTL, 2*gate.RecordDeadline))
	return errors.Join(err, r.broken(), r.record(ctx, err))
}

// rewrapper is one run.
type rewrapper struct {
	db       *sqlstore.DB
	sealer   *vault.Sealer
	progress io.Writer

	key       vault.SealingKey
	rewrapped int
	failed    map[orgkey.Binding]bool
}

// run rewraps everything, and once more if the key's newest version was younger
// than settled when it began: until then a record may be stored that was sealed
// before that version was.
func (r *rewrapper) run(ctx context.Context, settled time.Duration) error {
	for seen := 0; ; {
		key, err := r.sealer.Key(ctx)
		if err != nil {
			return err
		}
		if key.Latest == seen {
			key.Age = settled // it was waited for, whatever Vault's clock says
		}
		r.key = key
		if err := r.pass(ctx); err != nil {
			return err
		}
		wait := settled - max(key.Age, 0)
		if wait <= 0 {
			return nil
		}
		fmt.Fprintf(r.progress, "version %d is new: what was being sealed before it is stored within %s; then all is looked at once more\n", key.Latest, wait)
		seen = key.Latest
		select {
		case <-time.After(wait):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

func (r *rewrapper) pass(ctx context.Context) error {
	return errors.Join(r.all(ctx, orgkey.PublicKey, "public keys"), r.all(ctx, orgkey.BootSecret, "boot secrets"),
		r.all(ctx, orgkey.EventKey, "keys that authenticate events"))
}

// all rewraps the records of a purpose, which what names.
func (r *rewrapper) all(ctx context.Context, purpose, what string) error {
	total, err := r.db.CountSealed(ctx, purpose)
	if err != nil {
		return err
	}
	after, seen, before := orgkey.Binding{Purpose: purpose}, 0, r.rewrapped
	for {
		page, err := r.db.SealedAfter(ctx, after, rewrapBatch)
		if err != nil {
			return err
		}
		if len(page) == 0 {
			fmt.Fprintf(r.progress, "%s: %d, of which %d were rewrapped to version %d\n", what, seen, r.rewrapped-before, r.key.Latest)
			return nil
		}
		if err := r.batch(ctx, r.outdated(page)); err != nil {
			return err
		}
		after, seen = page[len(page)-1].Binding, seen+len(page)
		fmt.Fprintf(r.progress, "%s: %d of about %d\n", what, seen, total)
	}
}

// outdated are the records of another version, and those of none: Rewrap says
// what is wrong with those that it cannot bring up to date.
func (r *rewrapper) outdated(page []orgkey.Sealed) []orgkey.Sealed {
	var old []orgkey.Sealed
	for _, s := range page {
		if version, err := r.sealer.Version(s.Ciphertext); err != nil || version != r.key.Latest {
			old = append(old, s)
		}
	}
	return old
}

// batch rewraps all records at once or, if one of them does not open, each by
// itself.
func (r *rewrapper) batch(ctx context.Context, old []orgkey.Sealed) error {
	if len(old) == 0 {
		return nil
	}
	fresh, err := r.sealer.Rewrap(ctx, old)
	if errors.Is(err, orgkey.ErrSealBroken) {
		return r.apart(ctx, old, err)
	}
	if err != nil {
		return err
	}
	n, err := r.db.Reseal(ctx, old, fresh)
	r.rewrapped += n
	return err
}

func (r *rewrapper) apart(ctx context.Context, old []orgkey.Sealed, broken error) error {
	if len(old) == 1 {
		version, err := r.sealer.Version(old[0].Ciphertext)
		switch {
		case err == nil && version > r.key.Latest:
			return fmt.Errorf("there are records of version %d, and the newest of the key orgkeys-seal/keys/seal is %d: Vault was put back to before that version was made; restore a newer backup of Vault, or those records are lost", version, r.key.Latest)
		case err == nil && version < r.key.MinDecryption:
			return fmt.Errorf("there are records of version %d, and versions below %d open nothing now: lower min_decryption_version of the key orgkeys-seal/keys/seal and run this again", version, r.key.MinDecryption)
		}
		if b := old[0].Binding; !r.failed[b] {
			r.failed[b] = true
			fmt.Fprintln(r.progress, broken)
		}
		return nil
	}
	for i := range old {
		if err := r.batch(ctx, old[i:i+1]); err != nil {
			return err
		}
	}
	return nil
}

func (r *rewrapper) broken() error {
	if len(r.failed) == 0 {
		return nil
	}
	return fmt.Errorf("%w: %d of them, named above; restore them from a backup, or have their organizations make new ones", orgkey.ErrSealBroken, len(r.failed))
}

// record leaves the run's event, also of one that was interrupted. The server
// gives it its place in the log.
func (r *rewrapper) record(ctx context.Context, interrupted error) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
	defer cancel()
	e := audit.New(audit.SealsRewrapped, "")
	e.Actor = audit.Actor{Kind: audit.System, ID: "rewrap"}
	e.Detail = map[string]string{"version": strconv.Itoa(r.key.Latest), "count": strconv.Itoa(r.rewrapped)}
	switch {
	case interrupted != nil:
		e.Outcome, e.Reason = audit.Failure, "interrupted"
	case len(r.failed) > 0:
		e.Outcome, e.Reason = audit.Failure, "sealed_record_broken"
	}
	err := openEventKey(ctx, r.sealer, r.db)
	if err == nil {
		err = r.db.Record(ctx, e)
	}
	if err != nil {
		return fmt.Errorf("recording the run: %w", err)
	}
	return nil
}
