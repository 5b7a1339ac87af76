package main

import (
	"errors"
	"strings"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"
	"github.com/spf13/cobra"

	"github.com/orgkeys/orgkeys/internal/audit/archive"
	"github.com/orgkeys/orgkeys/internal/audit/verdict"
	"github.com/orgkeys/orgkeys/internal/config"
	"github.com/orgkeys/orgkeys/internal/server"
	"github.com/orgkeys/orgkeys/internal/sqlstore"
	"github.com/orgkeys/orgkeys/internal/version"
)

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
		RunE: onLog(func(cmd *cobra.Command, cfg config.Config, db *sqlstore.DB, args []string) (err error) {
			var open archive.PublicKeys
			if !withoutKeys {
				keys := server.NewPublicKeys(cfg, db, newLogger(cfg))
				defer func() { err = errors.Join(err, keys.Close()) }()
				open = keys.Open
			}
			m, err := archive.WriteFile(cmd.Context(), args[0], db, open, version.Of("orgkeys"), progress(cmd)("exported"))
			if err != nil {
				return err
			}
			return sayLog(cmd, args[0], m.Origin, m.Size, m.Root)
		}),
	}
	cmd.Flags().BoolVar(&withoutKeys, "without-public-keys", false, "leave the public keys out, and do without the HSM or Vault")
	return cmd
}

func newVerifyExport() *cobra.Command {
	var g verdict.Given
	var asJSON bool
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
			return judge(cmd, asJSON, func(j *verdict.Judge) error { return j.Export(cmd.Context(), args[0], g) })
		},
	}
	evidenceFlags(cmd, &g, &asJSON)
	return cmd
}

func newAuditProve() *cobra.Command {
	return &cobra.Command{
		Use:   "prove EVENT",
		Short: "Print a proof that the log holds one event, by ID or index",
		Long: `Prints the event, its path through the log's Merkle tree, and the signed
checkpoint with the tree's root. Verify it anywhere with:
orgkeys audit verify-proof FILE --key KEY`,
		Args: cobra.ExactArgs(1),
		RunE: onLog(func(cmd *cobra.Command, _ config.Config, db *sqlstore.DB, args []string) error {
			proof, err := archive.Prove(cmd.Context(), db, args[0])
			if err != nil {
				return err
			}
			b, err := json.Marshal(proof, json.Deterministic(true), jsontext.WithIndent("  "))
			if err != nil {
				return err
			}
			return say(cmd, "%s\n", b)
		}),
	}
}

func newVerifyProof() *cobra.Command {
	var g verdict.Given
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "verify-proof FILE --key KEY",
		Short: "Verify a proof of one event, without the rest of the log",
		Args:  cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return judge(cmd, asJSON, func(j *verdict.Judge) error { return j.Proof(args[0], g) })
		},
	}
	keyFlag(cmd, &g)
	jsonFlag(cmd, &asJSON)
	return cmd
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
		RunE: onLog(func(cmd *cobra.Command, _ config.Config, db *sqlstore.DB, _ []string) error {
			keys, err := archive.SigningKeys(cmd.Context(), db)
			if err == nil && len(keys) == 0 {
				err = errNoneSigned
			}
			if err != nil {
				return err
			}
			return say(cmd, "%s\n", strings.Join(keys, "\n"))
		}),
	}
}
