// Command orgkeysctl is the command line of an organization's administrators:
// keys, enrollments, nodes, boot secrets and events of an orgkeys server. It is
// built on package client, needs no other program, and keeps what it must keep
// (the login, and the recipient of a key on its way) in one directory.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/orgkeys/orgkeys/internal/commandline"
	"github.com/orgkeys/orgkeys/internal/version"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	// A second signal ends the program whatever it waits for.
	context.AfterFunc(ctx, stop)
	os.Exit(run(ctx, os.Args[1:], os.Stdin, os.Stdout, os.Stderr))
}

func run(ctx context.Context, args []string, stdin io.Reader, stdout, stderr io.Writer) int {
	root := newCommand()
	root.SetIn(stdin)
	root.SetOut(stdout)
	root.SetErr(stderr)
	err := commandline.Execute(ctx, root, args)
	if err == nil {
		return 0
	}
	f, ok := errors.AsType[*failure](err)
	if !ok { // cobra's own, about the command line
		f = &failure{exit: exitUsage, err: err}
	}
	fmt.Fprintln(stderr, "orgkeysctl:", oneLine(f.Error()))
	return f.exit
}

const about = `orgkeysctl is the command line of an organization's administrators: keys, enrollments,
nodes, boot secrets and events of an orgkeys server.

Tables are for people; --json prints what programs want. Tokens, private keys and
secrets are read from files and standard input and never taken as arguments.

Settings are the flags below, the variables ORGKEYSCTL_SERVER, ORGKEYSCTL_ORG and so
on, or lines NAME=VALUE with those names in the file --config; flags come before the
environment, and that before the file.

Exit codes:
  0   done
  1   can-i: no
  64  the command line or a setting is wrong
  65  what arrived is damaged
  66  there is no such key, enrollment, device, node or secret
  69  the server or the identity provider cannot be reached, or cannot serve now
  73  a file is there already, or cannot be written
  75  interrupted; run it again
  76  something that is not orgkeys answers
  77  nobody is logged in, or the server refuses
  78  a file that is read is not as it must be`

func newCommand() *cobra.Command {
	s := &settings{}
	root := &cobra.Command{
		Use: "orgkeysctl", Short: "An organization's keys, nodes and secrets in orgkeys", Long: about,
		Version: version.Of("orgkeysctl"), SilenceUsage: true, SilenceErrors: true,
	}
	s.flags(root.PersistentFlags())
	root.AddCommand(newLogin(s), newLogout(s), newWhoami(s), newCanI(s), newKey(s), newEnrollment(s), newDevice(s), newNode(s), newSecret(s), newEvent(s), commandline.NewVersion(), newMan())
	return root
}
