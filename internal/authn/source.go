package authn

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"strings"
)

// maxJWKS is the size of the largest set accepted, in bytes.
const maxJWKS = 1 << 20

func isURL(location string) bool { return strings.Contains(location, "://") }

// fileReader reads the set from a file. It is read whole each time: that is
// cheaper than being wrong about whether it changed.
func fileReader(path string) func(context.Context) ([]byte, error) {
	return func(context.Context) ([]byte, error) {
		info, err := os.Stat(path)
		if err != nil {
			return nil, fmt.Errorf("reading the JWK set: %w", err)
		}
		if !info.Mode().IsRegular() {
			return nil, fmt.Errorf("reading the JWK set: %s is not a file", path)
		}
		if info.Mode().Perm()&0o002 != 0 {
			return nil, fmt.Errorf("reading the JWK set: %s may be written by everybody, who could then make tokens", path)
		}
		f, err := os.Open(path)
		if err != nil {
			return nil, fmt.Errorf("reading the JWK set: %w", err)
		}
		defer f.Close() // opened for reading: nothing can be lost
		return readAtMost(f)
	}
}

// fetcher reads the set from an https URL. Redirects are not followed: they
// would let whoever can plant one choose the keys.
func fetcher(location string) (func(context.Context) ([]byte, error), error) {
	u, err := url.Parse(location)
	if err != nil {
		return nil, errors.New("the JWK set's URL is malformed")
	}
	if u.Scheme != "https" || u.Hostname() == "" {
		return nil, fmt.Errorf("the JWK set's URL must be https, not %s", u.Redacted())
	}
	if u.User != nil || u.Fragment != "" {
		return nil, errors.New("the JWK set's URL must have neither user information nor a fragment")
	}
	client := &http.Client{
		Transport: &http.Transport{
			Proxy:                  http.ProxyFromEnvironment,
			TLSClientConfig:        &tls.Config{MinVersion: tls.VersionTLS12},
			DisableCompression:     true, // so that the size limit is one
			DisableKeepAlives:      true, // the next request is minutes away
			MaxResponseHeaderBytes: 64 << 10,
		},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
	return func(ctx context.Context) ([]byte, error) { return fetch(ctx, client, u.String()) }, nil
}

func fetch(ctx context.Context, client *http.Client, location string) ([]byte, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, location, nil)
	if err != nil {
		return nil, fmt.Errorf("fetching the JWK set: %w", err)
	}
	req.Header.Set("Accept", "application/jwk-set+json, application/json")
	resp, err := client.Do(req)
	if err != nil {
		return nil, fmt.Errorf("fetching the JWK set: %w", err)
	}
	defer resp.Body.Close() // read to its end or given up
	if resp.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("fetching the JWK set: the provider answered with status %d", resp.StatusCode)
	}
	return readAtMost(resp.Body)
}

// readAtMost reads all of r, or fails if that is more than maxJWKS.
func readAtMost(r io.Reader) ([]byte, error) {
	b, err := io.ReadAll(io.LimitReader(r, maxJWKS+1))
	if err != nil {
		return nil, fmt.Errorf("reading the JWK set: %w", err)
	}
	if len(b) > maxJWKS {
		return nil, fmt.Errorf("reading the JWK set: it is larger than %d bytes", maxJWKS)
	}
	return b, nil
}
