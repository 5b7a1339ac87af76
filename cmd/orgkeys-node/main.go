// Command orgkeys-node is a bridge node's side of orgkeys: it fetches the
// organization's boot secrets, and registers the node, by signing with the
// organization's key. It runs unattended, at first boot and at any later one,
// and may be killed and run again at any point.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"
	"unicode"
)

// Exit codes, after sysexits.h, so that a unit file can tell what another
// start may mend (69, 75) from what only somebody can.
const (
	exitUsage       = 64 // a setting is missing or wrong
	exitUnavailable = 69 // the server cannot be reached, or cannot serve now
	exitCannotWrite = 73 // a file cannot be written
	exitTryLater    = 75 // the clock is off, or the run was interrupted
	exitProtocol    = 76 // the server's answer makes no sense
	exitRefused     = 77 // the server does not accept the key, or refuses the request
	exitConfig      = 78 // the key file or a certificate is not as it must be
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
	Command      string   `json:"command"`
	OK           bool     `json:"ok"`
	ExitCode     int      `json:"exitCode"`
	Message      string   `json:"message"`
	Changed      []string `json:"changed,omitempty"`   // secrets written
	Unchanged    []string `json:"unchanged,omitempty"` // secrets that were there already
	Fingerprint  string   `json:"keyFingerprint,omitempty"`
	ClockOffset  string   `json:"clockOffset,omitempty"`
	SecretsFound []string `json:"secretsFound,omitempty"`
}

const usage = `orgkeys-node registers a bridge node and fetches its boot secrets.

Usage: orgkeys-node COMMAND [FLAGS]

Commands:
  boot        fetch the secrets into --dir, then register; safe to run again
  secrets     only fetch the secrets
  register    only register
  unregister  take the node out of its organization
  status      show what is there and whether the server answers; signs nothing

Flags, or the environment variables in parentheses:
%s
Exit codes:
  0   done
  64  a setting is missing or wrong
  69  the server cannot be reached or cannot serve now; running again may help
  73  a file cannot be written
  75  the clock is off, or the run was interrupted; running again may help
  76  the server's answer makes no sense
  77  the server does not accept the key, or refuses the request
  78  the key file or a certificate is not as it must be
`

func main() {
	syscall.Umask(0o077)
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	// A second signal ends the program whatever it waits for.
	context.AfterFunc(ctx, stop)
	os.Exit(run(ctx, os.Args[1:], os.Stdout, os.Stderr))
}

func run(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	if len(args) == 0 || args[0] == "help" || args[0] == "-h" || args[0] == "--help" {
		fmt.Fprintf(stdout, usage, flagHelp())
		if len(args) == 0 {
			return exitUsage
		}
		return 0
	}
	s, err := parseSettings(args[0], args[1:])
	if errors.Is(err, flag.ErrHelp) {
		fmt.Fprintf(stdout, usage, flagHelp())
		return 0
	}
	r := report{Command: args[0]}
	if err == nil {
		err = execute(ctx, s, &r)
	}
	if err != nil {
		r.ExitCode, r.Message = explain(ctx, err)
	}
	r.OK, r.Message = err == nil, oneLine(r.Message)
	return r.print(s.json, stdout, stderr)
}

// explain returns an error's exit code and its one line.
func explain(ctx context.Context, err error) (int, string) {
	if ctx.Err() != nil {
		return exitTryLater, "interrupted; run it again, nothing is half done"
	}
	if f, ok := errors.AsType[*failure](err); ok {
		return f.exit, f.Error()
	}
	return exitCannotWrite, err.Error()
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

func execute(ctx context.Context, s settings, r *report) error {
	k, err := readKey(s.keyFile)
	if err != nil {
		return err
	}
	c, err := newClient(s, k)
	if err != nil {
		return err
	}
	// The server has a bound on connections, and others are waiting.
	defer c.http.CloseIdleConnections()
	ctx, cancel := context.WithTimeout(ctx, 2*(s.wait+attemptTimeout))
	defer cancel()
	switch s.command {
	case "boot":
		if err := fetch(ctx, c, s, r); err != nil {
			return err
		}
		r.Message += ", registered " + s.ip
		return c.register(ctx)
	case "secrets":
		return fetch(ctx, c, s, r)
	case "register":
		r.Message = "registered " + s.ip
		return c.register(ctx)
	case "unregister":
		r.Message = "unregistered " + s.ip
		return c.unregister(ctx)
	default:
		return status(ctx, c, s, r)
	}
}

// fetch brings the files in s.dir up to date. Nothing is written before every
// secret of the answer is known to be good.
func fetch(ctx context.Context, c *client, s settings, r *report) error {
	d, err := openDir(ctx, s.dir)
	if err != nil {
		return err
	}
	defer d.close()
	secrets, err := c.secrets(ctx)
	if err != nil {
		return err
	}
	for _, secret := range secrets {
		changed, err := d.write(secret.name, secret.value)
		clear(secret.value)
		if err != nil {
			return &failure{exitCannotWrite, "writing " + secret.name + " into " + s.dir, "check the directory's owner and free space", err}
		}
		if changed {
			r.Changed = append(r.Changed, secret.name)
		} else {
			r.Unchanged = append(r.Unchanged, secret.name)
		}
	}
	r.Message = fmt.Sprintf("%d secrets written, %d unchanged", len(r.Changed), len(r.Unchanged))
	return nil
}

func status(ctx context.Context, c *client, s settings, r *report) error {
	r.Fingerprint = c.key.fingerprint
	found, err := listSecrets(s.dir)
	if err != nil {
		return err
	}
	r.SecretsFound = found
	resp, err := c.retry(ctx, maxSmallAnswer, func(ctx context.Context) (*http.Request, error) {
		return http.NewRequestWithContext(ctx, http.MethodGet, c.base+"/healthz", nil)
	})
	if err != nil {
		return err
	}
	if resp.status != http.StatusOK {
		return resp.refusal(s)
	}
	r.ClockOffset = resp.offset.Round(time.Second).String()
	if resp.offset.Abs() > clockTolerance {
		return resp.clockIsOff()
	}
	r.Message = fmt.Sprintf("key %s, %d secrets in %s, server answers, clock within %s", r.Fingerprint, len(found), s.dir, resp.offset.Abs().Round(time.Second))
	return nil
}
