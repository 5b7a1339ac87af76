package vault

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"regexp"
	"strings"
	"time"

	"github.com/hashicorp/vault/api"

	"github.com/orgkeys/orgkeys/internal/orgkey"
)

// Errors, in addition to those of package orgkey.
var (
	// ErrDenied: Vault accepts the token, but its policies do not allow the call.
	ErrDenied = errors.New("the policy in Vault does not allow it")
	// errNotFound: there is no such key, entry or mount.
	errNotFound = errors.New("not found in Vault")
)

// statusError is an answer other than success.
type statusError struct {
	request  request
	status   int
	messages []string
	foreign  bool   // not of Vault's form: it comes from something in between
	location string // of a redirect that was not followed
}

func newStatusError(r request, refused *api.ResponseError) *statusError {
	return &statusError{request: r, status: refused.StatusCode, messages: refused.Errors, foreign: refused.RawError}
}

// newRedirectError names the host of a redirect and nothing else of its place,
// which may hold what the caller should not log.
func newRedirectError(r request, answer *http.Response) *statusError {
	host := "a target that cannot be read"
	if u, err := answer.Location(); err == nil && u.Host != "" {
		host = u.Scheme + "://" + u.Host
	}
	return &statusError{request: r, status: answer.StatusCode, foreign: true, location: host}
}

// Statuses by which sys/health, and a load balancer that asks it, tells what kind of
// node answers (https://developer.hashicorp.com/vault/api-docs/system/health).
const (
	statusRecovery    = 472
	statusPerformance = 473
)

var standby = map[int]string{
	statusRecovery:    "this Vault is the secondary of a disaster-recovery pair and answers nothing until it is promoted: let VAULT_ADDR lead to the primary cluster, or promote this one",
	statusPerformance: "this node is a performance standby, and what is in between does not let requests pass to it: let the load balancer's check ask for sys/health?perfstandbyok=true, or VAULT_ADDR lead to the active node",
}

func redirect(status int) bool { return status >= 300 && status < 400 }

func (e *statusError) Error() string {
	if redirect(e.status) {
		return fmt.Sprintf("Vault answered %s %s with %d, a redirect to %s, which is not followed: let VAULT_ADDR lead to the active node, "+
			"through a load balancer that checks sys/health, and make sure that every node's api_addr is reachable from here", e.request.method, e.request.path, e.status, e.location)
	}
	said := strings.Join(e.messages, "; ")
	if words, ok := standby[e.status]; ok {
		said = words
	}
	return fmt.Sprintf("Vault answered %s %s with %d: %s", e.request.method, e.request.path, e.status, said)
}

func (e *statusError) Unwrap() error {
	switch {
	case e.foreign, standby[e.status] != "":
		return orgkey.ErrUnavailable
	case e.status == http.StatusForbidden:
		return ErrDenied
	case e.status == http.StatusNotFound:
		return errNotFound
	case e.status >= 500, e.status == http.StatusTooManyRequests, e.status == http.StatusPreconditionFailed:
		return orgkey.ErrUnavailable
	}
	return nil
}

func badRequest(err error) bool {
	e, ok := errors.AsType[*statusError](err)
	return ok && e.status == http.StatusBadRequest && !e.foreign
}

// unavailable says that Vault could not be asked; the reason stays findable.
func unavailable(r request, err error) error {
	return fmt.Errorf("asking Vault for %s %s: %w: %w", r.method, r.path, orgkey.ErrUnavailable, err)
}

type correlationKey struct{}

var correlationForm = regexp.MustCompile(`^[A-Za-z0-9-]{1,128}$`)

// WithCorrelation returns a context whose calls carry id, the key's or the
// request's, to Vault as X-Correlation-Id, which its audit device records in
// clear. An id of another form than [A-Za-z0-9-]{1,128} is left out.
func WithCorrelation(ctx context.Context, id string) context.Context {
	if !correlationForm.MatchString(id) {
		return ctx
	}
	return context.WithValue(ctx, correlationKey{}, id)
}

func correlated(ctx context.Context, fallback string) context.Context {
	if ctx.Value(correlationKey{}) != nil {
		return ctx
	}
	return WithCorrelation(ctx, fallback)
}

type onceKey struct{}

// once returns a context whose calls are not sent again after a failure. The
// exception is do's, after Vault refused one without doing it.
func once(ctx context.Context) context.Context { return context.WithValue(ctx, onceKey{}, true) }

// again is the client's policy of repeating calls.
func again(ctx context.Context, answer *http.Response, err error) (bool, error) {
	if ctx.Value(onceKey{}) != nil {
		return false, err
	}
	return api.DefaultRetryPolicy(ctx, answer, err)
}

// request is one call. Its body is JSON.
type request struct {
	method string
	path   string // below /v1/
	query  url.Values
	body   []byte
}

type response struct {
	status int
	body   []byte
	header http.Header
	date   time.Time // by Vault's clock; zero if it gave none
}

// do sends r with the current token. A token that Vault no longer accepts is
// replaced, and r sent again.
func (c *Client) do(ctx context.Context, r request) (response, error) {
	s, err := c.session(ctx)
	if err != nil {
		return response{}, err
	}
	answer, err := c.send(ctx, s, r)
	if !errors.Is(err, ErrDenied) {
		return answer, err
	}
	if accepted, lookupErr := c.accepted(ctx, s); accepted || lookupErr != nil {
		return answer, errors.Join(err, lookupErr)
	}
	if s, err = c.replace(ctx, s); err != nil {
		return response{}, err
	}
	return c.send(ctx, s, r)
}

// accepted reports whether the token is still good. A 403 to anything else
// does not say whether the token or the policy is at fault.
func (c *Client) accepted(ctx context.Context, s *session) (bool, error) {
	_, err := c.send(ctx, s, request{method: http.MethodGet, path: "auth/token/lookup-self"})
	if errors.Is(err, ErrDenied) {
		return false, nil
	}
	return err == nil, err
}

// send makes one call within the call timeout. The answer has a body
// whenever one was read, even with an error; a caller that expects a secret in it clears
// it.
func (c *Client) send(ctx context.Context, s *session, r request) (response, error) {
	ctx, cancel := context.WithTimeout(ctx, c.config.CallTimeout)
	defer cancel()
	return ask(ctx, s.api, r)
}

// ask makes one call. Every call to Vault but a token's renewal goes through it,
// since the Vault client takes a redirect that it does not follow for a success.
func ask(ctx context.Context, client *api.Client, r request) (response, error) {
	raw, err := dispatch(ctx, client, r)
	if raw != nil {
		defer raw.Body.Close()
		if redirect(raw.StatusCode) {
			return response{}, newRedirectError(r.plain(), raw.Response)
		}
	}
	var refused *api.ResponseError
	if err != nil && !errors.As(err, &refused) {
		return response{}, unavailable(r, err)
	}
	body, readErr := readAll(raw.Body)
	date, _ := http.ParseTime(raw.Header.Get("Date"))
	answer := response{raw.StatusCode, body, raw.Header, date}
	if refused != nil {
		return answer, newStatusError(r.plain(), refused)
	}
	if readErr != nil {
		clear(body)
		return response{}, unavailable(r, readErr)
	}
	return answer, nil
}

// plain is r without what may be secret.
func (r request) plain() request { return request{method: r.method, path: r.path} }

func dispatch(ctx context.Context, client *api.Client, r request) (*api.Response, error) {
	id, _ := ctx.Value(correlationKey{}).(string)
	logical := client.WithRequestCallbacks(func(q *api.Request) {
		if id != "" {
			q.Headers.Set(correlationID, id)
		}
		q.Headers.Set("User-Agent", "orgkeys")
		if r.body != nil {
			q.Obj = json.RawMessage(r.body) // what the client sends again to where a standby redirects it
		}
	}).Logical()
	switch r.method {
	case http.MethodGet:
		return logical.ReadRawWithDataWithContext(ctx, r.path, r.query)
	case http.MethodPut:
		return logical.WriteRawWithContext(ctx, r.path, r.body)
	case http.MethodDelete:
		return logical.DeleteRawWithContext(ctx, r.path)
	}
	return nil, fmt.Errorf("method %s is not used with Vault", r.method)
}

// readAll reads r to its end and leaves no second copy of what it read: a
// buffer that became too small is cleared.
func readAll(r io.Reader) ([]byte, error) {
	buf := make([]byte, 0, 8<<10)
	for {
		n, err := r.Read(buf[len(buf):cap(buf)])
		buf = buf[:len(buf)+n]
		if err == io.EOF {
			return buf, nil
		}
		if err == nil && len(buf) >= maxBody {
			err = fmt.Errorf("the answer exceeds %d bytes", maxBody)
		}
		if err != nil {
			return buf, err
		}
		if len(buf) == cap(buf) {
			larger := make([]byte, len(buf), 2*cap(buf))
			copy(larger, buf)
			clear(buf)
			buf = larger
		}
	}
}
