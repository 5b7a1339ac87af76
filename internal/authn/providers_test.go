package authn

import (
	"bufio"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"net/http"
	"net/http/cookiejar"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/orgkeys/orgkeys/internal/authz"
	"github.com/orgkeys/orgkeys/internal/config"
	"github.com/orgkeys/orgkeys/internal/org"
)

// realProvider is a provider's program that runs.
type realProvider struct {
	issuer string
	caFile string
	http   *http.Client
	tokens string // its token endpoint
	login  string // its authorization endpoint
}

// grant is how a test gets a token.
type grant func(t *testing.T, p *realProvider) string

// TestRealProviders runs other people's providers over https with an authority of the
// test's own. Their tokens are accepted with settings alone, and no request is lost
// while they rotate their keys under load.
func TestRealProviders(t *testing.T) {
	programs := buildProviders(t)
	roles := []string{"ORGKEYS_CLAIM_ROLE=/realm_access/roles", "ORGKEYS_ROLE_MAP=org-admins=ADMINISTRATOR"}
	zitadel := []string{
		"ORGKEYS_CLAIM_ORG=urn:zitadel:iam:user:resourceowner:id", "ORGKEYS_CLAIM_ROLE=urn:zitadel:iam:org:project:roles",
		"ORGKEYS_ROLE_MAP=orgkeys-admin=ADMINISTRATOR",
	}
	for _, c := range []struct {
		name     string
		command  []string
		settings []string
		grants   map[string]grant // by the subject that they bring
		org      org.ID
	}{
		{"oidc-provider", []string{"node", filepath.Join(programs, "oidc-provider/server.mjs")}, append(roles, "ORGKEYS_AUDIENCE=orgkeys"),
			map[string]grant{
				"client": byClientCredentials("client", "secret", nil),
				"ada-1":  byAuthorizationCode(url.Values{"scope": {"openid keys"}, "resource": {"https://orgkeys.example"}}, nil),
			}, "acme"},
		{"zitadel by client credentials", []string{filepath.Join(programs, "zitadel")}, append(zitadel, "ORGKEYS_AUDIENCE=sid1"),
			map[string]grant{"sid1": byClientCredentials("sid1", "verysecret", url.Values{"scope": {"openid"}})}, "278000000000000001"},
		{"zitadel by authorization code", []string{filepath.Join(programs, "zitadel")}, append(zitadel, "ORGKEYS_AUDIENCE=client"),
			map[string]grant{"id1": byAuthorizationCode(url.Values{"scope": {"openid"}},
				url.Values{"username": {"test-user@127.0.0.1"}, "password": {"verysecure"}})}, "278000000000000001"},
		{"fosite", []string{filepath.Join(programs, "fosite")},
			[]string{"ORGKEYS_AUDIENCE=orgkeys", "ORGKEYS_CLAIM_ORG=/ext/org_id", "ORGKEYS_CLAIM_ROLE=/ext/org_role"},
			map[string]grant{"client": byClientCredentials("client", "secret", url.Values{"audience": {"orgkeys"}, "scope": {"keys"}})}, "acme"},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			p := startProvider(t, c.command)
			v := p.verifier(t, c.settings)
			for subject, get := range c.grants {
				token := get(t, p)
				caller, err := v.Authenticate(t.Context(), bearerHeader(token))
				if err != nil || caller.Subject != subject || caller.Org != c.org || !slices.Equal(caller.Roles, []authz.Role{authz.Administrator}) {
					findings, _ := v.Explain(t.Context(), token)
					t.Fatalf("Authenticate = %+v, %v, want %s of %s; %+v", caller, err, subject, c.org, findings)
				}
			}
			for _, get := range c.grants {
				p.rotateUnderLoad(t, v, get)
				break
			}
		})
	}
}

// rotateUnderLoad has four clients fetch tokens and use them while the provider rotates.
func (p *realProvider) rotateUnderLoad(t *testing.T, v *Verifier, get grant) {
	t.Helper()
	rotations := 4
	if os.Getenv("ORGKEYS_TEST_LONG") != "" {
		rotations = 30
	}
	var used atomic.Int64
	ended := make(chan struct{})
	var clients sync.WaitGroup
	for range 4 {
		clients.Go(func() {
			for {
				select {
				case <-ended:
					return
				default:
				}
				if _, err := v.Authenticate(t.Context(), bearerHeader(get(t, p))); err != nil {
					t.Errorf("a good token: %v", err)
					return
				}
				used.Add(1)
			}
		})
	}
	for range rotations {
		p.rotate(t)
		for before := used.Load(); used.Load() < before+8 && !t.Failed(); {
			time.Sleep(time.Millisecond)
		}
	}
	close(ended)
	clients.Wait()
	t.Logf("%d rotations, %d tokens used", rotations, used.Load())
}

func (p *realProvider) rotate(t *testing.T) {
	t.Helper()
	resp, err := p.http.Post(p.issuer+"/test/rotate", "", nil)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		t.Fatalf("rotating: status %d", resp.StatusCode)
	}
}

// verifier has the settings, and finds the keys through the issuer.
func (p *realProvider) verifier(t *testing.T, settings []string) *Verifier {
	t.Helper()
	c, err := config.Load(append([]string{"ORGKEYS_ISSUER=" + p.issuer, "ORGKEYS_JWKS_CA_FILE=" + p.caFile}, settings...), "")
	if err != nil {
		t.Fatal(err)
	}
	configured, err := Configured(c)
	if err != nil {
		t.Fatal(err)
	}
	issuers, err := Open(configured, c.JWKSInterval, quiet)
	if err != nil {
		t.Fatal(err)
	}
	return must(New(nil, issuers...))
}

func buildProviders(t *testing.T) string {
	t.Helper()
	build := exec.Command("providers/build")
	build.Stderr = os.Stderr
	out, err := build.Output()
	if err != nil {
		t.Fatalf("building the providers: %v", err)
	}
	return strings.TrimSpace(string(out))
}

func startProvider(t *testing.T, command []string) *realProvider {
	t.Helper()
	dir := t.TempDir()
	certificate := selfSigned(t, keysForTests().ec)
	certFile, keyFile := filepath.Join(dir, "cert.pem"), filepath.Join(dir, "key.pem")
	private := must(x509.MarshalPKCS8PrivateKey(certificate.PrivateKey))
	for file, block := range map[string]*pem.Block{certFile: {Type: "CERTIFICATE", Bytes: certificate.Certificate[0]}, keyFile: {Type: "PRIVATE KEY", Bytes: private}} {
		if err := os.WriteFile(file, pem.EncodeToMemory(block), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	cmd := exec.CommandContext(context.Background(), command[0], append(command[1:], certFile, keyFile)...)
	cmd.Dir = filepath.Dir(command[len(command)-1])
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = stdin.Close(); _ = cmd.Wait() })
	line, err := bufio.NewReader(stdout).ReadString('\n')
	if err != nil {
		t.Fatalf("%s does not say where it listens: %v", command, err)
	}
	go func() { _, _ = io.Copy(io.Discard, stdout) }()
	roots := x509.NewCertPool()
	roots.AddCert(must(x509.ParseCertificate(certificate.Certificate[0])))
	p := &realProvider{issuer: strings.TrimSpace(line), caFile: certFile, http: &http.Client{
		Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: roots}}, Timeout: 30 * time.Second,
	}}
	p.endpoints(t)
	return p
}

// endpoints reads those of the metadata.
func (p *realProvider) endpoints(t *testing.T) {
	t.Helper()
	var metadata struct {
		Tokens string `json:"token_endpoint"`
		Login  string `json:"authorization_endpoint"`
	}
	for _, path := range []string{"/.well-known/openid-configuration", "/.well-known/oauth-authorization-server"} {
		resp, err := p.http.Get(p.issuer + path)
		if err != nil {
			t.Fatal(err)
		}
		_ = json.NewDecoder(resp.Body).Decode(&metadata)
		resp.Body.Close()
		if metadata.Tokens != "" {
			break
		}
	}
	if metadata.Tokens == "" {
		t.Fatal("the provider names no token endpoint")
	}
	p.tokens, p.login = metadata.Tokens, metadata.Login
}

func byClientCredentials(id, secret string, more url.Values) grant {
	return func(t *testing.T, p *realProvider) string {
		form := url.Values{"grant_type": {"client_credentials"}}
		return p.token(t, form, more, id, secret)
	}
}

// token asks the token endpoint. Providers differ in where they want the client's secret.
func (p *realProvider) token(t *testing.T, form, more url.Values, id, secret string) string {
	t.Helper()
	for name, values := range more {
		form[name] = values
	}
	var failures []string
	for _, inForm := range []bool{true, false} {
		body := url.Values{}
		for name, values := range form {
			body[name] = values
		}
		if inForm {
			body.Set("client_id", id)
			body.Set("client_secret", secret)
		}
		req := must(http.NewRequest(http.MethodPost, p.tokens, strings.NewReader(body.Encode())))
		req.Header.Set("Content-Type", "application/x-www-form-urlencoded")
		if !inForm {
			req.SetBasicAuth(id, secret)
		}
		resp, err := p.http.Do(req)
		if err != nil {
			t.Error(err)
			return ""
		}
		var answer struct {
			Token string `json:"access_token"`
		}
		b, _ := io.ReadAll(resp.Body)
		resp.Body.Close()
		if _ = json.Unmarshal(b, &answer); answer.Token != "" {
			return answer.Token
		}
		failures = append(failures, fmt.Sprintf("status %d: %s", resp.StatusCode, b))
	}
	t.Errorf("no token: %q", failures)
	return ""
}

// byAuthorizationCode is a browser's way: the login page, if there is one, gets credentials.
func byAuthorizationCode(parameters, credentials url.Values) grant {
	return func(t *testing.T, p *realProvider) string {
		back := p.issuer + "/callback"
		browser := *p.http
		browser.Jar = must(cookiejar.New(nil))
		var code string
		browser.CheckRedirect = func(r *http.Request, _ []*http.Request) error {
			if strings.HasPrefix(r.URL.String(), back) {
				code = r.URL.Query().Get("code")
				return http.ErrUseLastResponse
			}
			return nil
		}
		query := url.Values{"client_id": {"client"}, "response_type": {"code"}, "redirect_uri": {back}, "state": {"s"}}
		for name, values := range parameters {
			query[name] = values
		}
		resp, err := browser.Get(p.login + "?" + query.Encode())
		if err != nil {
			t.Error(err)
			return ""
		}
		resp.Body.Close()
		if code == "" && credentials != nil {
			at := resp.Request.URL
			form := url.Values{"id": {at.Query().Get("authRequestID")}}
			for name, values := range credentials {
				form[name] = values
			}
			at.RawQuery = ""
			if resp, err = browser.PostForm(at.String(), form); err != nil {
				t.Error(err)
				return ""
			}
			resp.Body.Close()
		}
		return p.token(t, url.Values{"grant_type": {"authorization_code"}, "code": {code}, "redirect_uri": {back}}, nil, "client", "secret")
	}
}
