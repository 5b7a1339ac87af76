package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/orgkeys/orgkeys/client"
	"github.com/orgkeys/orgkeys/internal/durable"
	"github.com/orgkeys/orgkeys/internal/org"
	"github.com/orgkeys/orgkeys/internal/tpmdevice"
)

// mustEnroll is enroll for the command of that name: without anything to enroll it fails.
func mustEnroll(ctx context.Context, s settings, r *report) error {
	if err := enroll(ctx, s, r); err != nil || r.Message != "" {
		return err
	}
	k, err := readKeyState(s)
	if err != nil {
		return err
	}
	defer k.clear()
	if before := k.delivery(); before != nil {
		k.report(s, r)
		r.add(fmt.Sprintf("key %s of %s was enrolled before, in %s", before.KeyID, before.Org, s.keyFile))
		return nil
	}
	if s.token == "" {
		return usageError("enroll needs --token-file")
	}
	return k.missing(s)
}

// enroll fetches the node's key, if there is a token for it, and goes on where
// an earlier run was interrupted:
//
//	recipient stored → answer opened → record stored → key stored → receipt taken → recipient and token removed
//
// CRASH between any two of them: what is there says what is left to do. The
// server gives the same answer until it has the receipt.
func enroll(ctx context.Context, s settings, r *report) error {
	if s.token == "" && !exists(s.keyFile+recordSuffix) {
		return nil // the key is one that was put there
	}
	d, err := openDir(ctx, filepath.Dir(s.keyFile))
	if err != nil {
		return err
	}
	defer d.close()
	k, err := readKeyState(s)
	if err != nil {
		return err
	}
	defer k.clear()
	if k.token == nil && !k.delivered() {
		if k.private != nil { // put there in place of the one that was enrolled
			return nil
		}
		return k.missing(s)
	}
	if k.delivered() && k.record.Received {
		return k.finish(d, s, r)
	}
	recipients, err := d.openOther(ctx, filepath.Dir(s.recipientFile))
	if err != nil {
		return err
	}
	defer recipients.close()
	c, err := connect(s)
	if err != nil {
		return err
	}
	defer c.CloseIdleConnections()
	if !k.delivered() {
		if err := k.fetch(ctx, c, d, s); err != nil {
			return k.beside(err, s, r)
		}
	}
	// What an earlier run stored may not be durable yet.
	if err := durable.SyncIn(d.root); err != nil {
		return cannotStore(s.keyFile, err)
	}
	if k.record.SHA256 != "" { // else the node made the key, and has signed for it by that
		if err := c.Receipt(ctx, k.record.Delivery, k.private); err != nil {
			return refusedReceipt(s, k.record, err)
		}
	}
	k.record.Received = true
	if err := d.writeRecord(s, *k.record); err != nil {
		return err
	}
	r.add(fmt.Sprintf("enrolled key %s for %s", k.record.KeyID, k.record.Org))
	return k.finish(d, s, r)
}

// besideKey is the refusal of a token on a node that has a key already.
type besideKey struct{ *failure }

func (b *besideKey) Unwrap() error { return b.failure }

// beside marks a refusal of the token if there is a key with which the node can go on.
func (k *keyState) beside(err error, s settings, r *report) error {
	f, ok := errors.AsType[*failure](err)
	if !ok || f.exit != exitRefused || k.delivery() == nil {
		return err
	}
	k.begun = exists(s.recipientFile)
	k.report(s, r)
	return &besideKey{f}
}

func cannotStore(path string, err error) error {
	return &failure{exitCannotWrite, "writing " + path, "check the directory's owner and free space", err}
}

func (d *dir) writeRecord(s settings, r record) error {
	text, err := json.Marshal(r)
	if err == nil {
		_, err = d.replace(filepath.Base(s.keyFile)+recordSuffix, append(text, '\n'))
	}
	if err != nil {
		return cannotStore(s.keyFile+recordSuffix, err)
	}
	return nil
}

// fetch stores the key that the token stands for.
func (k *keyState) fetch(ctx context.Context, c *client.Client, d *dir, s settings) error {
	if k.foreign() {
		return &failure{exitConfig, "key file " + s.keyFile, "move it away, or name another --key-file", errors.New("a key that was not enrolled here would be overwritten")}
	}
	recipient, err := ensureRecipient(ctx, s)
	if err != nil {
		return err
	}
	e, err := client.NewEnrollment(c, k.token, recipient)
	if err != nil {
		return &failure{exitConfig, "token file " + s.token, "copy the token again as it was shown", err}
	}
	defer e.Close()
	if key, ok := recipient.(*tpmdevice.Key); ok {
		e.TPM = key
	}
	key, err := fetchOrAnnounce(ctx, e, s)
	if err != nil {
		return refusedClaim(s, e.ID(), recipient, err)
	}
	defer clear(key.PEM)
	if s.org != "" && s.org != key.Org {
		return usageError("--org is %s, and the token is one of %s", s.org, key.Org)
	}
	if _, err := org.Parse(key.Org); err != nil {
		return &failure{exitRefused, "the server's answer names no organization", "check the server", err}
	}
	next := record{Delivery: key.Delivery}
	next.Scope = "" // the answer's MAC does not cover it
	next.Replaced = k.delivery()
	if err := d.writeRecord(s, next); err != nil {
		return err
	}
	if _, err := d.replace(filepath.Base(s.keyFile), key.PEM); err != nil {
		return cannotStore(s.keyFile, err)
	}
	private, err := readKey(s, s.keyFile)
	if err != nil {
		return err
	}
	k.private, k.record = private, &next
	return nil
}

// fetchOrAnnounce returns the node's key as it is to be stored: the one that the
// answer brought, or the one that the recipient file has and the server accepted.
func fetchOrAnnounce(ctx context.Context, e *client.Enrollment, s settings) (*client.Delivered, error) {
	if s.origin == originBackend {
		return e.Fetch(ctx)
	}
	accepted, err := e.Announce(ctx, e.Recipient.(client.PrivateKey))
	if err != nil {
		return nil, err
	}
	text, hint, err := readPrivateFile(s.recipientFile)
	if err != nil {
		return nil, &failure{exitConfig, "key " + s.recipientFile, hint, err}
	}
	stored, err := s.parseKey(text)
	if err == nil && client.Fingerprint(stored.Public()) != accepted.Fingerprint {
		err = errors.New("it is not the key that the server accepted a moment ago")
	}
	if err != nil {
		clear(text)
		return nil, &failure{exitConfig, "key " + s.recipientFile, "something else writes to it: put back the key that was there, or have an administrator revoke the enrollment, and remove it", err}
	}
	return &client.Delivered{Delivery: *accepted, PEM: text}, nil
}

// finish removes what the key no longer needs. A recipient that is not the key's own
// stays: another enrollment is under way with it, or a token to come is bound to it.
func (k *keyState) finish(d *dir, s settings, r *report) error {
	if there, err := readRecipient(s); err == nil && nameOf(there) == k.record.Recipient {
		if err := os.Remove(s.recipientFile); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return cannotStore(s.recipientFile, fmt.Errorf("removing it: %w", err))
		}
	}
	k.begun = exists(s.recipientFile)
	k.report(s, r)
	if err := durable.SyncIn(d.root); err != nil {
		return cannotStore(s.keyFile, err)
	}
	if k.token == nil {
		return nil
	}
	// A token for one node is used up. A token for several nodes would still let
	// others in.
	if info, err := os.Lstat(s.token); err == nil && info.Mode()&fs.ModeSymlink != 0 {
		r.add(fmt.Sprintf("token file %s is a link, and what it leads to is not removed: remove both", s.token))
		return nil
	}
	err := os.Remove(s.token)
	switch {
	case err == nil:
		_ = durable.Sync(filepath.Dir(s.token)) // the file is gone even if its directory cannot be read
	case ofSystemd(s.token):
		r.add("the token is a credential of the unit and cannot be removed here; remove its source")
	default:
		r.add(fmt.Sprintf("token file %s cannot be removed (%s): remove it", s.token, errorOf(err)))
	}
	return nil
}

func ofSystemd(path string) bool {
	dir := credentials()
	return dir != "" && filepath.Dir(path) == filepath.Clean(dir)
}

// errorOf is an error of package os without the path.
func errorOf(err error) error {
	if e, ok := errors.AsType[*fs.PathError](err); ok {
		return e.Err
	}
	return err
}

// refusedClaim says why no key came, and what to do.
func refusedClaim(s settings, id string, recipient client.PrivateKey, err error) error {
	refused := func(what, hint string) error { return &failure{exitRefused, what, hint, err} }
	another := "ask an administrator for a new token"
	if f := tpmTrouble(s, err); f != nil && !errors.Is(err, client.ErrSealedUseless) {
		return f
	}
	named := nameOf(recipient)
	switch {
	case errors.Is(err, client.Pending):
		return &failure{exitTryLater, "the key of enrollment " + id + " is not ready yet", "if the enrollment needs approval, an administrator approves recipient " + named, err}
	case errors.Is(err, client.ErrForged):
		return &failure{exitProtocol, "the answer was not made by the server that issued the token, and is not used", "is --server the one that issued the token? Something in between may be answering in its place", err}
	case errors.Is(err, client.ErrSealedDamaged):
		return &failure{exitProtocol, "the sealed key was changed in transit and is not used", "something between this node and " + s.server + " changes answers", err}
	case errors.Is(err, client.ErrSealedUseless):
		return refused("the sealed key of enrollment "+id+" does not open", "have an administrator revoke the enrollment and check the server; "+another)
	case errors.Is(err, client.EnrollmentUnknown):
		return refused("the server "+s.server+" does not accept the token in "+s.token, "was it copied completely, and is --server the one that issued it? If so, "+another)
	case errors.Is(err, client.EnrollmentClaimed):
		return refused("another recipient than "+s.recipientFile+" has used the token of enrollment "+id, "if this machine did not lose its recipient, the token was stolen or a disk was cloned: have an administrator revoke the enrollment and find out; "+another)
	case errors.Is(err, client.EnrollmentClosed):
		return refused("enrollment "+id+" is over: it expired, was revoked, or its key was received", another)
	case errors.Is(err, client.OriginNotAllowed) && s.origin == originBackend:
		return refused("the token of enrollment "+id+" is for a key that the node makes itself", "remove "+s.recipientFile+" and run this again with --origin node (or "+variable("origin")+"=node)")
	case errors.Is(err, client.OriginNotAllowed):
		return refused("the token of enrollment "+id+" is for a key that the server makes", "remove "+s.recipientFile+" and run this again without --origin node, or ask for an enrollment of origin node")
	case errors.Is(err, client.DeviceNotAllowed) && s.tpm == "":
		return refused("the token of enrollment "+id+" is for a key in a TPM", "remove "+s.recipientFile+" and run this again with --tpm "+usualTPM)
	case errors.Is(err, client.DeviceNotAllowed):
		return refused("the server does not allow the TPM at "+s.tpm, "orgkeys-node ek names it: have an administrator allow it, or bind the enrollment to it; if it is bound to another machine's, this one has the wrong token")
	case errors.Is(err, client.BadSignature) && s.tpm == "":
		return refused("the server has no proof that this node has the key in "+s.recipientFile, "something between this node and "+s.server+" may be changing requests")
	case errors.Is(err, client.BadSignature):
		return refused("the server has no proof that "+s.recipientFile+" is in the TPM", "does another program answer in the TPM's place, or change requests between this node and "+s.server+"? If not, "+another)
	case errors.Is(err, client.RecipientUnacceptable) && s.origin == originNode:
		return refused("the server does not accept the key in "+s.recipientFile, "remove it, and run this again")
	case errors.Is(err, client.RecipientUnacceptable):
		return refused("the server does not accept the recipient in "+s.recipientFile, "remove it, and run this again")
	case errors.Is(err, client.SealedUnavailable):
		return refused("the server's HSM cannot seal keys", "have an administrator hand a key out, and put it into "+s.keyFile)
	}
	return err
}

// refusedReceipt says why the server does not take the receipt of a stored key.
func refusedReceipt(s settings, r *record, err error) error {
	switch {
	case errors.Is(err, client.EnrollmentClosed), errors.Is(err, client.EnrollmentUnknown):
		return &failure{exitRefused, "the key " + r.KeyID + " in " + s.keyFile + " was withdrawn before its receipt arrived", "ask an administrator for a new token", err}
	case errors.Is(err, client.BadSignature):
		return &failure{exitRefused, "the server does not accept the receipt of the key " + r.KeyID, "ask an administrator for a new token", err}
	}
	return err
}
