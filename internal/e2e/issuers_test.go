package e2e

import (
	"crypto/tls"
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/orgkeys/orgkeys/internal/e2e/harness"
	"github.com/orgkeys/orgkeys/internal/testca"
)

// TestTheFileOfIssuersIsFollowed: an issuer that is added to the file is believed, one
// that is taken out is not, and a file that cannot be used changes nothing and is said.
func TestTheFileOfIssuersIsFollowed(t *testing.T) {
	t.Parallel()
	people, robots := harness.NewIssuer(t), harness.NewIssuer(t)
	robots.Name = "https://robots.test"
	file := filepath.Join(t.TempDir(), "issuers.json")
	describe := func(i *harness.Issuer, prefix string) map[string]any {
		return map[string]any{"issuer": i.Name, "audiences": []string{i.Audience}, "organizations": []string{"*"}, "jwks": i.JWKS, "subjectPrefix": prefix}
	}
	write := func(text string) {
		t.Helper()
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	describeAll := func(all ...map[string]any) string {
		b, err := json.Marshal(map[string]any{"issuers": all})
		if err != nil {
			t.Fatal(err)
		}
		return string(b)
	}
	write(describeAll(describe(people, "")))
	s := harness.Start(t, harness.Set("ORGKEYS_ISSUERS_FILE", file))
	org := harness.Org()
	status := func(i *harness.Issuer) int {
		t.Helper()
		return s.Do(t, harness.Request{Method: http.MethodGet, Path: harness.KeyPath(org), Token: i.Token(t, harness.Claims{"org_id": org})}).Status
	}
	if people, robots := status(people), status(robots); people != 200 || robots != 401 {
		t.Fatalf("at the start people get %d and robots %d", people, robots)
	}
	write(describeAll(describe(people, ""), describe(robots, "robots:")))
	harness.Eventually(t, harness.Patience, "the issuer that was added is believed", func() bool { return status(robots) == 200 })
	if status(people) != 200 {
		t.Error("the issuer that stayed is not believed")
	}

	for _, broken := range []string{
		`{"issuers": [`, `{"issuers": []}`, describeAll(describe(people, ""), describe(robots, "")),
		strings.Replace(describeAll(describe(robots, "robots:")), "jwks.json", "missing.json", 1),
	} {
		from := s.Log().Len()
		write(broken)
		harness.Eventually(t, harness.Patience, "the log says that the file cannot be used", func() bool {
			return strings.Contains(string(s.Log().From(from)), "the file of issuers changed and cannot be used; the previous issuers stay in force")
		})
		if people, robots := status(people), status(robots); people != 200 || robots != 200 {
			t.Errorf("with a broken file people get %d and robots %d: %.60s", people, robots, broken)
		}
	}
	if err := os.Chmod(file, 0o602); err != nil {
		t.Fatal(err)
	}
	write(describeAll(describe(robots, "robots:"))) // keeps the mode
	from := s.Log().Len()
	harness.Eventually(t, harness.Patience, "the log says who may write the file", func() bool {
		return strings.Contains(string(s.Output()), "may be written by everybody")
	})
	if err := os.Chmod(file, 0o600); err != nil {
		t.Fatal(err)
	}
	harness.Eventually(t, harness.Patience, "the issuer that was taken out is refused", func() bool { return status(people) == 401 })
	if status(robots) != 200 {
		t.Error("the issuer that stayed is not believed")
	}
	if log := string(s.Log().From(from)); !strings.Contains(log, `"issuers replaced"`) || !strings.Contains(log, robots.Name) {
		t.Errorf("nobody says that the issuers were replaced:\n%s", log)
	}
}

// TestOneIssuersKeysKeepNobodyElseOut: an issuer of several that takes its keys out of its
// set costs its own people their access, and no replica its place behind the load balancer.
func TestOneIssuersKeysKeepNobodyElseOut(t *testing.T) {
	t.Parallel()
	people, robots := harness.NewIssuer(t), harness.NewIssuer(t)
	robots.Name = "https://robots.test"
	var all []map[string]any
	for prefix, i := range map[string]*harness.Issuer{"": people, "robots:": robots} {
		all = append(all, map[string]any{"issuer": i.Name, "audiences": []string{i.Audience}, "organizations": []string{"*"}, "jwks": i.JWKS, "subjectPrefix": prefix})
	}
	b, err := json.Marshal(map[string]any{"issuers": all})
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "issuers.json")
	if err := os.WriteFile(file, b, 0o600); err != nil {
		t.Fatal(err)
	}
	s := harness.Start(t, harness.Set("ORGKEYS_ISSUERS_FILE", file))
	if err := os.WriteFile(robots.JWKS, []byte(`{"keys":[]}`), 0o600); err != nil {
		t.Fatal(err)
	}
	harness.Eventually(t, harness.Patience, "the admin listener names the issuer without keys", func() bool {
		return strings.Contains(s.AskAdmin(t, "/readyz"), robots.Name)
	})
	org := harness.Org()
	if status := s.Do(t, harness.Request{Method: http.MethodGet, Path: "/readyz"}).Status; status != http.StatusOK {
		t.Errorf("/readyz is %d", status)
	}
	if status := s.Do(t, harness.Request{Method: http.MethodGet, Path: harness.KeyPath(org), Token: people.Token(t, harness.Claims{"org_id": org})}).Status; status != http.StatusOK {
		t.Errorf("the other issuer's people get %d", status)
	}
	if err := os.WriteFile(people.JWKS, []byte(`{"keys":[]}`), 0o600); err != nil {
		t.Fatal(err)
	}
	harness.Eventually(t, harness.Patience, "it is not ready once no issuer has keys", func() bool {
		return s.Do(t, harness.Request{Method: http.MethodGet, Path: "/readyz"}).Status == http.StatusServiceUnavailable
	})
}

// issuerServer is an issuer over https, or http, that answers paths with documents.
func issuerServer(t *testing.T, pair *tls.Certificate, documents map[string]string) *httptest.Server {
	t.Helper()
	s := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		document, ok := documents[r.URL.Path]
		if !ok {
			http.NotFound(w, r)
			return
		}
		fmt.Fprint(w, strings.ReplaceAll(document, "ISSUER", "https://"+r.Host))
	}))
	if pair == nil {
		s.Start()
	} else {
		s.TLS = &tls.Config{Certificates: []tls.Certificate{*pair}}
		s.StartTLS()
	}
	t.Cleanup(s.Close)
	return s
}

// TestDoctorLooksAtTheIssuer: what is wrong between the settings and an issuer is
// said in one line, with a remedy, before anybody's token is refused for it.
func TestDoctorLooksAtTheIssuer(t *testing.T) {
	t.Parallel()
	ca := testca.New(t)
	pair := ca.Issue(t, "issuer").Pair(t)
	set := string(harness.NewIssuer(t).Document(t))
	const metadata = `{"issuer":"ISSUER","jwks_uri":"ISSUER/keys"}`
	good := map[string]string{"/.well-known/openid-configuration": metadata, "/keys": set}
	with := func(path, document string) map[string]string {
		changed := map[string]string{path: document}
		for p, d := range good {
			if p != path {
				changed[p] = d
			}
		}
		return changed
	}
	secp256k1 := `{"keys":[{"kty":"EC","crv":"secp256k1","kid":"k","alg":"ES256K","x":"` + strings.Repeat("A", 43) + `","y":"` + strings.Repeat("A", 43) + `"}]}`
	over := func(documents map[string]string) func(*testing.T) string {
		return func(t *testing.T) string { return issuerServer(t, &pair, documents).URL }
	}
	for name, c := range map[string]struct {
		issuer   func(*testing.T) string
		settings map[string]string // ISSUER is its address
		what     string
		state    string
		says     []string // empty: nothing is wrong
	}{
		"found through the issuer": {over(good), nil, "issuer", "ok", []string{"the metadata has the same name"}},
		"and where to look is set": {over(good), map[string]string{"ORGKEYS_JWKS": "ISSUER/keys"}, "issuer", "ok", []string{"the metadata has the same name"}},
		"a slash too many": {func(t *testing.T) string { return over(good)(t) + "/" }, nil,
			"issuer", "fail", []string{"must be the same to the byte", "orgkeys token explain"}},
		"a slash too few": {over(with("/.well-known/openid-configuration", `{"issuer":"ISSUER/","jwks_uri":"ISSUER/keys"}`)), nil,
			"issuer", "fail", []string{"must be the same to the byte", "orgkeys token explain"}},
		"a slash too few, and where to look is set": {over(with("/.well-known/openid-configuration", `{"issuer":"ISSUER/","jwks_uri":"ISSUER/keys"}`)),
			map[string]string{"ORGKEYS_JWKS": "ISSUER/keys"}, "issuer", "fail", []string{"must be the same to the byte"}},
		"other keys than it says": {over(with("/others", set)), map[string]string{"ORGKEYS_JWKS": "ISSUER/others"},
			"issuer", "warn", []string{"says that its keys are at", "unset ORGKEYS_JWKS"}},
		"unreachable": {func(t *testing.T) string {
			s := issuerServer(t, &pair, good)
			s.Close()
			return s.URL
		}, nil, "token keys", "fail", []string{"connection refused", "can be read from here"}},
		"http where https is needed": {func(t *testing.T) string { return issuerServer(t, nil, good).URL }, nil,
			"token keys", "fail", []string{"must be https"}},
		"keys by http": {over(with("/.well-known/openid-configuration", `{"issuer":"ISSUER","jwks_uri":"http://127.0.0.1/keys"}`)), nil,
			"token keys", "fail", []string{"jwks_uri of the issuer's metadata must be https"}},
		"https where it speaks http": {func(t *testing.T) string {
			return strings.Replace(issuerServer(t, nil, good).URL, "http://", "https://", 1)
		}, nil, "token keys", "fail", []string{"server gave HTTP response to HTTPS client"}},
		"the metadata where the keys should be": {over(good), map[string]string{"ORGKEYS_JWKS": "ISSUER/.well-known/openid-configuration"},
			"token keys", "fail", []string{"the keys are at", "/keys"}},
		"an authority that nobody told of": {over(good), map[string]string{"ORGKEYS_JWKS_CA_FILE": ""},
			"token keys", "fail", []string{"unknown authority", "ORGKEYS_JWKS_CA_FILE"}},
		"an algorithm that is not ours": {over(with("/keys", secp256k1)), nil,
			"token keys", "fail", []string{"no key of the set is usable", "secp256k1"}},
		"no metadata": {over(map[string]string{"/keys": set}), map[string]string{"ORGKEYS_JWKS": "ISSUER/keys"},
			"issuer", "warn", []string{"cannot be compared with its metadata", "status 404"}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			issuer := c.issuer(t)
			s := harness.Configure(t, harness.Set("ORGKEYS_ISSUER", issuer), harness.Set("ORGKEYS_AUDIENCE", "orgkeys"), harness.Set("ORGKEYS_JWKS_CA_FILE", ca.File))
			for setting, value := range c.settings {
				s.Configured(setting, strings.ReplaceAll(value, "ISSUER", strings.TrimSuffix(issuer, "/")))
			}
			failing, said := diagnose(t, s)
			for _, d := range said {
				if d.What != c.what || d.State != c.state {
					continue
				}
				for _, says := range c.says {
					if !strings.Contains(d.Found+" "+d.Remedy, says) {
						t.Errorf("it does not say %q: %+v", says, d)
					}
				}
				if d.State != "ok" && d.Remedy == "" {
					t.Errorf("it does not say what to do: %+v", d)
				}
				if (c.state == "fail") != (len(failing) > 0) {
					t.Errorf("failing is %v", failing)
				}
				return
			}
			t.Errorf("there is no line %s of %s: %+v", c.state, c.what, said)
		})
	}
}
