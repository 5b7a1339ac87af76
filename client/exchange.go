package client

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"mime"
	"net/http"
	"net/http/httptrace"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"github.com/go-json-experiment/json"
)

// ErrRequest means that a request could not be made from what was given.
var ErrRequest = errors.New("making the request")

// request is one call of the API.
type request struct {
	method string
	path   string
	accept string // media type; application/json if empty
	token  bool   // whether it goes with the bearer token
	limit  int64  // bytes of the answer; maxAnswer if 0
	typ    string // of the body
	status int    // of a success; 200 if 0
	// body is asked for each attempt: signed ones hold the present time.
	body func() ([]byte, error)
	// read takes what it needs from an answer that is a success. Its error says that
	// something other than orgkeys answered.
	read func(*answer) error
	// temporary replaces Temporary for calls that are not repeated after every failure.
	temporary func(error) bool
}

// answer is a response, read within bounds.
type answer struct {
	status      int
	header      http.Header
	body        []byte
	retryAfter  time.Duration
	clockOffset time.Duration
}

// do sends r as often as Config.Retry allows, until an answer was read.
func (c *Client) do(ctx context.Context, r request) error {
	retry := c.config.Retry
	if r.temporary != nil {
		retry.Temporary = r.temporary
	}
	waiting := retry.Waiting
	retry.Waiting = func(err error, pause time.Duration) {
		// An idle connection would take a place on the server that another
		// client may need.
		c.CloseIdleConnections()
		if waiting != nil {
			waiting(err, pause)
		}
	}
	return retry.Do(ctx, func(ctx context.Context) error { return c.attempt(ctx, r) })
}

func (c *Client) attempt(ctx context.Context, r request) error {
	ctx, cancel := context.WithTimeout(ctx, c.config.Attempt)
	defer cancel()
	req, err := c.build(ctx, r)
	if err != nil {
		return &unsentError{err}
	}
	var connected atomic.Bool
	req = req.WithContext(httptrace.WithClientTrace(ctx, &httptrace.ClientTrace{GotConn: func(httptrace.GotConnInfo) { connected.Store(true) }}))
	sent := time.Now()
	resp, err := c.http.Do(req)
	if err != nil && !connected.Load() {
		return &unsentError{err}
	}
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	a := &answer{
		status: resp.StatusCode, header: resp.Header,
		retryAfter: parseRetryAfter(resp.Header), clockOffset: clockOffset(resp.Header, sent, time.Now()),
	}
	if a.body, err = readBody(resp, max(r.limit, maxAnswer)); err != nil {
		return a.unreadable(err)
	}
	if a.status != cmp.Or(r.status, http.StatusOK) {
		return a.refusal()
	}
	return r.read(a)
}

func (c *Client) build(ctx context.Context, r request) (*http.Request, error) {
	var body []byte
	if r.body != nil {
		var err error
		body, err = r.body()
		if errors.Is(err, ErrKeyFailed) {
			return nil, err
		}
		if err != nil {
			return nil, fmt.Errorf("%w: %w", ErrRequest, err)
		}
	}
	req, err := http.NewRequestWithContext(ctx, r.method, c.base+r.path, bytes.NewReader(body))
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrRequest, err)
	}
	if body == nil {
		req.Body, req.GetBody = http.NoBody, nil
	}
	req.Header.Set("User-Agent", c.config.UserAgent)
	req.Header.Set("Accept", "application/json")
	if r.accept != "" {
		req.Header.Set("Accept", r.accept)
	}
	if r.typ != "" {
		req.Header.Set("Content-Type", r.typ)
	}
	return req, c.authorize(ctx, req, r)
}

func (c *Client) authorize(ctx context.Context, req *http.Request, r request) error {
	if !r.token {
		return nil
	}
	if c.config.Token == nil {
		return fmt.Errorf("%w: Config.Token is not set", ErrRequest)
	}
	token, err := c.config.Token(ctx)
	if err != nil {
		return fmt.Errorf("getting a token: %w", err)
	}
	req.Header.Set("Authorization", "Bearer "+token)
	return nil
}

// unsentError is an error before there was a connection: no server has the request.
type unsentError struct{ error }

func (e *unsentError) Unwrap() error { return e.error }

// Unsent reports whether a call failed before there was a connection that it could be sent
// over: no server got it, so nothing came of it.
func Unsent(err error) bool {
	_, unsent := errors.AsType[*unsentError](err)
	return unsent || errors.Is(err, ErrRequest)
}

var errTooLong = errors.New("too long")

// listBegins is how the API's lists begin. Something in between that answers without
// end is not taken for one.
const listBegins = `{"success":true,`

// tooLong is the error for an answer longer than limit, of which body is the beginning.
func tooLong(body []byte, limit int64) error {
	if limit == maxList && bytes.HasPrefix(body, []byte(listBegins)) {
		return fmt.Errorf("%w: more than %d MiB", ErrListTooLong, limit>>20)
	}
	return errTooLong
}

// readBody reads into one buffer that grows without leaving copies behind: what
// it holds may be a private key.
func readBody(resp *http.Response, limit int64) ([]byte, error) {
	if resp.ContentLength > limit {
		begin := make([]byte, len(listBegins))
		n, _ := io.ReadFull(resp.Body, begin) // what did not come is no list's beginning
		return nil, tooLong(begin[:n], limit)
	}
	body := make([]byte, 0, max(resp.ContentLength, 0)+512)
	for {
		if len(body) == cap(body) {
			grown := append(make([]byte, 0, 2*cap(body)), body...)
			clear(body)
			body = grown
		}
		n, err := resp.Body.Read(body[len(body):cap(body)])
		body = body[:len(body)+n]
		switch {
		case int64(len(body)) > limit:
			err := tooLong(body, limit)
			clear(body)
			return nil, err
		case err == io.EOF:
			return body, nil
		case err != nil:
			clear(body)
			return nil, err
		}
	}
}

func (a *answer) unreadable(err error) error {
	if errors.Is(err, errTooLong) {
		return a.foreign("longer than any answer of orgkeys")
	}
	if errors.Is(err, ErrListTooLong) {
		return err
	}
	return fmt.Errorf("reading the answer: %w", err)
}

// wantType reports an answer whose media type is not the one that orgkeys gives it.
func (a *answer) wantType(want string) error {
	text := a.header.Get("Content-Type")
	if got, _, err := mime.ParseMediaType(text); err == nil && got == want {
		return nil
	}
	if text == "" {
		return a.foreign("without a Content-Type")
	}
	return a.foreign(fmt.Sprintf("of Content-Type %.80q", text))
}

// decode reads an answer of status 200 into v, and checks that it is one of orgkeys.
func (a *answer) decode(v any) error {
	if err := a.wantType("application/json"); err != nil {
		return err
	}
	if err := json.Unmarshal(a.body, v); err != nil {
		return a.foreign("JSON of another form")
	}
	return nil
}

// done reads an answer that only confirms success, with a message that begins so.
// Gateways answer 200 and success as well. Without this check a node would count as
// registered, or a key as received or deleted, although orgkeys never got the request.
func done(message string) func(*answer) error {
	return func(a *answer) error {
		var body struct {
			Success bool   `json:"success"`
			Message string `json:"message"`
		}
		if err := a.decode(&body); err != nil {
			return err
		}
		if !body.Success || !strings.HasPrefix(body.Message, message) {
			return a.foreign(fmt.Sprintf("JSON without success and the message %q", message))
		}
		return nil
	}
}

// parseRetryAfter reads seconds or a date (RFC 9110, 10.2.3). A date is by the
// clock of whoever sent it.
func parseRetryAfter(h http.Header) time.Duration {
	text := h.Get("Retry-After")
	if seconds, err := strconv.ParseUint(text, 10, 31); err == nil {
		return min(time.Duration(seconds)*time.Second, longestWait)
	}
	at, err := http.ParseTime(text)
	if err != nil {
		return 0
	}
	now, err := http.ParseTime(h.Get("Date"))
	if err != nil {
		now = time.Now()
	}
	return min(max(at.Sub(now), 0), longestWait)
}

func clockOffset(h http.Header, sent, received time.Time) time.Duration {
	date, err := http.ParseTime(h.Get("Date"))
	if err != nil {
		return 0
	}
	return sent.Add(received.Sub(sent) / 2).Sub(date)
}
