package login

import (
	"context"
	"errors"
	"fmt"
	"time"

	"golang.org/x/oauth2"
)

// Device is what a person needs in order to sign in on another machine.
type Device struct {
	Address  string // where to go
	Code     string // to type there
	Complete string // an address with the code in it; may be empty
	Expires  time.Time
}

// ByDevice signs a person in who has no browser on this machine (RFC 8628).
// show is told what to do on the other one.
func (p Provider) ByDevice(ctx context.Context, show func(Device)) (Session, error) {
	ctx, cancel := context.WithTimeout(ctx, loginTime)
	defer cancel()
	ctx, e, err := p.discover(ctx)
	if err != nil {
		return Session{}, err
	}
	if e.Endpoint.DeviceAuthURL == "" {
		return Session{}, fmt.Errorf("%w %s offers no device authorization: turn it on there, or log in without --device", ErrProvider, p.Issuer)
	}
	device, err := e.DeviceAuth(ctx, p.target()...)
	if err != nil {
		return Session{}, fmt.Errorf("%w: asking for a device code: %w", ErrProvider, err)
	}
	show(Device{device.VerificationURI, device.UserCode, device.VerificationURIComplete, device.Expiry})
	token, err := e.DeviceAccessToken(ctx, device, p.target()...)
	if err != nil {
		if refused, ok := errors.AsType[*oauth2.RetrieveError](err); ok && refused.ErrorCode == "access_denied" {
			return Session{}, fmt.Errorf("%w: %w", ErrDenied, err)
		}
		return Session{}, fmt.Errorf("%w: waiting for the login: %w", ErrProvider, err)
	}
	return p.granted(ctx, e, token, "")
}
