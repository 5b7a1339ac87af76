package authn

import (
	"errors"
	"sync"
)

// Reasons for refusing callers that nobody knows, beyond those of tokens.
const (
	ReasonNodeRequest   = "node_request"   // a node's request is malformed
	ReasonNodeTimestamp = "node_timestamp" // a node's timestamp is stale
	ReasonNodeSignature = "node_signature" // a node's signature is not one of a live key of the organization
	ReasonEnrollment    = "enrollment"     // an enrollment is unknown, or its token did not make the request
	ReasonTooMany       = "too_many"       // an address failed too often
	ReasonOther         = "other"
)

// Failures counts refused callers by reason, for the one summary event per
// reason and minute that the audit log has of them. The zero value is ready.
type Failures struct {
	mu     sync.Mutex
	counts map[string]int64
}

// CountedAs returns the reason for which an error of Authenticate counts as a refused
// caller, and an empty text if it does not. A token that may be refused only for want of
// newer keys does: whoever floods the service with forged ones is to be seen.
func CountedAs(err error) string {
	if unsure, ok := errors.AsType[*UnsureError](err); ok {
		return unsure.Refusal.Reason
	}
	if refusal, ok := errors.AsType[*TokenError](err); ok {
		return refusal.Reason
	}
	if errors.Is(err, ErrUnauthenticated) {
		return ReasonOther
	}
	return ""
}

// Count counts one refused caller. A reason outside the closed set counts as
// ReasonOther, so that nothing a caller sends can grow the map or reach the log.
func (f *Failures) Count(reason string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.counts == nil {
		f.counts = make(map[string]int64)
	}
	f.counts[closed(reason)]++
}

// Flush returns the counts since the last Flush and starts again from none. It
// returns nil if there are none.
func (f *Failures) Flush() map[string]int64 {
	f.mu.Lock()
	defer f.mu.Unlock()
	counts := f.counts
	f.counts = nil
	return counts
}

func closed(reason string) string {
	switch reason {
	case ReasonMissing, ReasonMalformed, ReasonAlgorithm, ReasonUnknownKey, ReasonSignature,
		ReasonExpired, ReasonNotYetValid, ReasonIssuer, ReasonAudience, ReasonClaims, ReasonBound, ReasonSubject, ReasonOrganization,
		ReasonNodeRequest, ReasonNodeTimestamp, ReasonNodeSignature, ReasonEnrollment, ReasonTooMany:
		return reason
	default:
		return ReasonOther
	}
}
