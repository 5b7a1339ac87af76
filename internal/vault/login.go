package vault

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/http"
	"strings"
	"sync"
	"time"

	"github.com/go-json-experiment/json"
	"github.com/google/uuid"
	"github.com/hashicorp/vault/api"

	"github.com/orgkeys/orgkeys/internal/orgkey"
	"github.com/orgkeys/orgkeys/internal/privatefile"
)

// ErrLogin: Vault refused the login, or the credentials are missing or not protected.
// Repeating it does not help until something is changed.
var ErrLogin = errors.New("cannot log in to Vault")

// A login that was answered, and gave nothing that can be used. Both wrap ErrLogin.
var (
	// errSameToken: the login that should replace a token gave that very token.
	errSameToken = fmt.Errorf("%w: the login was answered with the old token, by a cache between orgkeys and Vault", ErrLogin)
	// errUnaccepted: Vault does not accept the token that a login just gave.
	errUnaccepted = fmt.Errorf("%w: Vault issued a new token and does not accept it from this address", ErrLogin)
)

const (
	loginPause      = 500 * time.Millisecond // at least, between two failed logins
	maxLoginPause   = 5 * time.Second
	maxUselessPause = 30 * time.Second // between two logins that were answered and gave nothing
	tokenFilePoll   = 2 * time.Second
	maxCredential   = 4 << 10
)

// Login gets a token. Its implementations are AppRole and TokenFile.
type Login interface {
	check() error
	// get returns a session that is not stale, which is the one it replaces or nil.
	get(ctx context.Context, base *api.Client, stale *session) (*session, error)
}

// session is one token, in a client that is never changed.
type session struct {
	api    *api.Client
	token  string
	secret *api.Secret   // the login's answer; nil if another program renews the token
	file   string        // where the token was read, if it was
	ended  chan struct{} // closed when another session has taken its place
	mark   string        // of the credentials that it came of

	between string // what the login's answer says of who gave it in Vault's stead
}

func newSession(base *api.Client, token string) (*session, error) {
	client, err := base.Clone()
	if err != nil {
		return nil, fmt.Errorf("copying the Vault client: %w", err)
	}
	client.SetToken(token)
	client.SetWrappingLookupFunc(unwrapped)
	return &session{api: client, token: token, ended: make(chan struct{})}, nil
}

// unwrapped makes Vault answer without wrapping, regardless of VAULT_WRAP_TTL.
func unwrapped(string, string) string { return "" }

// AppRole logs in with a role ID and a secret ID. Both files are read again at each login.
type AppRole struct {
	Mount        string // of the auth method; "approle" when empty
	RoleIDFile   string
	SecretIDFile string
	// WrappedAt, if set, says that SecretIDFile holds a wrapping token that was
	// created at this path, as auth/approle/role/orgkeys/secret-id. That is
	// checked before the token is used up, so that nobody can put a secret ID of
	// their own in its place unseen.
	WrappedAt string

	mu          sync.Mutex
	unwrappedBy string // the wrapping token that gave secretID
	secretID    string
	refused     refusal
}

// refusal is the last login that Vault refused.
type refusal struct {
	credentials string
	times       int
	until       time.Time
	err         error
}

// refusedPause is how long credentials that Vault refused that many times are
// not tried again. Where Vault locks a role ID out, five refusals do, unless
// there are fifteen minutes between two of them.
func refusedPause(times int) time.Duration {
	pauses := []time.Duration{5 * time.Second, time.Minute, 4 * time.Minute, 16 * time.Minute}
	return pauses[min(times, len(pauses))-1]
}

// again reports the refusal while the same credentials are not to be tried again.
func (r *refusal) again(credentials string) error {
	if r.credentials != credentials || !time.Now().Before(r.until) {
		return nil
	}
	return r.err
}

// note stores the refusal, with the time until the next attempt.
func (r *refusal) note(credentials string, err error) error {
	times := 1
	if r.credentials == credentials {
		times += r.times
	}
	until := time.Now().Add(refusedPause(times))
	err = fmt.Errorf("%w (a running server tries again when the files change, and after %s)", err, until.UTC().Format(time.RFC3339))
	*r = refusal{credentials, times, until, err}
	return err
}

func (a *AppRole) check() error {
	if _, err := readFile(a.RoleIDFile, privatefile.Everybody); err != nil {
		return fmt.Errorf("reading the role ID: %w", err)
	}
	if _, err := readFile(a.SecretIDFile, privatefile.Group); err != nil {
		return fmt.Errorf("reading the secret ID: %w", err)
	}
	return nil
}

func (a *AppRole) get(ctx context.Context, base *api.Client, _ *session) (*session, error) {
	roleID, err := readFile(a.RoleIDFile, privatefile.Everybody)
	if err != nil {
		return nil, fmt.Errorf("reading the role ID: %w", err)
	}
	secretID, err := readFile(a.SecretIDFile, privatefile.Group)
	if err != nil {
		return nil, fmt.Errorf("reading the secret ID: %w", err)
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	credentials := roleID + "\n" + secretID
	if err := a.refused.again(credentials); err != nil {
		return nil, err
	}
	s, err := a.logIn(ctx, base, roleID, secretID)
	switch {
	case errors.Is(err, ErrLogin):
		err = a.refused.note(credentials, err)
	case err == nil:
		a.refused = refusal{}
	}
	return s, err
}

func (a *AppRole) logIn(ctx context.Context, base *api.Client, roleID, secretID string) (_ *session, err error) {
	if a.WrappedAt != "" {
		if secretID, err = a.unwrap(ctx, base, secretID); err != nil {
			return nil, err
		}
	}
	path := "auth/" + cmp.Or(a.Mount, "approle") + "/login"
	secret, header, err := exchange(ctx, base, path, map[string]any{"role_id": roleID, "secret_id": secretID})
	if err != nil {
		if errors.Is(err, ErrLogin) && a.WrappedAt == "" && strings.HasPrefix(secretID, "hvs.") {
			err = fmt.Errorf("%w: %s looks like it holds a wrapping token: then set ORGKEYS_VAULT_SECRET_ID_PATH=auth/approle/role/orgkeys/secret-id", err, a.SecretIDFile)
		}
		return nil, err
	}
	if secret.Auth == nil || secret.Auth.ClientToken == "" {
		return nil, notVaults(path, errors.New("it holds no token"))
	}
	s, err := newSession(base, secret.Auth.ClientToken)
	if err != nil {
		return nil, err
	}
	s.secret, s.between, s.mark = secret, between(header), credentialMark(roleID, secretID)
	return s, nil
}

// exchange sends one of the calls of a login, and distinguishes a refusal from an
// unreachable Vault.
func exchange(ctx context.Context, client *api.Client, path string, fields map[string]any) (*api.Secret, http.Header, error) {
	body, err := json.Marshal(fields)
	if err != nil {
		return nil, nil, fmt.Errorf("encoding the call to %s: %w", path, err)
	}
	answer, err := ask(ctx, client, request{method: http.MethodPut, path: path, body: body})
	defer clear(answer.body)
	switch {
	case errors.Is(err, orgkey.ErrUnavailable):
		return nil, nil, err
	case err != nil:
		return nil, nil, fmt.Errorf("%w: %w", ErrLogin, err)
	}
	secret, err := api.ParseSecret(bytes.NewReader(answer.body))
	if err == nil && secret == nil {
		err = errors.New("it is empty")
	}
	if err != nil {
		return nil, nil, notVaults(path, err)
	}
	return secret, answer.header, nil
}

// notVaults is an answer that Vault does not give: something in between does.
func notVaults(path string, why error) error {
	return fmt.Errorf("reading the answer to %s, which is not Vault's: %w: %w", path, orgkey.ErrUnavailable, why)
}

// between is what an answer says of who gave it in Vault's stead.
func between(h http.Header) string {
	var said []string
	for _, name := range []string{"X-Cache", "Via", "Age", "Server"} {
		if value := h.Get(name); value != "" {
			said = append(said, fmt.Sprintf("%s: %.60q", name, value))
		}
	}
	return strings.Join(said, ", ")
}

func (a *AppRole) unwrap(ctx context.Context, base *api.Client, wrapping string) (string, error) {
	if a.unwrappedBy == wrapping {
		return a.secretID, nil
	}
	const lookup = "sys/wrapping/lookup"
	info, _, err := exchange(ctx, base, lookup, map[string]any{"token": wrapping})
	if err != nil {
		return "", fmt.Errorf("looking up the wrapped secret ID, which may have expired, or may have been used already, for example by an orgkeys command with the server's file: "+
			"deliver a new one, and if nobody you know used it, revoke the old one: %w", err)
	}
	if path, _ := info.Data["creation_path"].(string); path != a.WrappedAt {
		return "", fmt.Errorf("%w: the wrapping token was made by %q, not by %q: it was replaced", ErrLogin, path, a.WrappedAt)
	}
	// The wrapping token authenticates its own use, in a client of its own.
	using, err := newSession(base, wrapping)
	if err != nil {
		return "", err
	}
	secret, _, err := exchange(ctx, using.api, "sys/wrapping/unwrap", nil)
	if err != nil {
		return "", fmt.Errorf("unwrapping the secret ID: %w", err)
	}
	id, _ := secret.Data["secret_id"].(string)
	if id == "" {
		return "", fmt.Errorf("%w: the wrapping token holds no secret ID", ErrLogin)
	}
	a.unwrappedBy, a.secretID = wrapping, id
	return id, nil
}

// TokenFile reads the token from a file that another program, such as Vault Agent, keeps
// current, and follows its changes.
type TokenFile struct{ Path string }

func (f *TokenFile) check() error {
	if _, err := readFile(f.Path, privatefile.Group); err != nil {
		return fmt.Errorf("reading the token: %w", err)
	}
	return nil
}

func (f *TokenFile) get(_ context.Context, base *api.Client, stale *session) (*session, error) {
	token, err := readFile(f.Path, privatefile.Group)
	if err != nil {
		return nil, fmt.Errorf("reading the token: %w", err)
	}
	if stale != nil && stale.token == token {
		return nil, fmt.Errorf("%w: Vault does not accept the token in %s any more, and the file has not changed: has the token expired, may it be used from this address, is Vault Agent running?", ErrLogin, f.Path)
	}
	s, err := newSession(base, token)
	if err != nil {
		return nil, err
	}
	s.file, s.mark = f.Path, credentialMark(token)
	return s, nil
}

// readFile reads a credential, which is one word.
func readFile(path string, r privatefile.Readers) (string, error) {
	b, err := privatefile.Read(path, maxCredential, r)
	if err != nil {
		return "", fmt.Errorf("%w: %w", ErrLogin, err)
	}
	defer clear(b)
	text := strings.TrimSpace(string(b))
	switch words := strings.Fields(text); {
	case strings.HasPrefix(text, "{"):
		return "", fmt.Errorf("%w: %s holds JSON, not the bare value: a sink of Vault Agent with wrap_ttl or dh_type writes tokens like this; remove those options", ErrLogin, path)
	case len(words) == 0:
		return "", fmt.Errorf("%w: %s is empty", ErrLogin, path)
	case len(words) == 1:
		return words[0], nil
	}
	return "", fmt.Errorf("%w: %s holds more than one word", ErrLogin, path)
}

// loginRemedy says what to do after a login that failed.
func loginRemedy(err error) string {
	status, answered := errors.AsType[*statusError](err)
	switch {
	case errors.Is(err, errSameToken):
		return leadPastCache
	case errors.Is(err, errUnaccepted):
		return boundAddresses
	case answered && status.status == http.StatusForbidden:
		return lockedOut
	case errors.Is(err, ErrLogin):
		return mendLogin
	}
	return slowVault + "; after a 500, make sure that every audit device can be written"
}

// failure is the last login that failed.
type failure struct {
	at    time.Time
	pause time.Duration // before the next attempt
	err   error
}

// next is the failure after f, with a longer pause.
func (f failure) next(err error) failure {
	pause := loginPause
	if errors.Is(err, errSameToken) || errors.Is(err, errUnaccepted) {
		pause = min(2*max(f.pause, loginPause), maxUselessPause)
	}
	return failure{time.Now(), pause, err}
}

func (c *Client) session(ctx context.Context) (*session, error) {
	if s := c.current.Load(); s != nil {
		return s, nil
	}
	return c.replace(ctx, nil)
}

// replace logs in, unless another session has taken stale's place already. It
// waits for a login under way, and does not repeat one that just failed. The
// error always wraps orgkey.ErrUnavailable: without a login nothing can be asked.
func (c *Client) replace(ctx context.Context, stale *session) (*session, error) {
	select {
	case c.login <- struct{}{}:
		defer func() { <-c.login }()
	case <-ctx.Done():
		return nil, fmt.Errorf("waiting for a login: %w: %w", orgkey.ErrUnavailable, ctx.Err())
	}
	if s := c.current.Load(); s != stale {
		return s, nil
	}
	if time.Since(c.failure.at) < c.failure.pause {
		return nil, c.failure.err
	}
	bounded, cancel := context.WithTimeout(ctx, c.config.CallTimeout)
	defer cancel()
	s, err := c.logIn(bounded, stale)
	if err != nil {
		err = fmt.Errorf("logging in: %w: %w", orgkey.ErrUnavailable, err)
		if ctx.Err() == nil {
			c.failure = c.failure.next(err)
		}
		return nil, err
	}
	c.failure = failure{}
	c.current.Store(s)
	if stale != nil {
		close(stale.ended)
	}
	c.log.Info("logged in to Vault")
	return s, nil
}

// logIn gets a session that can take the place of stale, if there is one. A
// cache between orgkeys and Vault may answer with a token that has ended: then
// it is asked once more, by a request that no cache has seen.
func (c *Client) logIn(ctx context.Context, stale *session) (*session, error) {
	ctx = context.WithValue(ctx, correlationKey{}, nil) // the login is not the key's that it is made for
	s, err := c.config.Login.get(ctx, c.base, stale)
	if err != nil || stale == nil {
		return s, err
	}
	useless := c.useless(ctx, s, stale)
	if useless == nil {
		return s, nil
	}
	if s.between != "" {
		c.log.Warn("a login returned an expired token, from a cache between orgkeys and Vault; bypassing the cache", "answer", s.between, "remedy", leadPastCache)
	}
	if s, err = c.config.Login.get(WithCorrelation(ctx, uuid.NewString()), c.base, stale); err != nil {
		return nil, err
	}
	return s, c.useless(ctx, s, stale)
}

// useless reports why s cannot take the place of stale. A token that cannot be
// tried at the moment passes.
func (c *Client) useless(ctx context.Context, s, stale *session) error {
	why := error(nil)
	if s.token == stale.token {
		why = errSameToken
	} else if accepted, err := c.accepted(ctx, s); err == nil && !accepted {
		why = errUnaccepted
	}
	if why != nil && s.between != "" {
		return fmt.Errorf("%w (the answer has %s)", why, s.between)
	}
	return why
}

// stayLoggedIn replaces each session before it ends, so that no call needs to
// wait for a login, and keeps trying while Vault is away.
func (c *Client) stayLoggedIn(ctx context.Context) {
	defer close(c.stopped)
	for ctx.Err() == nil {
		stale := c.current.Load()
		if stale != nil {
			c.watch(ctx, stale)
		}
		c.replacePatiently(ctx, stale)
	}
}

func (c *Client) replacePatiently(ctx context.Context, stale *session) {
	wait, said := loginPause, ""
	for ctx.Err() == nil && c.current.Load() == stale {
		_, err := c.replace(ctx, stale)
		if err == nil {
			return
		}
		if text := err.Error(); ctx.Err() == nil && text != said {
			c.log.Warn("logging in to Vault", "error", err)
			said = text
		}
		pause(ctx, wait+rand.N(wait/2))
		wait = min(2*wait, maxLoginPause)
	}
}

// watch returns when s should be replaced, or has been, or ctx ends.
func (c *Client) watch(ctx context.Context, s *session) {
	if s.secret == nil {
		watchFile(ctx, s)
		return
	}
	renewing, err := s.api.Clone()
	if err != nil {
		c.log.Error("copying the Vault client", "error", err)
		pause(ctx, maxLoginPause)
		return
	}
	renewing.SetToken(s.token)
	renewing.SetWrappingLookupFunc(unwrapped)
	renewing.SetClientTimeout(c.config.CallTimeout)
	watcher, err := renewing.NewLifetimeWatcher(&api.LifetimeWatcherInput{Secret: s.secret})
	if err != nil {
		c.log.Error("watching the token's lifetime", "error", err)
		pause(ctx, maxLoginPause)
		return
	}
	go watcher.Start()
	defer watcher.Stop()
	for {
		select {
		case <-watcher.RenewCh():
		case err := <-watcher.DoneCh():
			if err != nil {
				c.log.Warn("renewing the Vault token", "error", err)
			}
			return
		case <-s.ended:
			return
		case <-ctx.Done():
			return
		}
	}
}

func watchFile(ctx context.Context, s *session) {
	poll := time.NewTicker(tokenFilePoll)
	defer poll.Stop()
	for {
		select {
		case <-poll.C:
			if token, err := readFile(s.file, privatefile.Group); err == nil && token != s.token {
				return
			}
		case <-s.ended:
			return
		case <-ctx.Done():
			return
		}
	}
}

func pause(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-ctx.Done():
	}
}
