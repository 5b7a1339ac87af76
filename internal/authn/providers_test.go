package authn

import (
	"bytes"
	"crypto/rand"
	"crypto/sha256"
	"encoding/json"
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

	vaultapi "github.com/hashicorp/vault/api"

	"github.com/orgkeys/orgkeys/internal/authn/providertest"
	"github.com/orgkeys/orgkeys/internal/authz"
	"github.com/orgkeys/orgkeys/internal/config"
	"github.com/orgkeys/orgkeys/internal/org"
	"github.com/orgkeys/orgkeys/internal/vault/vaulttest"
)

// realProvider is a provider's program that runs.
type realProvider struct {
	issuer string
	caFile string
	http   *http.Client
	tokens string // its token endpoint
	login  string // its authorization endpoint
	rotate func(*testing.T)
}

// grant is how a test gets a token.
type grant func(t *testing.T, p *realProvider) string

// TestRealProviders runs other people's providers over https with an authority of the
// test's own. Their tokens are accepted with settings alone, and no request is lost
// while they rotate their keys under load.
func TestRealProviders(t *testing.T) {
	zitadel := []string{
		"ORGKEYS_CLAIM_ORG=urn:zitadel:iam:user:resourceowner:id", "ORGKEYS_CLAIM_ROLE=urn:zitadel:iam:org:project:roles",
		"ORGKEYS_ROLE_MAP=orgkeys-admin=ADMINISTRATOR",
	}
	for _, c := range []struct {
		name     string
		start    func(*testing.T) *realProvider
		settings []string
		grants   map[string]grant // by the subject that they bring
		org      org.ID
	}{
		{"oidc-provider", program("oidc-provider"),
			[]string{"ORGKEYS_AUDIENCE=orgkeys", "ORGKEYS_CLAIM_ROLE=/realm_access/roles", "ORGKEYS_ROLE_MAP=org-admins=ADMINISTRATOR"},
			map[string]grant{
				"client": byClientCredentials("client", "secret", nil),
				"ada-1":  byAuthorizationCode(url.Values{"scope": {"openid keys"}, "resource": {"https://orgkeys.example"}}, nil),
			}, "acme"},
		{"zitadel by client credentials", program("zitadel"), append(zitadel, "ORGKEYS_AUDIENCE=sid1"),
			map[string]grant{"sid1": byClientCredentials("sid1", "verysecret", url.Values{"scope": {"openid"}})}, "278000000000000001"},
		{"zitadel by authorization code", program("zitadel"), append(zitadel, "ORGKEYS_AUDIENCE=client"),
			map[string]grant{"id1": byAuthorizationCode(url.Values{"scope": {"openid"}},
				url.Values{"username": {"test-user@127.0.0.1"}, "password": {"verysecure"}})}, "278000000000000001"},
		{"fosite", program("fosite"),
			[]string{"ORGKEYS_AUDIENCE=orgkeys", "ORGKEYS_CLAIM_ORG=/ext/org_id", "ORGKEYS_CLAIM_ROLE=/ext/org_role"},
			map[string]grant{
				"client": byClientCredentials("client", "secret", url.Values{"audience": {"orgkeys"}, "scope": {"keys"}}),
				"ada-1":  byAuthorizationCode(url.Values{"audience": {"orgkeys"}, "scope": {"keys"}, "state": {"at least eight"}}, nil),
			}, "acme"},
		{"better-auth", program("better-auth"), []string{"ORGKEYS_AUDIENCE=orgkeys", "ORGKEYS_JWKS=ISSUER/api/auth/jwks", "ORGKEYS_ROLE_MAP=owner=ADMINISTRATOR"},
			map[string]grant{anyone: bySession()}, "acme"},
		{"Vault", startVault, []string{"ORGKEYS_AUDIENCE=orgkeys"}, map[string]grant{anyone: byVault()}, "acme"},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			p := c.start(t)
			v := p.verifier(t, c.settings)
			var grants []grant
			for subject, get := range c.grants {
				grants = append(grants, get)
				token := get(t, p)
				caller, err := v.Authenticate(t.Context(), bearerHeader(token))
				if err != nil || caller.Subject != subject && subject != anyone || caller.Org != c.org || !slices.Equal(caller.Roles, []authz.Role{authz.Administrator}) {
					findings, _ := v.Explain(t.Context(), token)
					t.Fatalf("Authenticate = %+v, %v, want %s of %s; %+v", caller, err, subject, c.org, findings)
				}
			}
			p.rotateUnderLoad(t, v, grants)
		})
	}
}

// anyone is a subject whose ID the provider makes.
const anyone = "*"

// rotateUnderLoad has four clients fetch tokens, in all ways there are, and use them
// while the provider rotates.
func (p *realProvider) rotateUnderLoad(t *testing.T, v *Verifier, grants []grant) {
	t.Helper()
	rotations := 4
	if os.Getenv("ORGKEYS_TEST_LONG") != "" {
		rotations = 30
	}
	var used atomic.Int64
	ended := make(chan struct{})
	var clients sync.WaitGroup
	for n := range 4 {
		get := grants[n%len(grants)]
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

// rotateItself asks one of the programs in providers/ to.
func (p *realProvider) rotateItself(t *testing.T) {
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

// verifier has the settings, and finds the keys through the issuer where they do not say where.
func (p *realProvider) verifier(t *testing.T, settings []string) *Verifier {
	t.Helper()
	environ := []string{"ORGKEYS_ISSUER=" + p.issuer, "ORGKEYS_JWKS_CA_FILE=" + p.caFile}
	for _, s := range settings {
		environ = append(environ, strings.ReplaceAll(s, "ISSUER/", p.issuer+"/"))
	}
	c, err := config.Load(environ, "")
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

// program starts one of the programs in providers/.
func program(name string) func(*testing.T) *realProvider {
	return func(t *testing.T) *realProvider {
		t.Helper()
		started := providertest.Start(t, name)
		p := &realProvider{issuer: started.Issuer, caFile: started.CA.File, http: started.Client(t)}
		p.rotate = p.rotateItself
		if name != "better-auth" { // which has no metadata
			p.endpoints(t)
		}
		return p
	}
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

// byAuthorizationCode is a browser's way, with PKCE: the login page, if there is one, gets credentials.
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
		verifier := rand.Text() + rand.Text()
		challenge := sha256.Sum256([]byte(verifier))
		query := url.Values{"client_id": {"client"}, "response_type": {"code"}, "redirect_uri": {back}, "state": {"s"},
			"code_challenge": {b64(challenge[:])}, "code_challenge_method": {"S256"}}
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
		return p.token(t, url.Values{"grant_type": {"authorization_code"}, "code": {code}, "redirect_uri": {back}, "code_verifier": {verifier}}, nil, "client", "secret")
	}
}

// bySession is better-auth's way: who is logged in asks for a token.
func bySession() grant {
	var session http.Client
	var signUp sync.Once
	return func(t *testing.T, p *realProvider) string {
		var answer struct{ Token string }
		call := func(path string, body map[string]string) {
			method, content := http.MethodGet, io.Reader(http.NoBody)
			if body != nil {
				method, content = http.MethodPost, bytes.NewReader(must(json.Marshal(body)))
			}
			req := must(http.NewRequest(method, p.issuer+"/api/auth/"+path, content))
			req.Header.Set("Content-Type", "application/json")
			req.Header.Set("Origin", p.issuer)
			resp, err := session.Do(req)
			if err != nil {
				t.Error(err)
				return
			}
			defer resp.Body.Close()
			if err := json.NewDecoder(resp.Body).Decode(&answer); err != nil || resp.StatusCode != http.StatusOK {
				t.Errorf("%s: status %d, %v", path, resp.StatusCode, err)
			}
		}
		signUp.Do(func() {
			session = *p.http
			session.Jar = must(cookiejar.New(nil))
			call("sign-up/email", map[string]string{"email": "ada@example.com", "password": rand.Text(), "name": "Ada"})
			call("organization/create", map[string]string{"name": "Acme", "slug": "acme"})
		})
		call("token", nil)
		return answer.Token
	}
}

// startVault is a Vault that is set up as docs/identity/vault.md says, with a user.
func startVault(t *testing.T) *realProvider {
	t.Helper()
	server, err := vaulttest.Start(t.Context(), t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = server.Stop() })
	root := must(server.Client(server.RootToken))
	page := string(must(os.ReadFile(filepath.Join(pagesDir, "vault.md"))))
	script := strings.ReplaceAll(fenced(t, page, "At the provider"), "https://vault.example:8200", server.Address)
	cmd := exec.CommandContext(t.Context(), "bash", "-euc", `vault() { "$VAULT_CLI" "$@"; }`+"\n"+script)
	cmd.Env = append(os.Environ(), append(server.Env(), "VAULT_CLI="+must(vaulttest.Binary()), "VAULT_TOKEN="+server.RootToken)...)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("the page's commands: %v\n%s", err, out)
	}
	if err := root.Sys().EnableAuth("userpass", "userpass", ""); err != nil {
		t.Fatal(err)
	}
	mounts := must(root.Sys().ListAuth())
	entity := must(root.Logical().Read("identity/entity/name/ada"))
	must(root.Logical().Write("auth/userpass/users/ada", map[string]any{"password": vaultPassword}))
	must(root.Logical().Write("identity/entity-alias", map[string]any{
		"name": "ada", "canonical_id": entity.Data["id"], "mount_accessor": mounts["userpass/"].Accessor,
	}))
	p := &realProvider{issuer: server.Address + "/v1/identity/oidc", caFile: server.CACert}
	p.rotate = func(t *testing.T) {
		if _, err := root.Logical().Write("identity/oidc/key/orgkeys/rotate", nil); err != nil {
			t.Fatal(err)
		}
	}
	return p
}

const vaultPassword = "of the test"

// byVault logs in once, and reads tokens.
func byVault() grant {
	var user *vaultapi.Client
	var logIn sync.Once
	return func(t *testing.T, p *realProvider) string {
		logIn.Do(func() {
			server := vaulttest.Server{Address: strings.TrimSuffix(p.issuer, "/v1/identity/oidc"), CACert: p.caFile}
			client := must(server.Client(""))
			login := must(client.Logical().Write("auth/userpass/login/ada", map[string]any{"password": vaultPassword}))
			client.SetToken(login.Auth.ClientToken)
			user = client
		})
		secret, err := user.Logical().Read("identity/oidc/token/orgkeys")
		if err != nil {
			t.Error(err)
			return ""
		}
		token, _ := secret.Data["token"].(string)
		return token
	}
}
