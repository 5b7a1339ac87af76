// Command orgkeys serves an organization's keys, and holds the operator's
// commands around that.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/orgkeys/orgkeys/internal/commandline"
	"github.com/orgkeys/orgkeys/internal/config"
	"github.com/orgkeys/orgkeys/internal/hsm"
	"github.com/orgkeys/orgkeys/internal/version"
)

func main() {
	os.Exit(run(os.Args[1:]))
}

// exitError is an error that asks for an exit code other than 1.
type exitError struct {
	code int
	err  error
}

func (e *exitError) Error() string { return e.err.Error() }
func (e *exitError) Unwrap() error { return e.err }

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
	var exit *exitError
	switch {
	case err == nil:
		return 0
	case errors.As(err, &exit):
		return exit.code
	}
	if errors.Is(err, hsm.ErrPIN) {
		return exitPIN
	}
	return 1
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

// load reads the settings for a command.
func load(cmd *cobra.Command) (config.Config, error) {
	file, err := cmd.Flags().GetString("config")
	if err != nil {
		return config.Config{}, err
	}
	cfg, err := config.Load(os.Environ(), file)
	if err != nil {
		return config.Config{}, err
	}
	for name, value := range cfg.Libraries {
		if err := os.Setenv(name, value); err != nil { // reaches C libraries too: cgo's runtime passes it on
			return config.Config{}, err
		}
	}
	return cfg, nil
}
