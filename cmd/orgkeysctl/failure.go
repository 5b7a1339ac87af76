package main

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"
	"unicode"

	"github.com/orgkeys/orgkeys/client"
	"github.com/orgkeys/orgkeys/internal/durable"
	"github.com/orgkeys/orgkeys/internal/login"
)

// Exit codes, after sysexits.h.
const (
	exitNo          = 1  // the policy's answer
	exitUsage       = 64 // the command line or a setting is wrong
	exitDamaged     = 65 // what arrived is damaged
	exitNotFound    = 66 // there is no such key, enrollment, node or secret
	exitUnavailable = 69 // the server or the provider cannot be reached, or cannot serve now
	exitCannotWrite = 73 // a file is there already, or cannot be written
	exitTryAgain    = 75 // interrupted
	exitProtocol    = 76 // something that is not orgkeys answers
	exitRefused     = 77 // nobody is logged in, or the server refuses
	exitConfig      = 78 // a file that is read is not as it must be
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
		text = strings.TrimPrefix(text+": "+f.err.Error(), ": ")
	}
	if f.hint != "" {
		text += "; " + f.hint
	}
	return text
}

func (f *failure) Unwrap() error { return f.err }

// diagnose says what an error means, and what to do.
func diagnose(ctx context.Context, s *settings, err error) error {
	if _, ok := errors.AsType[*failure](err); ok {
		return err
	}
	if ctx.Err() != nil {
		return &failure{exit: exitTryAgain, what: "interrupted", hint: "run it again"}
	}
	if f := loginTrouble(s, err); f != nil {
		return f
	}
	if refused, ok := errors.AsType[*client.Error](err); ok {
		return refusal(refused)
	}
	if foreign, ok := errors.AsType[*client.ForeignError](err); ok {
		return &failure{exitProtocol, "something that is not orgkeys answers at " + s.server, "is --server right, and is there a portal, proxy or load balancer in between?", foreign}
	}
	if errors.Is(err, client.ErrKeyDamaged) || errors.Is(err, client.ErrSealedDamaged) {
		return &failure{exit: exitDamaged, err: err}
	}
	if errors.Is(err, client.ErrRequest) {
		return &failure{exitUsage, "the request cannot be made", "texts have to be UTF-8", err}
	}
	if untrusted, ok := errors.AsType[*tls.CertificateVerificationError](err); ok {
		return &failure{exitUnavailable, "the server's certificate is not trusted", "check --server and --ca-file", untrusted.Err}
	}
	if path, ok := errors.AsType[*fs.PathError](err); ok {
		return &failure{exit: exitCannotWrite, err: path}
	}
	if link, ok := errors.AsType[*os.LinkError](err); ok {
		return &failure{exit: exitCannotWrite, err: link}
	}
	return &failure{exitUnavailable, "the server " + s.server + " cannot be reached", "check the network, and whether it wants a client certificate (--tls-cert and --tls-key)", err}
}

// loginTrouble explains why there is no token, nil if that is not the matter.
func loginTrouble(s *settings, err error) *failure {
	again := "log in: orgkeysctl login --server " + s.server
	switch {
	case errors.Is(err, login.ErrNone), errors.Is(err, login.ErrOver):
		return &failure{exitRefused, "", again, withoutToken(err)}
	case errors.Is(err, login.ErrDenied):
		return &failure{exit: exitRefused, err: err}
	case errors.Is(err, login.ErrOpaque):
		return &failure{exit: exitConfig, err: withoutToken(err)}
	case errors.Is(err, login.ErrProvider):
		return &failure{exit: exitUnavailable, err: withoutToken(err)}
	case errors.Is(err, durable.ErrLocked):
		return &failure{exit: exitTryAgain, err: withoutToken(err)}
	}
	if without, ok := errors.AsType[*tokenError](err); ok {
		return &failure{exit: exitConfig, what: "the token cannot be read", err: without.err}
	}
	return nil
}

// withoutToken leaves out what the client says about requests.
func withoutToken(err error) error {
	if without, ok := errors.AsType[*tokenError](err); ok {
		return without.err
	}
	return err
}

// refusal says why the server refused, and what to do.
func refusal(e *client.Error) *failure {
	said := fmt.Errorf("%s (%s, request %s)", e.Message, e.Code, e.RequestID)
	switch {
	case errors.Is(e, client.InvalidToken), errors.Is(e, client.Unauthenticated):
		return &failure{exitRefused, "the server does not accept the token", `log in again; "orgkeys token explain" on the server says why`, said}
	case errors.Is(e, client.InsufficientRole), errors.Is(e, client.OtherOrganization), errors.Is(e, client.AccessDenied):
		return &failure{exitRefused, "not allowed", `"orgkeysctl whoami" shows who is logged in`, said}
	case errors.Is(e, client.SealedUnavailable):
		return &failure{exitRefused, "the server's back end cannot seal keys", "--plain gets it without that", said}
	case errors.Is(e, client.QuotaExceeded):
		return &failure{exitRefused, "there is no room", "delete what is not needed any more", said}
	case errors.Is(e, client.KeyNotFound), errors.Is(e, client.NodeNotFound), errors.Is(e, client.NodeAlreadyDeleted),
		errors.Is(e, client.SecretNotFound), errors.Is(e, client.EnrollmentNotFound), errors.Is(e, client.DeviceNotFound):
		return &failure{exit: exitNotFound, err: said}
	case client.Temporary(e):
		return &failure{exitUnavailable, fmt.Sprintf("the server cannot serve now, it answers %d", e.Status), "try again later", said}
	case errors.Is(e, client.NotFound), errors.Is(e, client.MethodNotAllowed):
		return &failure{exitRefused, "the server does not know this request", "is the path of --server right, and is the server new enough?", said}
	}
	return &failure{exit: exitRefused, what: "the server refuses", err: said}
}

// oneLine keeps what others say from looking like more than one line, or like
// another text than it is.
func oneLine(text string) string {
	return shown(strings.ReplaceAll(text, "\n", " "))
}

// shown is a text as a terminal may have it: whatever could move the cursor,
// change colours or turn the direction of writing is escaped.
func shown(text string) string {
	var b strings.Builder
	for i, c := range text {
		switch {
		case c == unicode.ReplacementChar && !strings.HasPrefix(text[i:], string(c)):
			fmt.Fprintf(&b, `\x%02x`, text[i])
		case c == ' ' || unicode.IsPrint(c):
			b.WriteRune(c)
		case c < 0x80:
			fmt.Fprintf(&b, `\x%02x`, c)
		default:
			fmt.Fprintf(&b, `\u%04x`, c)
		}
	}
	return b.String()
}
