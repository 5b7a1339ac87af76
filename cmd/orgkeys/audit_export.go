package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime/debug"
	"strings"
	"time"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"
	"github.com/spf13/cobra"

	"github.com/orgkeys/orgkeys/internal/audit/archive"
	"github.com/orgkeys/orgkeys/internal/audit/verify"
	"github.com/orgkeys/orgkeys/internal/server"
	"github.com/orgkeys/orgkeys/internal/sqlstore"
	"github.com/orgkeys/orgkeys/internal/version"
)

// withLog runs do on the log that the settings name.
func withLog(cmd *cobra.Command, do func(ctx context.Context, db *sqlstore.DB) error) error {
	cfg, err := load(cmd)
	if err != nil {
		return err
	}
	db, err := server.OpenLog(cmd.Context(), cfg)
	if err != nil {
		return err
	}
	return errors.Join(do(cmd.Context(), db), db.Close())
}

// progressTo tells w how far a long run is.
func progressTo(w io.Writer, doing string) verify.Progress {
	return func(done, all int64) { fmt.Fprintf(w, "%s %d of %d events\n", doing, done, all) }
}

func newAuditExport() *cobra.Command {
	var withoutKeys bool
	cmd := &cobra.Command{
		Use:   "export FILE",
		Short: "Write the log and its evidence into one archive",
		Long: `Writes a gzipped tar archive with the log's events, its signed checkpoints, the
receipts and their keys, the life of each key, the policies that were in force,
and a manifest. It ends with the newest signed checkpoint, so that a signature
covers all of it; SIGUSR1 makes a running server sign one at once. The server may
be running. Verify it anywhere with: orgkeys audit verify-export FILE --key KEY

It also holds the public keys of all live keys, which the HSM or Vault decrypts:
with them an auditor checks what nodes signed for their keys. The fingerprints in
the log prove them. --without-public-keys leaves them out.`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			cfg, err := load(cmd)
			if err != nil {
				return err
			}
			return withLog(cmd, func(ctx context.Context, db *sqlstore.DB) error {
				if withoutKeys {
					return export(cmd, ctx, db, nil, args[0])
				}
				keys := server.NewPublicKeys(cfg, db, newLogger(cfg))
				return errors.Join(export(cmd, ctx, db, keys.Open, args[0]), keys.Close())
			})
		},
	}
	cmd.Flags().BoolVar(&withoutKeys, "without-public-keys", false, "leave the public keys out, and do without the HSM or Vault")
	return cmd
}

// export writes to a temporary file and renames it, so that FILE is whole or not there.
func export(cmd *cobra.Command, ctx context.Context, db *sqlstore.DB, open archive.PublicKeys, name string) error {
	dir := filepath.Dir(name)
	f, err := os.CreateTemp(dir, ".orgkeys-export-*")
	if err != nil {
		return err
	}
	manifest, err := archive.Write(ctx, f, db, open, dir, version.Of("orgkeys"), progressTo(cmd.ErrOrStderr(), "exported"))
	if err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err == nil {
		err = os.Rename(f.Name(), name)
	}
	if err != nil {
		return errors.Join(err, os.Remove(f.Name()))
	}
	_, err = fmt.Fprintf(cmd.OutOrStdout(), "%s: log %s, %d events, root hash %s\n", name, manifest.Origin, manifest.Size, manifest.Root)
	return err
}

var errNoKey = errors.New("--key: give the log's verifier key, which must not come from the person who gave you the archive; \"orgkeys audit key\" prints it")

func newVerifyExport() *cobra.Command {
	var g given
	cmd := &cobra.Command{
		Use:   "verify-export FILE --key KEY",
		Short: "Verify an export of the audit log, anywhere and offline",
		Long: `Verifies an export against the public keys given with --key: every signature,
every event's index, every receipt, the policies and the inventory. For each
sealed key it prints who permitted it, who claimed it from where, what was sent
and how often, and whether its holder signed for it. It needs no settings. With
--vault-audit the events are compared with Vault's own audit files, in both
directions.

An export alone cannot show whether it was truncated: give --checkpoint or
--vault-audit. Make the export first, then take these. Vault's files show nothing
after their newest entry, whose time is printed; with --as-of they must reach a
given time. In a cluster each node has a file, which only the active node writes:
give the files of all nodes that were ever active.

contrib/verify_export.py does the same without any code of orgkeys, except for
Vault's files.

` + exitCodesHelp,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return judged(cmd, g.asJSON, func(out io.Writer, v *verdict) error { return verifyExport(cmd, args[0], g, out, v) })
		},
	}
	g.flags(cmd)
	return cmd
}

func verifyExport(cmd *cobra.Command, name string, g given, out io.Writer, v *verdict) error {
	keys, err := keysGiven(g.keys)
	if err != nil {
		return err
	}
	if len(keys) == 0 {
		return errNoKey
	}
	asOf, err := asOfGiven(g)
	if err != nil {
		return err
	}
	var outside archive.Outside
	if outside.Vault, err = readVaultFiles(g.vaultFiles); err != nil {
		return err
	}
	if outside.Checkpoint, err = checkpointGiven(g.checkpoint, true); err != nil {
		return err
	}
	f, err := os.Open(name)
	if err != nil {
		return err
	}
	// Most of the memory is the lives of keys, which stay to the end: collecting what
	// does not stay is cheap, and the usual 100 would double the memory.
	defer debug.SetGCPercent(debug.SetGCPercent(20))
	report, err := archive.Verify(cmd.Context(), f, keys, outside, progressTo(cmd.ErrOrStderr(), "verified"))
	if err := errors.Join(err, f.Close()); err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	v.ofExport(report)
	fmt.Fprintf(out, "log %s: %d events, each covered by the signed checkpoint\nroot hash %s\n", report.Manifest.Origin, report.Manifest.Size, report.Manifest.Root)
	fmt.Fprintf(out, "%d checkpoints and %d receipts signed by a given key; the inventory of %d keys agrees with the events\n", report.Checkpoints, report.Receipts, report.Keys)
	for _, r := range report.Rollbacks {
		fmt.Fprintln(out, accepted(r))
	}
	for _, e := range report.Enrolled {
		fmt.Fprintln(out, enrolled(e))
	}
	return exportVouched(out, report, asOf)
}

// enrolled says how a sealed key came to its holder.
func enrolled(e archive.Enrolled) string {
	var b strings.Builder
	fmt.Fprintf(&b, "sealed key %s of %s, for its %s", e.Key, e.Org, e.Scope)
	for _, n := range e.Nodes {
		fmt.Fprintf(&b, ", node %s", n.IP)
	}
	fmt.Fprintf(&b, ": permitted by %s %s (event %d, %s)", e.Permitted.Kind, e.Permitted.Actor, e.Permitted.Index, e.Permitted.Time)
	if e.Approved != nil {
		fmt.Fprintf(&b, "; approved by %s %s (event %d)", e.Approved.Kind, e.Approved.Actor, e.Approved.Index)
	}
	if e.Claimed != nil {
		fmt.Fprintf(&b, "; claimed by enrollment %s from %s (event %d, %s)", e.Enrollment, cmp.Or(e.From, "an address that is not recorded"), e.Claimed.Index, e.Claimed.Time)
	}
	fmt.Fprintf(&b, "; the bytes %s sealed to recipient %s (event %d)", e.SHA256, e.Recipient, e.Sealed.Index)
	switch {
	case e.Received != nil && e.Receipt != archive.Used:
		fmt.Fprintf(&b, " went out %d times", e.Answers)
	case e.Delivered != nil:
		fmt.Fprintf(&b, " went out at least once (event %d)", e.Delivered.Index)
	default:
		b.WriteString(" did not go out")
	}
	switch e.Receipt {
	case archive.Signed:
		fmt.Fprintf(&b, "; received: the holder of the private key signed for them (event %d, %s)", e.Received.Index, e.Received.Time)
	case archive.Unchecked:
		fmt.Fprintf(&b, "; received (event %d), and the signature was NOT checked: %s", e.Received.Index, e.Unchecked)
	case archive.Used:
		fmt.Fprintf(&b, "; nobody signed for them, and requests were signed with the key (event %d)", e.Received.Index)
	case archive.None:
		b.WriteString("; nobody has signed for them")
	}
	return b.String()
}

// asOfGiven is the time to which Vault's audit files must reach; zero: any.
func asOfGiven(g given) (time.Time, error) {
	switch {
	case g.asOf == "":
		return time.Time{}, nil
	case len(g.vaultFiles) == 0:
		return time.Time{}, errors.New("--as-of needs Vault's audit files: give them with --vault-audit")
	}
	at, err := time.Parse(time.RFC3339, g.asOf)
	if err != nil {
		return time.Time{}, fmt.Errorf("--as-of: %q is not a time such as 2026-01-31T12:00:00Z", g.asOf)
	}
	return at, nil
}

// exportVouched prints how many events of an export the evidence from outside
// covers. The key proves that every event in it is genuine, not that none came after.
func exportVouched(out io.Writer, r archive.Report, asOf time.Time) error {
	size := r.Manifest.Size
	if r.Vault != nil {
		return vaultVouched(out, size, *r.Vault, asOf)
	}
	switch {
	case r.Covered == 0:
		return notExcluded("the export ends with the signed checkpoint of %d events and cannot show whether there is a newer one; give one that was kept elsewhere with --checkpoint, or Vault's audit file with --vault-audit", size)
	case r.Covered < size:
		return notExcluded("the given checkpoint covers %d of %d events, and there is no evidence of where the log ended; give a newer one with --checkpoint, or Vault's audit file with --vault-audit", r.Covered, size)
	}
	_, err := fmt.Fprintf(out, "truncation excluded: the given checkpoint covers %d of %d events\n", r.Covered, size)
	return err
}

// vaultVouched says of what time Vault's audit files speak: nobody can see in
// them whether a file of another node is missing, or what came later.
func vaultVouched(out io.Writer, size int64, v archive.VaultReport, asOf time.Time) error {
	for _, f := range v.Files {
		fmt.Fprintf(out, "Vault's audit file %s: %d entries from %s to %s\n", f.Name, f.Entries, f.First.Format(time.RFC3339), f.Last.Format(time.RFC3339))
	}
	for _, l := range v.Lost {
		fmt.Fprintf(out, "%d events in Vault's audit file, from %s to %s, were lost in the rollback that event %d accepted\n", l.Events, l.First, l.Last, l.Index)
	}
	if n := len(v.Behind); n > 0 {
		fmt.Fprintf(out, "%d lines of Vault's audit file have text before a complete entry, the first at %s (from a device with a prefix, or from a program that captures Vault's output); the entries were read\n", n, v.Behind[0])
	}
	if s := v.Sealed; s.Exports > 0 {
		fmt.Fprintf(out, "%d sealed keys of the log left Vault to one recipient each, and none to another; %d keys left Vault that the log does not know: attempts that failed, or newer than the export\n", s.Delivered, len(s.Unknown))
	}
	newest := v.AsOf.Format(time.RFC3339)
	switch {
	case len(v.Torn) > 0:
		return notExcluded("Vault's audit file holds each of the %d events, but %d of its lines are incomplete, the first at %s: what Vault wrote there is unknown", size, len(v.Torn), v.Torn[0])
	case v.AsOf.Before(asOf):
		return notExcluded("Vault's audit file holds each of the %d events, but its newest entry is of %s, before %s: give the file of every node that was active since", size, newest, asOf.Format(time.RFC3339))
	}
	_, err := fmt.Fprintf(out, "truncation excluded as of %s, when the newest entry given was written: Vault's audit file holds each of the %d events, and %d newer ones that no signed checkpoint covers yet. "+
		"This assumes that the files of every node that was ever active were given\n", newest, size, v.Newer)
	return err
}

func readVaultFiles(names []string) (*archive.VaultFile, error) {
	if len(names) == 0 {
		return nil, nil
	}
	vault := &archive.VaultFile{}
	for _, name := range names {
		f, err := os.Open(name)
		if err != nil {
			return nil, err
		}
		if err := errors.Join(vault.Read(name, f), f.Close()); err != nil {
			return nil, err
		}
	}
	return vault, vault.CheckNotEmpty()
}

func newAuditProve() *cobra.Command {
	return &cobra.Command{
		Use:   "prove EVENT",
		Short: "Print a proof that the log holds one event, by ID or index",
		Long: `Prints the event, its path through the log's Merkle tree, and the signed
checkpoint with the tree's root. Verify it anywhere with:
orgkeys audit verify-proof FILE --key KEY`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return withLog(cmd, func(ctx context.Context, db *sqlstore.DB) error {
				proof, err := archive.Prove(ctx, db, args[0])
				if err != nil {
					return err
				}
				b, err := json.Marshal(proof, json.Deterministic(true), jsontext.WithIndent("  "))
				if err != nil {
					return err
				}
				_, err = fmt.Fprintf(cmd.OutOrStdout(), "%s\n", b)
				return err
			})
		},
	}
}

func newVerifyProof() *cobra.Command {
	var keys []string
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "verify-proof FILE --key KEY",
		Short: "Verify a proof of one event, without the rest of the log",
		Args:  cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return judged(cmd, asJSON, func(out io.Writer, v *verdict) error { return verifyProof(args[0], keys, out, v) })
		},
	}
	cmd.Flags().StringArrayVar(&keys, "key", nil, "a verifier key, as printed by \"orgkeys audit key\", or a file of keys; may be repeated")
	cmd.Flags().BoolVar(&asJSON, "json", false, "print one JSON object instead of lines")
	return cmd
}

func verifyProof(name string, given []string, out io.Writer, v *verdict) error {
	keys, err := keysGiven(given)
	if err != nil {
		return err
	}
	if len(keys) == 0 {
		return errNoKey
	}
	text, err := os.ReadFile(name)
	if err != nil {
		return err
	}
	proof, signed, err := archive.VerifyProof(text, keys)
	if err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	v.Origin, v.Size, v.Root, v.Covered = signed.Origin, signed.Size, signed.Root.String(), signed.Size
	v.Proof = &proofVerdict{proof.Index, proof.Event}
	_, err = fmt.Fprintf(out, "event %d of log %s, which held %d events when it was signed:\n%s\n", proof.Index, signed.Origin, signed.Size, proof.Event)
	return err
}

// errNoneSigned: a key counts once it has signed something.
var errNoneSigned = errors.New("no checkpoint has been signed yet, so the log's key is not known. A running server signs the first one when the log has grown, at the end of each ORGKEYS_CHECKPOINT_INTERVAL: " +
	"wait for that, or send it SIGUSR1 (\"kill -USR1 PID\") to have it sign at once. If no server runs, start one, or run \"orgkeys audit checkpoint\"")

func newAuditKey() *cobra.Command {
	return &cobra.Command{
		Use:   "key",
		Short: "Print the verifier keys of the log's signed checkpoints",
		Long: `Prints a line for each key that has signed a stored checkpoint, oldest first, in the form
of C2SP signed notes. Keep it where the database's administrator cannot change it,
and give it to the auditors: verification needs nothing else.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return withLog(cmd, func(ctx context.Context, db *sqlstore.DB) error {
				keys, err := archive.SigningKeys(ctx, db)
				if err == nil && len(keys) == 0 {
					err = errNoneSigned
				}
				if err != nil {
					return err
				}
				_, err = fmt.Fprintln(cmd.OutOrStdout(), strings.Join(keys, "\n"))
				return err
			})
		},
	}
}
