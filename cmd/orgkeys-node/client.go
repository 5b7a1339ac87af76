package main

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"

	"github.com/orgkeys/orgkeys/internal/envelope"
)

// What the server is allowed to cost.
const (
	attemptTimeout   = 30 * time.Second // one request with its answer, however slowly it comes...
	shortestAttempt  = 5 * time.Second  // ...or this much and --wait, if that is less
	connectTimeout   = 10 * time.Second
	firstPause       = 500 * time.Millisecond // before the second attempt, doubled each time
	longestPause     = 30 * time.Second
	longestRetry     = 5 * time.Minute // of a server's Retry-After
	maxSmallAnswer   = 64 << 10
	maxSecretsAnswer = 8 << 20 // 64 secrets of 64 KiB in base64, and room
	maxSecrets       = 64
	maxHeaders       = 64 << 10
	maxMessage       = 300             // of what the server says
	clockTolerance   = 4 * time.Minute // the server's window is 5 minutes unless it is configured otherwise
)

// client talks to one server in the name of one node.
type client struct {
	s    settings
	key  key
	base string
	http *http.Client
}

func newClient(s settings, k key) (*client, error) {
	dialer := &net.Dialer{Timeout: connectTimeout}
	t := &http.Transport{
		Proxy: http.ProxyFromEnvironment, DialContext: dialer.DialContext,
		TLSClientConfig: &tls.Config{MinVersion: tls.VersionTLS12}, TLSHandshakeTimeout: connectTimeout,
		ForceAttemptHTTP2: true, DisableCompression: true, MaxResponseHeaderBytes: maxHeaders,
	}
	if s.base.Scheme == "http" {
		t.Proxy = nil
		dialer.Control = loopbackOnly
	}
	if s.caFile != "" {
		text, err := os.ReadFile(s.caFile)
		if err != nil {
			return nil, &failure{exitConfig, "reading --ca-file", "", err}
		}
		t.TLSClientConfig.RootCAs = x509.NewCertPool()
		if !t.TLSClientConfig.RootCAs.AppendCertsFromPEM(text) {
			return nil, &failure{exit: exitConfig, what: "there is no certificate in --ca-file " + s.caFile}
		}
	}
	return &client{s, k, s.base.String(), &http.Client{
		Transport:     t,
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}}, nil
}

// loopbackOnly refuses a name that resolves to another machine.
func loopbackOnly(_, address string, _ syscall.RawConn) error {
	at, err := netip.ParseAddrPort(address)
	if err != nil || !at.Addr().Unmap().IsLoopback() {
		return &failure{exit: exitUsage, what: "http leads to " + address + ", which is not this machine", hint: "use https"}
	}
	return nil
}

// answer is a response, read within bounds.
type answer struct {
	status int
	body   []byte
	retry  time.Duration // its Retry-After; 0 if there is none
	offset time.Duration // how far this node's clock is ahead of the server's; 0 if it does not say
}

// retry sends requests until one is answered by something other than "not
// now", or until --wait is over.
func (c *client) retry(ctx context.Context, limit int64, build func(context.Context) (*http.Request, error)) (answer, error) {
	deadline := time.Now().Add(c.s.wait)
	for pause := firstPause; ; pause = min(2*pause, longestPause) {
		a, err := c.once(ctx, limit, build)
		if err == nil && !a.notNow() {
			return a, nil
		}
		if permanent, ok := errors.AsType[*failure](err); ok {
			return answer{}, permanent
		}
		left := time.Until(deadline)
		if left <= 0 {
			return answer{}, c.gaveUp(a, err)
		}
		// Nodes that were cut off together must not come back together.
		wait := pause/2 + rand.N(pause)
		if wait < a.retry {
			wait = a.retry + rand.N(pause)
		}
		// The last attempt is at the end. Ending earlier because the server asks
		// for more patience would have a supervisor come back all the sooner.
		wait = min(wait, left)
		// A connection kept meanwhile would take one of the server's from a node
		// that has something to ask.
		c.http.CloseIdleConnections()
		select {
		case <-ctx.Done():
			return answer{}, c.gaveUp(a, err)
		case <-time.After(wait):
		}
	}
}

func (c *client) gaveUp(a answer, err error) error {
	if outOfDate(err) {
		return &failure{exitTryLater, fmt.Sprintf("the server's certificate is expired or not yet valid by this node's clock, tried for %s", c.s.wait), "check the clock (timedatectl set-ntp true), then the certificate", err}
	}
	hint := "check the network and the server; this can be run again"
	if err == nil {
		err = fmt.Errorf("it answers %d: %s", a.status, a.message())
	}
	return &failure{exitUnavailable, fmt.Sprintf("the server %s cannot serve, tried for %s", c.base, c.s.wait), hint, err}
}

func (c *client) once(ctx context.Context, limit int64, build func(context.Context) (*http.Request, error)) (answer, error) {
	ctx, cancel := context.WithTimeout(ctx, min(attemptTimeout, shortestAttempt+c.s.wait))
	defer cancel()
	req, err := build(ctx)
	if err != nil {
		return answer{}, &failure{exit: exitConfig, what: "making the request", err: err}
	}
	req.Header.Set("User-Agent", "orgkeys-node")
	sent := time.Now()
	resp, err := c.http.Do(req)
	if err != nil {
		return answer{}, certificateTrouble(err)
	}
	defer resp.Body.Close()
	a := answer{status: resp.StatusCode, retry: retryAfter(resp.Header), offset: offset(resp.Header, sent, time.Now())}
	a.body, err = io.ReadAll(io.LimitReader(resp.Body, limit+1))
	if err != nil {
		return answer{}, fmt.Errorf("reading the answer: %w", err)
	}
	if int64(len(a.body)) > limit {
		return answer{}, &failure{exit: exitProtocol, what: fmt.Sprintf("the server's answer is longer than %d bytes", limit), hint: "is " + c.base + " the right server?"}
	}
	return a, nil
}

// certificateTrouble makes an untrusted server an end and no reason to try
// again, unless it may be this node's clock that is wrong: many machines boot
// with one that is, and have it set a little later.
func certificateTrouble(err error) error {
	var untrusted *tls.CertificateVerificationError
	if !errors.As(err, &untrusted) || outOfDate(err) {
		return err
	}
	return &failure{exitConfig, "the server's certificate is not trusted", "check --server and --ca-file", untrusted.Err}
}

// outOfDate reports whether a certificate was refused for the present time,
// which is all that crypto/x509 calls Expired.
func outOfDate(err error) bool {
	invalid, ok := errors.AsType[x509.CertificateInvalidError](err)
	return ok && invalid.Reason == x509.Expired
}

func (a answer) notNow() bool {
	return a.status >= 500 || a.status == http.StatusTooManyRequests || a.status == http.StatusRequestTimeout
}

// retryAfter reads seconds or a date (RFC 9110, 10.2.3).
func retryAfter(h http.Header) time.Duration {
	text := h.Get("Retry-After")
	if seconds, err := strconv.ParseUint(text, 10, 31); err == nil {
		return min(time.Duration(seconds)*time.Second, longestRetry)
	}
	if at, err := http.ParseTime(text); err == nil {
		return min(max(time.Until(at), 0), longestRetry)
	}
	return 0
}

func offset(h http.Header, sent, received time.Time) time.Duration {
	date, err := http.ParseTime(h.Get("Date"))
	if err != nil {
		return 0
	}
	return sent.Add(received.Sub(sent) / 2).Sub(date)
}

type errorBody struct {
	Message string `json:"message"`
	Code    string `json:"errorCode"`
}

func (a answer) error() errorBody {
	var e errorBody
	if json.Unmarshal(a.body, &e) != nil {
		return errorBody{}
	}
	return e
}

// message is what the server says, no longer than a line should be.
func (a answer) message() string {
	text := a.error().Message
	if text == "" {
		text = "no reason given"
	}
	if len(text) > maxMessage {
		text = strings.ToValidUTF8(text[:maxMessage], "") // no half of a character
	}
	return text
}

// refusal says why the server refused, and what to do.
func (a answer) refusal(s settings) error {
	said := errors.New(a.message())
	code := a.error().Code
	switch {
	case code == "stale_timestamp" || (a.status == http.StatusBadRequest && a.offset.Abs() > clockTolerance):
		return a.clockIsOff()
	case code == "bad_signature":
		return &failure{exitRefused, "the server does not accept this key for organization " + s.org, "was the key deleted, or is --org wrong? Get a new key from an administrator and put it into " + s.keyFile, said}
	case a.status >= 300 && a.status < 400:
		return &failure{exitProtocol, fmt.Sprintf("the server redirects (%d)", a.status), "give its own URL as --server", nil}
	case a.status == http.StatusNotFound:
		return &failure{exitProtocol, fmt.Sprintf("the server answers %d", a.status), "is " + s.server + " an orgkeys server?", said}
	case a.status >= 400:
		return &failure{exitRefused, fmt.Sprintf("the server refuses (%d)", a.status), "", said}
	}
	return &failure{exitProtocol, fmt.Sprintf("the server answers %d", a.status), "is " + s.server + " an orgkeys server?", said}
}

func (a answer) clockIsOff() error {
	if a.offset.Abs() < time.Minute {
		return &failure{exit: exitTryLater, what: "the server finds this node's timestamp stale", hint: "check the clocks of both"}
	}
	direction := "ahead of"
	if a.offset < 0 {
		direction = "behind"
	}
	by := strings.TrimSuffix(a.offset.Abs().Round(time.Minute).String(), "0s")
	return &failure{exit: exitTryLater, what: "this node's clock is off by " + by + ", " + direction + " the server's", hint: "set it (timedatectl set-ntp true) and run this again"}
}

// post sends a signed request. Each attempt signs the present time, in
// milliseconds, so that no two requests share a signature.
func (c *client) post(ctx context.Context, path string, limit int64, more map[string]any) (answer, error) {
	return c.retry(ctx, limit, func(ctx context.Context) (*http.Request, error) {
		stamp := strconv.FormatInt(time.Now().UnixMilli(), 10)
		signature, err := c.key.sign(c.s.ip + "|" + c.s.region + "|" + stamp + "|" + c.s.org)
		if err != nil {
			return nil, err
		}
		fields := map[string]any{"ip": c.s.ip, "region": c.s.region, "timestamp": stamp, "signature": signature, "id_org": c.s.org}
		for name, value := range more {
			fields[name] = value
		}
		body, err := json.Marshal(fields, json.Deterministic(true))
		if err != nil {
			return nil, err
		}
		req, err := http.NewRequestWithContext(ctx, http.MethodPost, c.base+path, bytes.NewReader(body))
		if err != nil {
			return nil, err
		}
		req.Header.Set("Content-Type", "application/json")
		return req, nil
	})
}

func (c *client) register(ctx context.Context) error {
	more := map[string]any{"version": c.s.version, "status": c.s.status}
	if c.s.url != "" {
		more["url"] = c.s.url
	}
	if c.s.provider != "" {
		more["provider"] = c.s.provider
	}
	if c.s.services != "" {
		more["nodeServices"] = c.s.servicesNumber
	}
	a, err := c.post(ctx, "/register", maxSmallAnswer, more)
	if err != nil {
		return err
	}
	return a.done(c.s)
}

// done checks an answer that has nothing to say but that it is done.
func (a answer) done(s settings) error {
	if a.status != http.StatusOK {
		return a.refusal(s)
	}
	var done struct {
		Success bool `json:"success"`
	}
	if err := json.Unmarshal(a.body, &done); err != nil || !done.Success {
		return &failure{exit: exitProtocol, what: "the server's answer does not say that it is done", hint: "is " + s.server + " an orgkeys server?"}
	}
	return nil
}

// unregister takes the node out. One that is not there is out already.
func (c *client) unregister(ctx context.Context) error {
	a, err := c.post(ctx, "/unregister", maxSmallAnswer, nil)
	if err != nil {
		return err
	}
	if a.status == http.StatusNotFound && a.error().Code == "node_not_found" {
		return nil
	}
	return a.done(c.s)
}

type secret struct {
	name  string
	value []byte
}

// secrets returns the organization's boot secrets, by name.
func (c *client) secrets(ctx context.Context) ([]secret, error) {
	a, err := c.post(ctx, "/secrets", maxSecretsAnswer, nil)
	if err != nil {
		return nil, err
	}
	if a.status != http.StatusOK {
		return nil, a.refusal(c.s)
	}
	nonsense := func(what string, err error) ([]secret, error) {
		return nil, &failure{exitProtocol, what, "nothing was written; is " + c.s.server + " an orgkeys server?", err}
	}
	var fields map[string]jsontext.Value
	if err := json.Unmarshal(a.body, &fields); err != nil || fields == nil {
		return nonsense("the server's answer is not a JSON object", nil)
	}
	if success, ok := fields["success"]; ok && string(success) != "true" {
		return nonsense("the server's answer says that it failed", errors.New(a.message()))
	}
	var all []secret
	for field, value := range fields {
		name, ok := strings.CutSuffix(field, "_enc")
		if !ok {
			continue
		}
		if !nameForm.MatchString(name) {
			return nonsense(fmt.Sprintf("the server's answer has a secret of the name %.80q", name), nil)
		}
		var text string
		if err := json.Unmarshal(value, &text); err != nil {
			return nonsense("secret "+name+" is not an envelope", nil)
		}
		opened, err := envelope.Open(c.key.private, []byte(text))
		if err != nil {
			return nonsense("secret "+name, err)
		}
		all = append(all, secret{name, opened})
		if len(all) > maxSecrets {
			return nonsense(fmt.Sprintf("the server's answer has more than %d secrets", maxSecrets), nil)
		}
	}
	slices.SortFunc(all, func(a, b secret) int { return strings.Compare(a.name, b.name) })
	return all, nil
}
