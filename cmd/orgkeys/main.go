// Command orgkeys serves an organization's keys, and holds the operator's
// commands around that.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"strings"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/orgkeys/orgkeys/internal/audit/verdict"
	"github.com/orgkeys/orgkeys/internal/commandline"
	"github.com/orgkeys/orgkeys/internal/hsm"
	"github.com/orgkeys/orgkeys/internal/version"
)

func main() {
	os.Exit(run(os.Args[1:]))
}

// exitPIN says that the HSM's PIN needs a person (EX_NOPERM of sysexits.h). The
// shipped unit does not start the service again after it: every start may cost
// one of the few attempts that a token gives.
const exitPIN = 77

func run(args []string) int {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	// The first signal asks for an orderly end; a second one, by then with its
	// default action again, ends the process at once.
	context.AfterFunc(ctx, stop)

	err := commandline.Execute(ctx, newCommand(), args)
	if err != nil {
		fmt.Fprintln(os.Stderr, "orgkeys:", err)
	}
	return exitCode(err)
}

// exitCode is what the program ends with after err.
func exitCode(err error) int {
	if errors.Is(err, hsm.ErrPIN) {
		return exitPIN
	}
	return verdict.Code(err)
}

func newCommand() *cobra.Command {
	root := &cobra.Command{
		Use:   "orgkeys",
		Short: "Organization keys, made in Vault or an HSM and handed out once",
		Long: `orgkeys makes an organization's RSA keys inside HashiCorp Vault or a PKCS#11
HSM, hands each private key out exactly once, keeps the public key only
encrypted, and records every operation in an audit log that can be verified.

Settings are environment variables; "orgkeys serve --help" lists them all.`,
		Version:       version.Of("orgkeys"),
		SilenceUsage:  true,
		SilenceErrors: true,
	}
	root.PersistentFlags().String("config", "", "file of NAME=VALUE lines with settings; the environment takes precedence")
	root.AddCommand(newServe(), newToken(), newAudit(), newMigrate(), newDoctor(), newRewrap(), commandline.NewVersion())
	return root
}

// say prints to standard output.
func say(cmd *cobra.Command, format string, args ...any) error {
	_, err := fmt.Fprintf(cmd.OutOrStdout(), format, args...)
	return err
}

// sayCheck prints what a check found and what to do about it. what is a column of that width.
func sayCheck(cmd *cobra.Command, width int, state, what, found, remedy string) error {
	line := fmt.Sprintf("%-4s  %-*s  %s", state, width, what, found)
	if remedy != "" {
		line += "\n" + strings.Repeat(" ", width+8) + "-> " + remedy
	}
	return say(cmd, "%s\n", line)
}
