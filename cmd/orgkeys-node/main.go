// Command orgkeys-node is a bridge node's side of orgkeys: it fetches the
// node's own key with a one-time token, or takes one that was put there, fetches
// the organization's boot secrets, and registers the node, by signing with that
// key. It runs unattended, at first boot and at any later one, and may be killed
// and run again at any point.
//
// A machine that boots may find its clock wrong, its network captive and its
// files not there yet. So whatever may pass is waited for (run.go); only the
// server's own refusals and wrong settings end a run at once.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"unicode"
)

// Exit codes, after sysexits.h, so that a unit file can tell what another
// start may mend from what only somebody can (64, 77).
const (
	exitUsage       = 64 // a setting is missing or wrong
	exitOldKey      = 65 // all is done with the key that was there, and the token beside it is refused
	exitUnavailable = 69 // the server cannot be reached, or cannot serve now
	exitCannotWrite = 73 // a file cannot be written
	exitTryLater    = 75 // the clock is off, or the run was interrupted
	exitProtocol    = 76 // something that is not orgkeys answers
	exitRefused     = 77 // the server does not accept the key, or refuses the request
	exitConfig      = 78 // a key, token or certificate file is not as it must be
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
	if f.err != nil && f.err.Error() != "" {
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
	Changed        []string `json:"changed,omitempty"`    // secrets written
	Unchanged      []string `json:"unchanged,omitempty"`  // secrets that were there already
	Removed        []string `json:"removed,omitempty"`    // secrets that the server has no more
	NotWritten     []string `json:"notWritten,omitempty"` // secrets whose files would be the node's own
	Fingerprint    string   `json:"keyFingerprint,omitempty"`
	KeyID          string   `json:"keyId,omitempty"`      // of a key that was enrolled or unsealed
	Enrollment     string   `json:"enrollment,omitempty"` // the enrollment's ID
	State          string   `json:"state,omitempty"`      // of the node's key: see keyState
	Recipient      string   `json:"recipient,omitempty"`  // how the API names this node's recipient
	Public         string   `json:"publicKey,omitempty"`  // the recipient's, or with EK the endorsement key's or its certificate, PEM
	EK             string   `json:"ek,omitempty"`         // by which an administrator allows the TPM
	TPM            string   `json:"tpm,omitempty"`        // the path of the TPM that the node's key is in
	ClockOffset    string   `json:"clockOffset,omitempty"`
	SecretsFound   []string `json:"secretsFound,omitempty"`
	SecretsMissing []string `json:"secretsMissing,omitempty"` // fetched once, and not there now
}

func main() {
	syscall.Umask(0o077)
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	// A second signal ends the program whatever it waits for.
	context.AfterFunc(ctx, stop)
	os.Exit(run(ctx, os.Args[1:], os.Stdout, os.Stderr))
}

func run(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	if len(args) == 0 {
		printUsage(stderr)
		return exitUsage
	}
	r := report{Command: args[0]}
	var s settings
	err := answer(args, stdout)
	if errors.Is(err, errNoAnswer) {
		s, err = parseSettings(ctx, args[0], args[1:], stderr)
		if errors.Is(err, flag.ErrHelp) {
			printHelp(stdout, *find(args[0]))
			return 0
		}
		if err == nil {
			err = execute(ctx, s, &r, stderr)
		}
	} else if err == nil {
		return 0
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

// add adds what was done to the outcome.
func (r *report) add(done string) {
	if r.Message != "" {
		done = r.Message + ", " + done
	}
	r.Message = done
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
	if text := r.standardOutput(); text != "" {
		if err := write(stdout, text); err != nil {
			return exitCannotWrite
		}
		out = stderr
	}
	if _, err := fmt.Fprintf(out, "orgkeys-node: %s: %s\n", r.Command, r.Message); err != nil && r.OK {
		return exitCannotWrite
	}
	return r.ExitCode
}

// standardOutput is what a command is asked for, beside its message.
func (r *report) standardOutput() string {
	if r.EK != "" && r.Command == "ek" {
		return r.EK + "\n"
	}
	return r.Public
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
