package api

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/orgkeys/orgkeys/internal/authz"
	"github.com/orgkeys/orgkeys/internal/enroll"
	"github.com/orgkeys/orgkeys/internal/gate"
	"github.com/orgkeys/orgkeys/internal/node"
	"github.com/orgkeys/orgkeys/internal/org"
	"github.com/orgkeys/orgkeys/internal/orgkey"
)

// failing stands for enroll.Service where keys are handed out: all that it does is report err.
type failing struct {
	Enrollments
	err error
}

func (f failing) Claim(context.Context, enroll.Origin, string, []byte, func(enroll.Answer) error, func(enroll.Challenge) error) error {
	return f.err
}

func (f failing) Receive(context.Context, enroll.Origin, string, []byte) error { return f.err }

func (f failing) Generate(context.Context, gate.Call, org.ID, []byte, func(enroll.Answer) error) error {
	return f.err
}

func (f failing) Add(context.Context, gate.Call, org.ID, []byte, func(enroll.Answer) error) error {
	return f.err
}

func (f failing) Fetch(context.Context, gate.Call, org.ID, string, func(enroll.Answer) error) error {
	return f.err
}

func (f failing) ReceiveOwn(context.Context, gate.Call, org.ID, string, []byte) error { return f.err }

// Whatever a use case reports where keys are handed out is an answer that the OpenAPI
// document has for that operation: CheckExchange sees each.
func TestEachRefusalOfASealedKeyIsDocumented(t *testing.T) {
	input := &enroll.InputError{Field: "signature", Problem: "is required"}
	unacceptable := &enroll.RecipientError{Problem: "is not RSA"}
	denied := &gate.DeniedError{Action: authz.ClaimEnrollment, Reason: "of_a_policy"}
	always := []error{input, denied, gate.ErrAudit, fmt.Errorf("reading: %w", orgkey.ErrUnavailable), context.DeadlineExceeded}
	making := []error{enroll.ErrPending, enroll.ErrClosed, unacceptable, orgkey.ErrSealedUnavailable, orgkey.ErrOverloaded, orgkey.ErrBackend}
	const key, own, enrolled = "/organization/acme/key", "/organization/acme/key/" + keyID, "/enroll/" + keyID
	for _, c := range []struct {
		method, path, accept, body string
		errs                       []error
	}{
		{"POST", key, sealedForm, `{"recipient":"x"}`, slices.Concat(making, []error{&orgkey.QuotaError{Limit: 5}})},
		{"POST", key, "application/json", `{"publicKey":"x","signature":"x"}`, []error{enroll.ErrPending, enroll.ErrClosed, enroll.ErrInUse, enroll.ErrProof, &orgkey.QuotaError{Limit: 5}}},
		{"GET", own + "/sealed", "", "", slices.Concat(making, []error{enroll.ErrNotFound})},
		{"POST", own + "/receipt", "", "{}", []error{enroll.ErrNotFound, enroll.ErrClosed, enroll.ErrSignature}},
		{"POST", enrolled, "", `{"mac":"x"}`, slices.Concat(making, []error{enroll.ErrUnknown, enroll.ErrClaimed, enroll.ErrInUse, enroll.ErrProof, enroll.ErrOrigin, enroll.ErrDevice, node.ErrTooManyFailures, node.ErrBusy})},
		{"POST", enrolled + "/receipt", "", "{}", []error{enroll.ErrUnknown, enroll.ErrClosed, enroll.ErrSignature, node.ErrTooManyFailures, node.ErrBusy}},
	} {
		for _, err := range slices.Concat(c.errs, always) {
			t.Run(fmt.Sprintf("%s %s %s, %v", c.method, c.path, c.accept, err), func(t *testing.T) {
				b := newBench(t, func(config *Config) { config.Enrollments = failing{err: err} })
				a := b.send(c.method, b.url+c.path, []byte(c.body), "Accept", c.accept, "Content-Type", "application/json")
				if a.StatusCode == 200 || !strings.HasPrefix(a.Header.Get("Content-Type"), "application/json") {
					t.Errorf("%d, %s", a.StatusCode, a.Header.Get("Content-Type"))
				}
			})
		}
	}
}
