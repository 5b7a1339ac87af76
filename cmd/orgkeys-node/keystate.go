package main

import (
	"encoding/json"
	"errors"
	"io/fs"

	"github.com/orgkeys/orgkeys/client"
	"github.com/orgkeys/orgkeys/internal/tpmdevice"
)

// What an enrollment keeps beside the key file.
const (
	recipientSuffix = ".recipient"  // the private key that opens the answer, until the receipt
	recordSuffix    = ".enrollment" // what the receipt says, and that it was taken
)

// record is what a node remembers of the delivery of its key. It is written
// before the key, so that a key without a record is not one that was enrolled here.
type record struct {
	client.Delivery
	Received bool             `json:"received"`           // the server has the receipt
	Replaced *client.Delivery `json:"replaced,omitempty"` // of the key before it
}

// delivery returns how key came: by the enrollment of the record or, after a run that
// ended between record and key, by the one before. It is nil for any other key. The record
// may be nil.
func (r *record) delivery(key client.PrivateKey) *client.Delivery {
	if r == nil || key == nil {
		return nil
	}
	fingerprint := client.Fingerprint(key.Public())
	if r.Fingerprint == fingerprint {
		return &r.Delivery
	}
	if r.Replaced != nil && r.Replaced.Fingerprint == fingerprint {
		return r.Replaced
	}
	return nil
}

// readRecord returns nil where there is none.
func readRecord(path string) (*record, error) {
	wrong := func(err error, hint string) error {
		return &failure{exitConfig, "enrollment record " + path, hint, err}
	}
	text, hint, err := readPrivateFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, wrong(err, hint)
	}
	var r record
	if err := json.Unmarshal(text, &r); err != nil || r.Enrollment == "" {
		return nil, wrong(errors.New("it is not an enrollment record"), "remove it; without it, --org must be set")
	}
	return &r, nil
}

// keyState is how far the node's key is.
type keyState struct {
	private client.PrivateKey // nil: there is none
	record  *record           // nil: nothing was enrolled here
	token   []byte            // nil: there is none, or no longer
	id      string            // the token's enrollment
	begun   bool              // there is a recipient
}

func (k *keyState) clear() { clear(k.token) }

// delivery returns how the key came, nil if by no enrollment of this node.
func (k *keyState) delivery() *client.Delivery { return k.record.delivery(k.private) }

// delivered reports whether the key is there that the token is for or, without a
// token, that the last enrollment brought.
func (k *keyState) delivered() bool {
	d := k.delivery()
	return d != nil && d == &k.record.Delivery && (k.token == nil || k.id == d.Enrollment)
}

// foreign reports whether there is a key that no enrollment of this node brought.
func (k *keyState) foreign() bool { return k.private != nil && k.delivery() == nil }

func readKeyState(s settings) (*keyState, error) {
	k := &keyState{begun: exists(s.recipientFile)}
	var err error
	if exists(s.keyFile) {
		if k.private, err = readKey(s, s.keyFile); err != nil {
			return nil, err
		}
	}
	if k.record, err = readRecord(s.keyFile + recordSuffix); err != nil {
		return nil, err
	}
	if s.token == "" {
		return k, nil
	}
	text, hint, err := readPrivateFile(s.token)
	if errors.Is(err, fs.ErrNotExist) {
		return k, nil
	}
	if err == nil {
		k.id, err = client.TokenID(text)
		hint = "copy the token again as it was shown"
	}
	if err != nil {
		clear(text)
		return nil, &failure{exitConfig, "token file " + s.token, hint, err}
	}
	k.token = text
	return k, nil
}

// missing says what a node without a key needs.
func (k *keyState) missing(s settings) *failure {
	switch {
	case k.token != nil && k.begun:
		return &failure{exit: exitConfig, what: "there is no key yet; enrollment " + k.id + " was begun", hint: "run orgkeys-node boot or enroll to continue it"}
	case k.token != nil:
		return &failure{exit: exitConfig, what: "there is no key yet, but a token of enrollment " + k.id, hint: "run orgkeys-node boot or enroll to fetch the key"}
	case s.token != "":
		return &failure{exitConfig, "token file " + s.token, "put the token there, mode 0600", fs.ErrNotExist}
	}
	return &failure{exitConfig, "key file " + s.keyFile, "put the private key there, mode 0600, or name a --token-file", fs.ErrNotExist}
}

// The states of a node's key, as status shows them.
const (
	stateNone      = "no key"
	stateToken     = "not enrolled yet"
	stateBegun     = "enrollment begun"
	stateGiven     = "not enrolled"
	stateDelivered = "enrolled, receipt not sent yet"
	stateReceived  = "enrolled"
	stateReplacing = "enrolled, and a token for another key"
)

func (k *keyState) report(s settings, r *report) {
	switch {
	case k.private == nil && k.token == nil:
		r.State = stateNone
	case k.private == nil && !k.begun:
		r.State = stateToken
	case k.private == nil:
		r.State = stateBegun
	case k.foreign():
		r.State = stateGiven
	case k.delivered() && !k.record.Received:
		r.State = stateDelivered
	case !k.delivered() && k.token != nil:
		r.State = stateReplacing
	default:
		r.State = stateReceived
	}
	if key, ok := k.private.(*tpmdevice.Key); ok {
		r.TPM = key.Path()
	}
	if k.private != nil {
		r.Fingerprint = client.Fingerprint(k.private.Public())
	}
	if d := k.delivery(); d != nil {
		r.KeyID, r.Enrollment = d.KeyID, d.Enrollment
	} else {
		r.Enrollment = k.id
	}
	if k.begun {
		if key, err := readRecipient(s); err == nil {
			r.Recipient = nameOf(key)
		}
	}
}
