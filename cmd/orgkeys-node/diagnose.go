package main

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"strings"
	"time"

	"github.com/orgkeys/orgkeys/client"
)

const (
	clockTolerance = 4 * time.Minute // the server's window is 5 minutes unless it is configured otherwise
	maxMessage     = 300             // bytes of what the server says
)

// diagnose says what an error means to whoever runs the node, and what to do.
func diagnose(s settings, err error) *failure {
	if f, ok := errors.AsType[*failure](err); ok {
		return f
	}
	if f := tpmTrouble(s, err); f != nil {
		return f
	}
	if refused, ok := errors.AsType[*client.Error](err); ok {
		return refusal(s, refused)
	}
	if foreign, ok := errors.AsType[*client.ForeignError](err); ok {
		return &failure{exitProtocol, "something that is not orgkeys answers at " + s.server, "is --server right, and is there a portal, proxy or load balancer in between?", foreign}
	}
	switch {
	case errors.Is(err, client.ErrKeyFailed):
		return &failure{exitConfig, "key file " + s.keyFile, "copy the PEM again as it was handed out", err}
	case errors.Is(err, client.ErrServer):
		return &failure{exitUsage, "--server " + s.server, "use https", err}
	case errors.Is(err, client.ErrRequest):
		return &failure{exitUsage, "the request cannot be made", "check the settings", err}
	}
	if f := certificateTrouble(err); f != nil {
		return f
	}
	hint := "check the network and the server"
	// The alert that asks for a certificate is often lost with the connection.
	if network, ok := errors.AsType[*net.OpError](err); strings.HasPrefix(s.server, "https:") && (!ok || network.Op != "dial") {
		hint += ", and whether it wants a client certificate (--tls-cert and --tls-key)"
	}
	return &failure{exitUnavailable, "the server " + s.server + " cannot be reached", hint, err}
}

// refusal says why the server refused, and what to do.
func refusal(s settings, e *client.Error) *failure {
	said := errors.New(shortened(e.Message))
	switch {
	case errors.Is(e, client.StaleTimestamp), errors.Is(e, client.InvalidRequest) && client.Temporary(e):
		return clockIsOff(e.ClockOffset)
	case errors.Is(e, client.BadSignature):
		what := "the server does not accept this key"
		if s.org != "" {
			what += " for organization " + s.org
		}
		return &failure{exitRefused, what, "was the key deleted, or is --org wrong? Get a new key from an administrator and put it into " + s.keyFile + ", or a new enrollment token (--token-file)", said}
	case errors.Is(e, client.AddressInUse):
		return &failure{exitRefused, "the address " + s.ip + " belongs to another node with a key of its own", "if that was this node, have an administrator delete it or its old key; else check --ip", said}
	case errors.Is(e, client.AddressNotAllowed):
		return &failure{exitRefused, "the key was enrolled for another address than " + s.ip, "check --ip, or ask an administrator for a new token", said}
	case client.Temporary(e):
		return &failure{exitUnavailable, fmt.Sprintf("the server %s cannot serve now, it answers %d", s.server, e.Status), "check the server", said}
	case errors.Is(e, client.NotFound), errors.Is(e, client.MethodNotAllowed):
		return &failure{exitRefused, fmt.Sprintf("the server refuses (%d)", e.Status), "is the path of --server right?", said}
	}
	return &failure{exitRefused, fmt.Sprintf("the server refuses (%d)", e.Status), "", said}
}

// shortened is no longer than a line should be, and has no half of a character.
func shortened(message string) string {
	if message == "" {
		return "no reason given"
	}
	return strings.ToValidUTF8(message[:min(len(message), maxMessage)], "")
}

func clockIsOff(offset time.Duration) *failure {
	if offset.Abs() < time.Minute {
		return &failure{exit: exitTryLater, what: "the server rejects this node's timestamp as stale", hint: "check the clocks of both"}
	}
	direction := "ahead of"
	if offset < 0 {
		direction = "behind"
	}
	by := strings.TrimSuffix(offset.Abs().Round(time.Minute).String(), "0s")
	return &failure{exit: exitTryLater, what: "this node's clock is off by " + by + ", " + direction + " the server's", hint: "set it (timedatectl set-ntp true)"}
}

// certificateTrouble explains an error that is about a certificate, nil for others.
// An expired one is mostly this node's clock: many machines boot with a
// wrong one, and have it set a little later.
func certificateTrouble(err error) *failure {
	if invalid, ok := errors.AsType[x509.CertificateInvalidError](err); ok && invalid.Reason == x509.Expired {
		return &failure{exitTryLater, "the server's certificate is expired or not yet valid by this node's clock", "check the clock (timedatectl set-ntp true), then the certificate", invalid}
	}
	if untrusted, ok := errors.AsType[*tls.CertificateVerificationError](err); ok {
		return &failure{exitConfig, "the server's certificate is not trusted", "check --server and --ca-file", untrusted.Err}
	}
	// An alert of the other side has no type of its own in crypto/tls.
	remote, ok := errors.AsType[*net.OpError](err)
	if !ok || remote.Op != "remote error" || !strings.Contains(remote.Err.Error(), "certificate") {
		return nil
	}
	return &failure{exitConfig, "the server requires a client certificate from an authority that it trusts", "check --tls-cert and --tls-key", err}
}
