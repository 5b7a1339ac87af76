package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/orgkeys/orgkeys/client"
	"github.com/orgkeys/orgkeys/internal/tpmdevice"
)

// step is one thing to do. It starts anew at each attempt.
type step func(ctx context.Context, s settings, r *report) error

// asNode is a step that signs with the node's key.
func asNode(do func(ctx context.Context, n client.Node, s settings, r *report) error) step {
	return func(ctx context.Context, s settings, r *report) error {
		n, err := identify(s)
		if err != nil {
			return err
		}
		// The server has a bound on connections, and others are waiting.
		defer n.Client.CloseIdleConnections()
		return do(ctx, n, s, r)
	}
}

// execute does the command's steps, each until it is done, fails for good, or
// --wait is over. A step that is done is not repeated for a later one's sake. A token that
// is refused keeps no node from working with the key that it has.
func execute(ctx context.Context, s settings, r *report, progress io.Writer) error {
	c := find(s.command)
	retry := client.Retry{For: time.Duration(s.wait), Waiting: waiting(s, progress), Temporary: temporary}
	if c.once {
		retry.For = 0
	}
	begun := time.Now()
	var refused *besideKey
	for i, do := range c.steps {
		err := retry.Do(ctx, func(ctx context.Context) error { return do(ctx, s, r) })
		if beside, ok := errors.AsType[*besideKey](err); ok && i+1 < len(c.steps) {
			refused, err = beside, nil
			// What comes next may take long, or fail.
			_, _ = fmt.Fprintf(progress, "orgkeys-node: %s: going on with the key that is there: %s\n", s.command, oneLine(beside.Error()))
		}
		if err != nil {
			return err
		}
		retry.For = max(time.Duration(s.wait)-time.Since(begun), 0)
	}
	if refused != nil {
		return &failure{exitOldKey, r.Message + ", with the key that was there: " + refused.what, refused.hint, refused.err}
	}
	return nil
}

// temporary reports whether waiting may end an error: not if it is about the
// settings, or a refusal.
func temporary(err error) bool {
	if f, ok := errors.AsType[*failure](err); ok && (f.exit == exitUsage || f.exit == exitRefused) {
		return false
	}
	return client.Temporary(err)
}

// sayAgain is the time after which the same reason to wait is printed again.
const sayAgain = 10 * time.Minute

// waiting prints what is waited for, once for each reason and sayAgain.
func waiting(s settings, progress io.Writer) func(error, time.Duration) {
	var last string
	var said time.Time
	return func(err error, _ time.Duration) {
		f := diagnose(s, err)
		text := oneLine(f.Error())
		notify("STATUS=Waiting: " + text)
		// The cause may hold a port that is another one each time.
		reason := f.what + f.hint
		if reason == last && time.Since(said) < sayAgain {
			return
		}
		last, said = reason, time.Now()
		// Whoever does not read it may see the outcome.
		_, _ = fmt.Fprintf(progress, "orgkeys-node: %s: waiting: %s\n", s.command, text)
	}
}

// fetch brings the files in s.dir up to date. Nothing is written before every
// secret of the answer is known to be good.
func fetch(ctx context.Context, n client.Node, s settings, r *report) error {
	d, err := openDir(ctx, s.dir)
	if err != nil {
		return err
	}
	defer d.close()
	secrets, err := n.Secrets(ctx)
	if err != nil {
		return err
	}
	r.Changed, r.Unchanged, r.Removed, r.NotWritten = nil, nil, nil, nil
	err = d.update(secrets, s.ownNames(d), r)
	for _, secret := range secrets {
		clear(secret.Value)
	}
	if err != nil {
		return &failure{exitCannotWrite, "writing into " + s.dir, "check the directory's owner and free space", err}
	}
	done := fmt.Sprintf("%d secrets written, %d unchanged", len(r.Changed), len(r.Unchanged))
	if len(r.Removed) > 0 {
		done += fmt.Sprintf(", %d removed", len(r.Removed))
	}
	if len(r.NotWritten) > 0 {
		done += fmt.Sprintf(", %s not written, since a file of the node's own has that name (store the secret under another, or name the node's files otherwise)", strings.Join(r.NotWritten, " and "))
	}
	r.add(done)
	return nil
}

func register(ctx context.Context, n client.Node, s settings, r *report) error {
	registration := client.Registration{Version: s.version, Status: s.status, URL: s.url, Provider: s.provider}
	if s.services != "" {
		registration.Services = &s.servicesNumber
	}
	if err := n.Register(ctx, registration); err != nil {
		return err
	}
	r.add("registered " + s.ip)
	return nil
}

func unregister(ctx context.Context, n client.Node, s settings, r *report) error {
	if err := n.Unregister(ctx); err != nil {
		return err
	}
	r.add("unregistered " + s.ip)
	return nil
}

// status shows what is there. It asks the server once, and signs nothing.
func status(ctx context.Context, s settings, r *report) error {
	key, err := readKeyState(s)
	if err != nil {
		return err
	}
	key.report(s, r)
	if r.SecretsFound, r.SecretsMissing, err = listSecrets(s.dir); err != nil {
		return err
	}
	if inTPM, ok := key.private.(*tpmdevice.Key); ok {
		if err := inTPM.Check(ctx); err != nil {
			return err
		}
	}
	c, err := connect(s)
	if err != nil {
		return err
	}
	defer c.CloseIdleConnections()
	health, err := c.Health(ctx)
	if err != nil {
		return err
	}
	r.ClockOffset = health.ClockOffset.Round(time.Second).String()
	if health.ClockOffset.Abs() > clockTolerance {
		return clockIsOff(health.ClockOffset)
	}
	if key.private == nil {
		return key.missing(s)
	}
	missing := ""
	if len(r.SecretsMissing) > 0 {
		missing = fmt.Sprintf(" and %d missing", len(r.SecretsMissing))
	}
	where := ""
	if r.TPM != "" {
		where = " in the TPM " + r.TPM
	}
	r.Message = fmt.Sprintf("key %s%s (%s), %d secrets in %s%s, server answers, clock within %s",
		r.Fingerprint, where, r.State, len(r.SecretsFound), s.dir, missing, health.ClockOffset.Abs().Round(time.Second))
	return nil
}
