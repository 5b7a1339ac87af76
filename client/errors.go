package client

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"regexp"
	"time"

	"github.com/go-json-experiment/json"
)

// Code is what the API calls errorCode: stable, and the same in every language.
// It is an error, so that errors.Is(err, client.KeyNotFound) asks for it.
type Code string

// Error returns the code itself.
func (c Code) Error() string { return string(c) }

// The codes that this version knows. docs/api.md says what each means.
const (
	AccessDenied          Code = "access_denied"
	AddressInUse          Code = "address_in_use"
	AddressNotAllowed     Code = "address_not_allowed"
	AuditUnavailable      Code = "audit_unavailable"
	BadSignature          Code = "bad_signature"
	BodyTooLarge          Code = "body_too_large"
	BodyUnreadable        Code = "body_unreadable"
	ClientGone            Code = "client_gone"
	DeviceNotAllowed      Code = "device_not_allowed"
	DeviceNotFound        Code = "device_not_found"
	Draining              Code = "draining"
	EnrollmentClaimed     Code = "enrollment_claimed"
	EnrollmentClosed      Code = "enrollment_closed"
	EnrollmentNotFound    Code = "enrollment_not_found"
	EnrollmentUnknown     Code = "enrollment_unknown"
	EventNotFound         Code = "event_not_found"
	GenerationFailed      Code = "generation_failed"
	HeaderTooLarge        Code = "header_too_large"
	InsufficientRole      Code = "insufficient_role"
	Internal              Code = "internal"
	InvalidOrganization   Code = "invalid_organization"
	InvalidRequest        Code = "invalid_request"
	InvalidToken          Code = "invalid_token"
	KeyNotFound           Code = "key_not_found"
	MethodNotAllowed      Code = "method_not_allowed"
	NodeAlreadyDeleted    Code = "node_already_deleted"
	NodeNotFound          Code = "node_not_found"
	NotAcceptable         Code = "not_acceptable"
	NotFound              Code = "not_found"
	NotReady              Code = "not_ready"
	OriginNotAllowed      Code = "origin_not_allowed"
	OtherOrganization     Code = "other_organization"
	Overloaded            Code = "overloaded"
	Pending               Code = "pending"
	QuotaExceeded         Code = "quota_exceeded"
	RecipientUnacceptable Code = "recipient_unacceptable"
	RequestTimeout        Code = "request_timeout"
	SealedUnavailable     Code = "sealed_unavailable"
	SecretBroken          Code = "secret_broken"
	SecretNotFound        Code = "secret_not_found"
	SignatureReused       Code = "signature_reused"
	StaleTimestamp        Code = "stale_timestamp"
	TLSRequired           Code = "tls_required"
	TooManyDevices        Code = "too_many_devices"
	TooManyFailures       Code = "too_many_failures"
	TooManySecrets        Code = "too_many_secrets"
	Unauthenticated       Code = "unauthenticated"
	Unavailable           Code = "unavailable"
)

// ErrListTooLong means that a list is longer than this package reads. Whoever has one
// so long reads it with another program, such as curl, and deletes what is not needed.
var ErrListTooLong = errors.New("the list is longer than this program reads; read it with another, such as curl, and delete what is not needed")

// Error is a refusal by the server.
type Error struct {
	Status     int           // the HTTP status
	Code       Code          // the API's errorCode
	Message    string        // for people
	RequestID  string        // under which the server logged it
	RetryAfter time.Duration // how long the server asks to wait; 0 if it does not
	// ClockOffset is how far the local clock is ahead of the server's, judged by
	// the answer's Date; 0 if it has none.
	ClockOffset time.Duration
}

func (e *Error) Error() string {
	return fmt.Sprintf("the server answers %d %s: %s", e.Status, e.Code, e.Message)
}

// Is reports whether target is the error's Code.
func (e *Error) Is(target error) bool {
	code, ok := target.(Code)
	return ok && code == e.Code
}

// ForeignError is an answer that no orgkeys server gives, so something else
// gave it: a captive portal, a proxy, an ingress without routes, another service.
type ForeignError struct {
	Status     int
	Location   string        // where a redirect leads to
	RetryAfter time.Duration // how long it asks to wait; 0 if it does not
	Problem    string        // what tells it from an answer of orgkeys
}

func (e *ForeignError) Error() string {
	if e.Location != "" {
		return fmt.Sprintf("this is no answer of an orgkeys server: %d, a redirect to %q", e.Status, e.Location)
	}
	return fmt.Sprintf("this is no answer of an orgkeys server: %d, %s", e.Status, e.Problem)
}

// Temporary reports whether the same call may succeed later without a change
// to its arguments. Only a refusal by the server itself can be final; no answer,
// an answer of something else, and a key that fails, always pass.
func Temporary(err error) bool {
	if e, ok := errors.AsType[*Error](err); ok {
		return e.temporary()
	}
	return err != nil && !errors.Is(err, ErrServer) && !errors.Is(err, ErrRequest) && !errors.Is(err, ErrListTooLong) && !errors.Is(err, ErrSealedUseless) && !errors.Is(err, context.Canceled)
}

// maxClockOffset is less than the 5 minutes that a server accepts unless it is
// configured otherwise.
const maxClockOffset = 4 * time.Minute

func (e *Error) temporary() bool {
	switch e.Code {
	case StaleTimestamp, // the clock gets set
		Pending,                         // the key is being made, or awaits approval
		SignatureReused, BodyUnreadable, // another attempt signs and sends anew
		TLSRequired: // what is in between speaks http to the server
		return true
	}
	if e.Status == http.StatusBadRequest && e.ClockOffset.Abs() > maxClockOffset && e.Code == InvalidRequest {
		return true
	}
	return e.Status >= http.StatusInternalServerError || e.Status == http.StatusTooManyRequests || e.Status == http.StatusRequestTimeout
}

var codeForm = regexp.MustCompile(`^[a-z][a-z0-9_]{0,63}$`)

// refusal is the error that an answer other than 2xx stands for.
func (a *answer) refusal() error {
	if a.status >= 300 && a.status < 400 {
		return &ForeignError{Status: a.status, Location: a.header.Get("Location"), RetryAfter: a.retryAfter, Problem: "a redirect"}
	}
	if err := a.wantType("application/json"); err != nil {
		return err
	}
	var body struct {
		Success   *bool  `json:"success"`
		Message   string `json:"message"`
		ErrorCode string `json:"errorCode"`
		RequestID string `json:"requestId"`
	}
	if err := json.Unmarshal(a.body, &body); err != nil || body.Success == nil || *body.Success || !codeForm.MatchString(body.ErrorCode) {
		return a.foreign("JSON without an errorCode")
	}
	// Others have codes of that form, too. Whether orgkeys knows the code is no
	// question: a newer one may have more.
	if body.RequestID == "" {
		return a.foreign("an errorCode without a requestId")
	}
	return &Error{
		Status: a.status, Code: Code(body.ErrorCode), Message: body.Message, RequestID: body.RequestID,
		RetryAfter: a.retryAfter, ClockOffset: a.clockOffset,
	}
}

func (a *answer) foreign(problem string) error {
	return &ForeignError{Status: a.status, RetryAfter: a.retryAfter, Problem: problem}
}
