package authn

import (
	"compress/gzip"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"strings"

	"github.com/go-json-experiment/json"
)

// maxJWKS is the size of the largest set accepted, in bytes.
const maxJWKS = 1 << 20

func isURL(location string) bool { return strings.Contains(location, "://") }

// fileReader reads the set from a file. It is read whole each time: that is
// cheaper than being wrong about whether it changed.
func fileReader(path string) func(context.Context) ([]byte, error) {
	return func(context.Context) ([]byte, error) {
		b, err := readGuarded(path)
		if err != nil {
			return nil, fmt.Errorf("reading the JWK set: %w", err)
		}
		return b, nil
	}
}

// readGuarded reads a file that says whose tokens are accepted.
func readGuarded(path string) ([]byte, error) {
	info, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() {
		return nil, fmt.Errorf("%s is not a file", path)
	}
	if info.Mode().Perm()&0o002 != 0 {
		return nil, fmt.Errorf("%s may be written by everybody, who could then make tokens: chmod o-w %s", path, path)
	}
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close() // opened for reading: nothing can be lost
	return readAtMost(f)
}

// remote reads the set from an https URL, or from the one that the issuer's
// metadata names if location is empty.
func remote(location string, c KeySetConfig) (func(context.Context) ([]byte, error), error) {
	get := getter{caFile: c.CAFile}
	if _, err := get.client(); err != nil {
		return nil, err
	}
	if location != "" {
		u, err := httpsURL("the JWK set's URL", location)
		return func(ctx context.Context) ([]byte, error) { return get.get(ctx, "the JWK set", u) }, err
	}
	if _, err := httpsURL("the issuer", c.Issuer); err != nil {
		return nil, fmt.Errorf("the issuer's keys cannot be found through its metadata: %w", err)
	}
	return func(ctx context.Context) ([]byte, error) {
		metadata, err := discover(ctx, get, c.Issuer)
		if err != nil {
			return nil, err
		}
		u, err := httpsURL("jwks_uri of the issuer's metadata", metadata.JWKS)
		if err != nil {
			return nil, err
		}
		return get.get(ctx, "the JWK set", u)
	}, nil
}

// httpsURL checks that an address is one to fetch keys from.
func httpsURL(what, address string) (string, error) {
	u, err := url.Parse(address)
	if err != nil {
		return "", fmt.Errorf("%s is malformed", what)
	}
	if u.Scheme != "https" || u.Hostname() == "" {
		return "", fmt.Errorf("%s must be https, not %s", what, u.Redacted())
	}
	if u.User != nil || u.Fragment != "" {
		return "", fmt.Errorf("%s must have neither user information nor a fragment", what)
	}
	return u.String(), nil
}

// getter fetches documents of a provider. Redirects are not followed: they
// would let whoever can plant one choose the keys.
type getter struct {
	caFile string // read for every request, since the next one is minutes away; empty: the system's authorities
}

func (g getter) client() (*http.Client, error) {
	tlsConfig := &tls.Config{MinVersion: tls.VersionTLS12}
	if g.caFile != "" {
		b, err := readGuarded(g.caFile)
		if err != nil {
			return nil, fmt.Errorf("reading the CA file: %w", err)
		}
		tlsConfig.RootCAs = x509.NewCertPool()
		if !tlsConfig.RootCAs.AppendCertsFromPEM(b) {
			return nil, fmt.Errorf("reading the CA file: %s has no certificate in PEM", g.caFile)
		}
	}
	return &http.Client{
		Transport: &http.Transport{
			Proxy:                  http.ProxyFromEnvironment,
			TLSClientConfig:        tlsConfig,
			DisableCompression:     true, // so that the size limit holds for what is decoded
			DisableKeepAlives:      true,
			MaxResponseHeaderBytes: 64 << 10,
		},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}, nil
}

// statusError is an answer that is not the document.
type statusError struct {
	what     string
	status   int
	location string
}

func (e *statusError) Error() string {
	if e.location != "" {
		return fmt.Sprintf("fetching %s: the provider answered with status %d and leads to %q; redirects are not followed, so give that address if you trust it", e.what, e.status, e.location)
	}
	return fmt.Sprintf("fetching %s: the provider answered with status %d", e.what, e.status)
}

func (g getter) get(ctx context.Context, what, location string) ([]byte, error) {
	client, err := g.client()
	if err != nil {
		return nil, err
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, location, nil)
	if err != nil {
		return nil, fmt.Errorf("fetching %s: %w", what, err)
	}
	req.Header.Set("Accept", "application/jwk-set+json, application/json")
	req.Header.Set("Accept-Encoding", "identity")
	resp, err := client.Do(req)
	if err != nil {
		return nil, fmt.Errorf("fetching %s: %w", what, err)
	}
	defer resp.Body.Close() // read to its end or given up
	if resp.StatusCode != http.StatusOK {
		return nil, &statusError{what, resp.StatusCode, resp.Header.Get("Location")}
	}
	body, err := plainBody(resp)
	if err != nil {
		return nil, fmt.Errorf("fetching %s: %w", what, err)
	}
	return readAtMost(body)
}

// plainBody undoes gzip, which some servers apply without being asked.
func plainBody(resp *http.Response) (io.Reader, error) {
	switch encoding := strings.ToLower(resp.Header.Get("Content-Encoding")); encoding {
	case "", "identity":
		return resp.Body, nil
	case "gzip", "x-gzip":
		return gzip.NewReader(resp.Body)
	default:
		return nil, fmt.Errorf("the provider's answer is compressed with %q, which was not asked for", encoding)
	}
}

// readAtMost reads all of r, or fails if that is more than maxJWKS.
func readAtMost(r io.Reader) ([]byte, error) {
	b, err := io.ReadAll(io.LimitReader(r, maxJWKS+1))
	if err != nil {
		return nil, fmt.Errorf("reading it: %w", err)
	}
	if len(b) > maxJWKS {
		return nil, fmt.Errorf("it is larger than %d bytes", maxJWKS)
	}
	return b, nil
}

// metadata is what a provider says of itself (OpenID Connect Discovery 1.0,
// section 3; RFC 8414, section 2).
type metadata struct {
	Issuer string `json:"issuer"`
	JWKS   string `json:"jwks_uri"`
}

// IssuerMismatchError is a provider's metadata with another issuer than the one
// it was asked for. Either its tokens name Theirs as their issuer, or the keys are somebody else's.
type IssuerMismatchError struct{ Ours, Theirs string }

func (e *IssuerMismatchError) Error() string {
	message := fmt.Sprintf("the issuer is configured as %q, and the provider calls itself %q: they must be the same to the byte", e.Ours, e.Theirs)
	switch {
	case strings.Contains(e.Theirs, "{"):
		message += ". That is a pattern for many tenants, which no token names as its issuer: give your tenant's own address"
	case differInSlash(e.Ours, e.Theirs):
		message += ". They differ in the slash at the end"
	}
	return message
}

func differInSlash(one, other string) bool {
	return one != other && strings.TrimSuffix(one, "/") == strings.TrimSuffix(other, "/")
}

// Discover returns where the issuer's metadata says that its keys are. If the
// metadata does not name exactly this issuer, the error is an *IssuerMismatchError.
func Discover(ctx context.Context, c IssuerConfig) (string, error) {
	if _, err := httpsURL("the issuer", c.Issuer); err != nil {
		return "", err
	}
	m, err := discover(ctx, getter{caFile: c.JWKSCAFile}, c.Issuer)
	return m.JWKS, err
}

// discover reads the issuer's metadata, which must be about exactly that issuer.
func discover(ctx context.Context, get getter, issuer string) (metadata, error) {
	var m metadata
	b, err := get.get(ctx, "the issuer's metadata", strings.TrimSuffix(issuer, "/")+"/.well-known/openid-configuration")
	var status *statusError
	if errors.As(err, &status) && status.status == http.StatusNotFound {
		b, err = get.get(ctx, "the issuer's metadata", authorizationServer(issuer))
	}
	if err != nil {
		return m, err
	}
	if json.Unmarshal(b, &m) != nil {
		return m, fmt.Errorf("the issuer's metadata is no JSON object with texts \"issuer\" and \"jwks_uri\": %s", describe(b))
	}
	if m.Issuer != issuer {
		return m, &IssuerMismatchError{Ours: issuer, Theirs: m.Issuer}
	}
	return m, nil
}

// authorizationServer is where an OAuth authorization server without OpenID
// Connect has its metadata (RFC 8414, section 3.1).
func authorizationServer(issuer string) string {
	u, err := url.Parse(issuer)
	if err != nil {
		return issuer
	}
	u.Path = "/.well-known/oauth-authorization-server" + strings.TrimSuffix(u.Path, "/")
	return u.String()
}
