package api

import (
	"errors"
	"fmt"
	"net/http"
	"strconv"
	"strings"

	"github.com/gin-gonic/gin"

	"github.com/orgkeys/orgkeys/internal/authn"
	"github.com/orgkeys/orgkeys/internal/authz"
	"github.com/orgkeys/orgkeys/internal/enroll"
	"github.com/orgkeys/orgkeys/internal/gate"
	"github.com/orgkeys/orgkeys/internal/node"
	"github.com/orgkeys/orgkeys/internal/orgkey"
	"github.com/orgkeys/orgkeys/internal/orglog"
)

// problem is an error as clients see it. Codes are in openapi.yaml, and stable.
type problem struct {
	status  int
	code    string
	message string
	retry   int // seconds, for Retry-After; 0: none
}

// statusClientGone is the status in logs and metrics of a request whose client
// disconnected, as in nginx: it is neither a failure of the service nor a success.
const statusClientGone = 499

// The problems that do not depend on the request.
var (
	noRoute         = problem{http.StatusNotFound, "not_found", "Not found", 0}
	noMethod        = problem{http.StatusMethodNotAllowed, "method_not_allowed", "Method not allowed", 0}
	unauthenticated = problem{http.StatusUnauthorized, "unauthenticated", "Authentication required", 0}
	invalidToken    = problem{http.StatusUnauthorized, "invalid_token", "Invalid or expired token", 0}
	tlsRequired     = problem{http.StatusBadRequest, "tls_required", "This service is reached over HTTPS only", 0}
	invalidOrg      = problem{http.StatusBadRequest, "invalid_organization", "Invalid organization ID: 1 to 128 letters, digits, '_' or '-', beginning with a letter or digit", 0}
	notAcceptable   = problem{http.StatusNotAcceptable, "not_acceptable", "None of the accepted media types is available: this resource has application/x-pem-file, application/json and, for a key that is sealed to a recipient, application/vnd.orgkeys.sealed+json", 0}
	headerTooLarge  = problem{http.StatusRequestHeaderFieldsTooLarge, "header_too_large", "The request's headers are over 16 KiB", 0}
	bodyTooLarge    = problem{http.StatusRequestEntityTooLarge, "body_too_large", "The request body is over 64 KiB", 0}
	bodyTooSlow     = problem{http.StatusRequestTimeout, "request_timeout", "The request body did not arrive in time", 0}
	bodyUnreadable  = problem{http.StatusBadRequest, "body_unreadable", "The request body could not be read", 0}
	keyNotFound     = problem{http.StatusNotFound, "key_not_found", "Organization key not found or does not belong to this organization", 0}
	clientGone      = problem{statusClientGone, "client_gone", "The client closed the request before it was answered", 0}
	overloaded      = problem{http.StatusServiceUnavailable, "overloaded", "Too many key generations in progress. Please try again shortly.", 2}
	draining        = problem{http.StatusServiceUnavailable, "draining", "The service is shutting down. Please try again shortly.", 5}
	auditDown       = problem{http.StatusServiceUnavailable, "audit_unavailable", "The audit log cannot be written at the moment. Nothing was released; please try again later.", 10}
	issuerDown      = problem{http.StatusServiceUnavailable, "unavailable", "Tokens cannot be verified at the moment. Please try again later.", 5}
	unavailable     = problem{http.StatusServiceUnavailable, "unavailable", "The service cannot answer at the moment. Please try again later.", 5}
	notReady        = problem{http.StatusServiceUnavailable, "not_ready", "Not ready", 5}
	keyPending      = problem{http.StatusAccepted, "pending", "The key is not ready yet. Please ask again.", 2}
	noSealing       = problem{http.StatusBadRequest, "sealed_unavailable", "The service's HSM cannot seal a private key to a recipient", 0}

	possessionUnproven = problem{http.StatusBadRequest, "bad_signature", "The request does not prove that its sender has the key's private half", 0}
	originNotAllowed   = problem{http.StatusForbidden, "origin_not_allowed", "The enrollment is for keys of the other origin: the node asks for one that the back end makes, or the reverse", 0}
	deviceNotAllowed   = problem{http.StatusForbidden, "device_not_allowed", "The key has to be in a TPM that is allowed, and is not", 0}
	deviceNotFound     = problem{http.StatusNotFound, "device_not_found", "Device not found", 0}
	tooManyDevices     = problem{http.StatusBadRequest, "too_many_devices", "Maximum number of devices (10000) has been reached. Please remove existing devices before allowing new ones.", 0}

	eventNotFound = problem{http.StatusNotFound, "event_not_found", "Event not found", 0}
	notCovered    = problem{http.StatusAccepted, "pending", "No signed checkpoint covers the event yet. Please ask again.", 5}

	enrollmentUnknown  = problem{http.StatusUnauthorized, "enrollment_unknown", "The enrollment is unknown, or the request was not made with its token", 0}
	enrollmentClaimed  = problem{http.StatusConflict, "enrollment_claimed", "This enrollment was claimed with another recipient key. If that was not this node, tell an administrator.", 0}
	enrollmentClosed   = problem{http.StatusGone, "enrollment_closed", "This enrollment is over: it expired, was revoked, or its key was received. Ask an administrator for a new one.", 0}
	sealedOver         = problem{http.StatusGone, "enrollment_closed", "This key is not handed out any more: it was received, withdrawn or deleted. If you do not have it, create another one.", 0}
	enrollmentNotFound = problem{http.StatusNotFound, "enrollment_not_found", "Enrollment not found", 0}

	generation = problem{http.StatusInternalServerError, "generation_failed", "Key generation failed", 0}
	internal   = problem{http.StatusInternalServerError, "internal", "Internal error", 0}
)

// The problems of nodes and secrets.
var (
	staleTimestamp    = problem{http.StatusBadRequest, "stale_timestamp", "The timestamp is too far from the present; check the node's clock", 0}
	badSignature      = problem{http.StatusBadRequest, "bad_signature", "Invalid signature", 0}
	signatureUsed     = problem{http.StatusBadRequest, "signature_reused", "This signature was used for another request; sign again with a new timestamp", 0}
	tooManyFailed     = problem{http.StatusTooManyRequests, "too_many_failures", "Invalid signature, and too many of them from this address. Please try again later.", 10}
	nodesBusy         = problem{http.StatusServiceUnavailable, "overloaded", "Too many signed requests in progress. Please try again shortly.", 2}
	listsBusy         = problem{http.StatusServiceUnavailable, "overloaded", "Too many lists are being sent. Please try again shortly.", 2}
	addressInUse      = problem{http.StatusConflict, "address_in_use", "The address belongs to another node, and this key may act for its own node only", 0}
	addressNotAllowed = problem{http.StatusForbidden, "address_not_allowed", "The key was enrolled for another address", 0}
	nodeNotFound      = problem{http.StatusNotFound, "node_not_found", "Node not found", 0}
	nodeDeleted       = problem{http.StatusBadRequest, "node_already_deleted", "Node is already deleted", 0}
	secretNotFound    = problem{http.StatusNotFound, "secret_not_found", "Secret not found", 0}
	secretBroken      = problem{http.StatusInternalServerError, "secret_broken", "A boot secret of this organization cannot be opened. An administrator has to store it again.", 0}
	tooManySecrets    = problem{http.StatusBadRequest, "too_many_secrets", "Maximum number of secrets (64) has been reached. Please delete existing secrets before creating new ones.", 0}
)

// generationError marks a failure of POST …/key, whose contract has its own message for
// unknown errors.
type generationError struct{ error }

func (e generationError) Unwrap() error { return e.error }

// problemFor translates every error. The answer to an unknown error has no details.
func problemFor(err error) problem {
	ofNodes, aboutNodes := nodeProblem(err)
	ofEnrollment, aboutEnrollment := enrollmentProblem(err)
	var (
		token  *authn.TokenError
		denied *gate.DeniedError
		quota  *orgkey.QuotaError
	)
	switch {
	case errors.As(err, &token) && token.Reason != authn.ReasonMissing:
		return invalidToken
	case errors.Is(err, authn.ErrUnauthenticated):
		return unauthenticated
	case errors.Is(err, authn.ErrKeysUnavailable):
		return issuerDown
	case errors.As(err, &denied):
		return deniedProblem(denied)
	case errors.Is(err, gate.ErrAudit): // before the others: nothing is answered that was not recorded
		return auditDown
	case aboutNodes:
		return ofNodes
	case aboutEnrollment:
		return ofEnrollment
	case errors.As(err, &quota):
		return quotaProblem(quota)
	case errors.Is(err, orglog.ErrNotFound):
		return eventNotFound
	case errors.Is(err, orglog.ErrNotCovered):
		return notCovered
	case errors.Is(err, orgkey.ErrNotFound):
		return keyNotFound
	case errors.Is(err, orgkey.ErrOverloaded):
		return overloaded
	case errors.Is(err, orgkey.ErrUnavailable): // before the back end's own failures: an unreachable back end can work later
		return unavailable
	case errors.Is(err, orgkey.ErrBackend):
		return generation
	case errors.As(err, new(generationError)):
		return generation
	default:
		return internal
	}
}

// nodeProblem is problemFor of what package node reports.
func nodeProblem(err error) (problem, bool) {
	if input, ok := errors.AsType[*node.InputError](err); ok {
		return problem{http.StatusBadRequest, "invalid_request", input.Error(), 0}, true
	}
	for _, known := range []struct {
		err error
		problem
	}{
		{node.ErrStale, staleTimestamp},
		{node.ErrSignature, badSignature},
		{node.ErrReused, signatureUsed},
		{node.ErrTooManyFailures, tooManyFailed},
		{node.ErrBusy, nodesBusy},
		{node.ErrAddressInUse, addressInUse},
		{node.ErrAddressNotAllowed, addressNotAllowed},
		{node.ErrNodeNotFound, nodeNotFound},
		{node.ErrAlreadyDeleted, nodeDeleted},
		{node.ErrSecretNotFound, secretNotFound},
		{node.ErrSecretBroken, secretBroken},
		{node.ErrTooManySecrets, tooManySecrets},
	} {
		if errors.Is(err, known.err) {
			return known.problem, true
		}
	}
	return problem{}, false
}

func quotaProblem(q *orgkey.QuotaError) problem {
	text := "Maximum number of organization keys (%d) has been reached. Please delete existing keys before creating new ones."
	if q.NodeKeys {
		text = "Maximum number of node keys (%d) has been reached. Please delete nodes or revoke enrollments before creating new ones."
	}
	return problem{http.StatusBadRequest, "quota_exceeded", fmt.Sprintf(text, q.Limit), 0}
}

// enrollmentProblem is problemFor of what package enroll reports.
func enrollmentProblem(err error) (problem, bool) {
	if recipient, ok := errors.AsType[*enroll.RecipientError](err); ok {
		return problem{http.StatusBadRequest, "recipient_unacceptable", recipient.Error(), 0}, true
	}
	for _, known := range []struct {
		err error
		problem
	}{
		{enroll.ErrUnknown, enrollmentUnknown},
		{enroll.ErrClaimed, enrollmentClaimed},
		{enroll.ErrProof, possessionUnproven},
		{enroll.ErrOrigin, originNotAllowed},
		{enroll.ErrDevice, deviceNotAllowed},
		{enroll.ErrDeviceNotFound, deviceNotFound},
		{enroll.ErrTooManyDevices, tooManyDevices},
		{enroll.ErrOver, sealedOver}, // which is ErrClosed, too
		{enroll.ErrClosed, enrollmentClosed},
		{enroll.ErrNotFound, enrollmentNotFound},
		{enroll.ErrSignature, badSignature},
		{enroll.ErrPending, keyPending},
		{orgkey.ErrSealedUnavailable, noSealing},
	} {
		if errors.Is(err, known.err) {
			return known.problem, true
		}
	}
	return problem{}, false
}

// deniedProblem is the answer to a denied request. For unknown reasons of a replaced
// policy it says only that.
func deniedProblem(d *gate.DeniedError) problem {
	what, area := "keys for your own organization", "organization keys"
	switch {
	case strings.HasPrefix(string(d.Action), "node."):
		what, area = "nodes of your own organization", "nodes"
	case strings.HasPrefix(string(d.Action), "secret."):
		what, area = "secrets of your own organization", "secrets"
	case strings.HasPrefix(string(d.Action), "enrollment."):
		what, area = "enrollments of your own organization", "enrollments"
	case strings.HasPrefix(string(d.Action), "device."):
		what, area = "devices of your own organization", "devices"
	case strings.HasPrefix(string(d.Action), "event."):
		what, area = "events of your own organization", "events"
	case strings.HasPrefix(string(d.Action), "policy."):
		what, area = "your own organization", "organizations"
	}
	p := problem{status: http.StatusForbidden, code: "access_denied", message: "Access denied"}
	switch d.Reason {
	case authz.OtherOrganization:
		p.code, p.message = "other_organization", "Access denied: you can only manage "+what
	case authz.InsufficientRole:
		if d.Action == authz.AddKey { // the shipped policy lets nobody
			p.code, p.message = "insufficient_role", "Insufficient permissions: the policy does not let you add keys of your own"
			return p
		}
		p.code, p.message = "insufficient_role", "Insufficient permissions: only OWNER and ADMINISTRATOR roles can manage "+area
	}
	return p
}

// fail answers with the problem for err, and logs err if an operator needs to know more
// than the client.
func (a *API) fail(c *gin.Context, err error) {
	p := problemFor(err)
	if c.Request.Context().Err() != nil {
		p = clientGone
	}
	if p.status == http.StatusUnauthorized {
		c.Header("WWW-Authenticate", challenge(err))
	}
	if p.status >= http.StatusInternalServerError {
		a.Log.Error("request failed", "request", exchangeOf(c).id, "route", route(c), "code", p.code, "error", err)
	}
	a.refuse(c, p)
}

// challenge says what a token was refused for (RFC 6750, section 3). A request
// without any is told no error, as section 3.1 has it.
func challenge(err error) string {
	var token *authn.TokenError
	if !errors.As(err, &token) || token.Reason == authn.ReasonMissing {
		return "Bearer"
	}
	return fmt.Sprintf(`Bearer error="invalid_token", error_description=%q`, token.Description())
}

// errorBody is the form of every error.
type errorBody struct {
	Success   bool   `json:"success"` // always false
	Message   string `json:"message"`
	ErrorCode string `json:"errorCode"`
	RequestID string `json:"requestId"`
}

// refuse answers with p and ends the request. A response that has begun is aborted, so
// that the client does not take it for complete.
func (a *API) refuse(c *gin.Context, p problem) {
	x := exchangeOf(c)
	if c.Writer.Written() {
		x.aborted = true
		panic(http.ErrAbortHandler)
	}
	x.code = p.code
	if p.code == enrollmentUnknown.code {
		c.Header("WWW-Authenticate", "Orgkeys-Enrollment")
	}
	if p.retry > 0 {
		c.Header("Retry-After", strconv.Itoa(p.retry))
	}
	c.Abort()
	writeJSON(c, p.status, errorBody{Message: p.message, ErrorCode: p.code, RequestID: x.id})
}

// writeJSON writes v with the media type that the contract names, without the
// charset that Gin adds.
func writeJSON(c *gin.Context, status int, v any) {
	c.Header("Content-Type", "application/json")
	c.JSON(status, v)
}
