// Command orgkeys-node is a bridge node's side of orgkeys: it fetches the
// organization's boot secrets, and registers the node, by signing with the
// organization's key. It runs unattended, at first boot and at any later one,
// and may be killed and run again at any point.
//
// A machine that boots may find its clock wrong, its network captive and its
// files not there yet. So whatever may pass is waited for (run.go); only the
// server's own refusals and wrong settings end a run at once.
package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"runtime/debug"
	"strings"
	"syscall"
	"unicode"
)

// Exit codes, after sysexits.h, so that a unit file can tell what another
// start may mend from what only somebody can (64, 77).
const (
	exitUsage       = 64 // a setting is missing or wrong
	exitUnavailable = 69 // the server cannot be reached, or cannot serve now
	exitCannotWrite = 73 // a file cannot be written
	exitTryLater    = 75 // the clock is off, or the run was interrupted
	exitProtocol    = 76 // something that is not orgkeys answers
	exitRefused     = 77 // the server does not accept the key, or refuses the request
	exitConfig      = 78 // a key file or a certificate is not as it must be
)

// failure is an error with what to do about it.
type failure struct {
	exit int
	what string
	hint string
	err  error // the cause, if there is one
}

func (f *failure) Error() string {
	text := f.what
	if f.err != nil {
		text += ": " + f.err.Error()
	}
	if f.hint != "" {
		text += "; " + f.hint
	}
	return text
}

func (f *failure) Unwrap() error { return f.err }

// report is what a run did, as --json prints it.
type report struct {
	Command        string   `json:"command"`
	OK             bool     `json:"ok"`
	ExitCode       int      `json:"exitCode"`
	Message        string   `json:"message"`
	Changed        []string `json:"changed,omitempty"`   // secrets written
	Unchanged      []string `json:"unchanged,omitempty"` // secrets that were there already
	Removed        []string `json:"removed,omitempty"`   // secrets that the server has no more
	Fingerprint    string   `json:"keyFingerprint,omitempty"`
	ClockOffset    string   `json:"clockOffset,omitempty"`
	SecretsFound   []string `json:"secretsFound,omitempty"`
	SecretsMissing []string `json:"secretsMissing,omitempty"` // fetched once, and not there now
}

type commandHelp struct{ name, help string }

var commands = []commandHelp{
	{"boot", "fetch the secrets into --dir, then register; safe to run again"},
	{"secrets", "only fetch the secrets"},
	{"register", "only register"},
	{"unregister", "take the node out of its organization"},
	{"status", "show what is there and whether the server answers, once; signs nothing"},
}

const usage = `orgkeys-node registers a bridge node and fetches its boot secrets.

Usage: orgkeys-node COMMAND [FLAGS]

Commands:
%s  version     print the version and how this program was built

Flags, or the environment variables in parentheses:
%s
Whatever may pass is waited for, for as long as --wait says: a server that
cannot be reached or answers nothing of its own, a wrong clock, a file that is
not there yet or not as it must be. Standard error says what is waited for.

Exit codes:
  0   done
  64  a setting is missing or wrong
  69  the server cannot be reached or cannot serve now
  73  a file cannot be written
  75  the clock is off, or the run was interrupted
  76  something that is not orgkeys answers
  77  the server does not accept the key, or refuses the request
  78  a key file or a certificate is not as it must be

64 and 77 end a run at once, the others when --wait is over; running again may help.
`

func printUsage(w io.Writer) {
	var list strings.Builder
	for _, c := range commands {
		fmt.Fprintf(&list, "  %-10s  %s\n", c.name, c.help)
	}
	fmt.Fprintf(w, usage, list.String(), flagHelp())
}

func main() {
	syscall.Umask(0o077)
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	// A second signal ends the program whatever it waits for.
	context.AfterFunc(ctx, stop)
	os.Exit(run(ctx, os.Args[1:], os.Stdout, os.Stderr))
}

func run(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	switch first := strings.Join(args[:min(len(args), 1)], ""); first {
	case "", "help", "-h", "--help":
		printUsage(stdout)
		if first == "" {
			return exitUsage
		}
		return 0
	case "version", "--version":
		fmt.Fprintln(stdout, version())
		return 0
	}
	s, err := parseSettings(ctx, args[0], args[1:], stderr)
	if errors.Is(err, flag.ErrHelp) {
		printUsage(stdout)
		return 0
	}
	r := report{Command: args[0]}
	if err == nil {
		err = execute(ctx, s, &r, stderr)
	}
	if err != nil {
		r.ExitCode, r.Message = explain(ctx, s, err)
	}
	r.OK, r.Message = err == nil, oneLine(r.Message)
	return r.print(s.json, stdout, stderr)
}

// explain returns an error's exit code and its one line.
func explain(ctx context.Context, s settings, err error) (int, string) {
	if ctx.Err() != nil {
		return exitTryLater, "interrupted; run it again, nothing is half done"
	}
	f := diagnose(s, err)
	return f.exit, f.Error()
}

func (r *report) print(asJSON bool, stdout, stderr io.Writer) int {
	if asJSON {
		if err := json.NewEncoder(stdout).Encode(r); err != nil {
			return exitCannotWrite
		}
		return r.ExitCode
	}
	out := stdout
	if !r.OK {
		out = stderr
	}
	if _, err := fmt.Fprintf(out, "orgkeys-node: %s: %s\n", r.Command, r.Message); err != nil && r.OK {
		return exitCannotWrite
	}
	return r.ExitCode
}

// oneLine keeps what a server says from looking like more than one line of a
// log, or like another text than it is.
func oneLine(text string) string {
	return strings.Map(func(c rune) rune {
		if unicode.In(c, unicode.Cc, unicode.Cf, unicode.Zl, unicode.Zp) {
			return ' '
		}
		return c
	}, text)
}

// release is the version that an image's build gives to the linker, where there
// is no repository to know it from.
var release string

func version() string {
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return "orgkeys-node (unknown build)"
	}
	revision := ""
	for _, s := range info.Settings {
		if s.Key == "vcs.revision" {
			revision = s.Value
		}
	}
	return strings.Join(strings.Fields(fmt.Sprintf("orgkeys-node %s %s %s", cmp.Or(release, info.Main.Version), revision, info.GoVersion)), " ")
}
