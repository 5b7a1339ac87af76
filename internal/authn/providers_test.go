package authn

import (
	"bytes"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"io"
	"maps"
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

	id, secret string // of its client
	back       string // where its client has codes sent to
	vault      *vaulttest.Server
}

// grant is how a test gets a token.
type grant func(t *testing.T, p *realProvider) string

// The grants that each provider is tried with, and the ways to a token that are a provider's own.
const (
	clientCredentials = "client credentials"
	authorizationCode = "authorization code"
	bySessionToken    = "a session"
	byIdentityToken   = "a login of a person"
	byAppRole         = "a login of a machine"
)

// way is one way to a token, and whom the token must be about.
type way struct {
	grant   string
	subject string
	get     grant
}

// trial is a provider with the settings for its tokens.
type trial struct {
	name     string
	start    func(*testing.T) *realProvider
	settings []string
	org      org.ID
	ways     []way
}

// trials are several for a provider whose tokens want several settings.
func trials() map[string][]trial {
	const resource = "https://orgkeys.example"
	forZitadel := []string{
		"ORGKEYS_CLAIM_ORG=urn:zitadel:iam:user:resourceowner:id", "ORGKEYS_CLAIM_ROLE=urn:zitadel:iam:org:project:roles",
		"ORGKEYS_ROLE_MAP=orgkeys-admin=ADMINISTRATOR",
	}
	return map[string][]trial{
		"oidc-provider": {{"", program("oidc-provider"),
			[]string{"ORGKEYS_AUDIENCE=orgkeys", "ORGKEYS_CLAIM_ROLE=/realm_access/roles", "ORGKEYS_ROLE_MAP=org-admins=ADMINISTRATOR"}, "acme", []way{
				{clientCredentials, "client", byClientCredentials(nil)},
				{authorizationCode, "ada-1", byAuthorizationCode(url.Values{"scope": {"openid keys"}, "resource": {resource}}, nil)},
			}}},
		"zitadel": { // whose example has no audience but the client's ID
			{"for a service", program("zitadel"), append(forZitadel, "ORGKEYS_AUDIENCE=sid1"), "278000000000000001", []way{
				{clientCredentials, "sid1", func(t *testing.T, p *realProvider) string {
					return p.token(t, "access_token", url.Values{"grant_type": {"client_credentials"}, "scope": {"openid"}}, "sid1", "verysecret")
				}},
			}},
			{"for a person", program("zitadel"), append(forZitadel, "ORGKEYS_AUDIENCE=client"), "278000000000000001", []way{
				{authorizationCode, "id1", byAuthorizationCode(url.Values{"scope": {"openid"}},
					url.Values{"username": {"test-user@127.0.0.1"}, "password": {"verysecure"}})},
			}},
		},
		"fosite": {{"", program("fosite"),
			[]string{"ORGKEYS_AUDIENCE=orgkeys", "ORGKEYS_CLAIM_ORG=/ext/org_id", "ORGKEYS_CLAIM_ROLE=/ext/org_role"}, "acme", []way{
				{clientCredentials, "client", byClientCredentials(url.Values{"audience": {"orgkeys"}, "scope": {"keys"}})},
				{authorizationCode, "ada-1", byAuthorizationCode(url.Values{"audience": {"orgkeys"}, "scope": {"keys"}, "state": {"at least eight"}}, nil)},
			}}},
		"better-auth": {{"", program("better-auth"),
			[]string{"ORGKEYS_AUDIENCE=" + resource, "ORGKEYS_ROLE_MAP=owner=ADMINISTRATOR"}, "acme", []way{
				{clientCredentials, "client", byClientCredentials(url.Values{"resource": {resource}, "scope": {"keys"}})},
				{authorizationCode, anyone, byAuthorizationCode(url.Values{"resource": {resource}, "scope": {"openid keys"}}, nil)},
				{bySessionToken, anyone, bySession()},
			}}},
		"Vault": {
			{"identity tokens", startVault, []string{"ORGKEYS_AUDIENCE=orgkeys"}, "acme", []way{
				{byIdentityToken, anyone, byEntity("auth/userpass/login/ada", func(*vaulttest.Server) map[string]any { return map[string]any{"password": vaultPassword} })},
				{byAppRole, anyone, byEntity("auth/approle/login", roleOfVault)},
			}},
			{"its OIDC provider", startVaultsProvider, []string{"ORGKEYS_AUDIENCE=CLIENT"}, "acme", []way{
				{authorizationCode, anyone, byVaultsProvider()},
			}},
		},
	}
}

// TestRealProviders runs other people's providers over https with an authority of the
// test's own. Their tokens are accepted with settings alone, and no request is lost
// while they rotate their keys under load.
func TestRealProviders(t *testing.T) {
	for name, all := range trials() {
		var grants []string
		for _, c := range all {
			t.Run(strings.TrimSpace(name+" "+c.name), func(t *testing.T) {
				t.Parallel()
				c.run(t)
			})
			for _, w := range c.ways {
				grants = append(grants, w.grant)
			}
		}
		for _, wanted := range []string{clientCredentials, authorizationCode} {
			if name == "Vault" && wanted == clientCredentials {
				continue // it refuses that grant, as startVaultsProvider shows; machines have auth methods there
			}
			if !slices.Contains(grants, wanted) {
				t.Errorf("%s is not tried with %s", name, wanted)
			}
		}
	}
}

func (c trial) run(t *testing.T) {
	p := c.start(t)
	v := p.verifier(t, c.settings)
	for _, w := range c.ways {
		token := w.get(t, p)
		caller, err := v.Authenticate(t.Context(), bearerHeader(token))
		if err != nil || caller.Subject != w.subject && w.subject != anyone || caller.Org != c.org || !slices.Equal(caller.Roles, []authz.Role{authz.Administrator}) {
			findings, _ := v.Explain(t.Context(), token, config.PseudonymAddresses)
			t.Fatalf("by %s: Authenticate = %+v, %v, want %s of %s; %+v", w.grant, caller, err, w.subject, c.org, findings)
		}
	}
	p.rotateUnderLoad(t, v, c.ways)
}

// anyone is a subject whose ID the provider makes.
const anyone = "*"

// app is an application elsewhere, which no test reaches.
const app = "https://app.example/callback"

// rotateUnderLoad has two clients for each way fetch tokens and use them while the
// provider rotates.
func (p *realProvider) rotateUnderLoad(t *testing.T, v *Verifier, ways []way) {
	t.Helper()
	rotations := 4
	if os.Getenv("ORGKEYS_TEST_LONG") != "" {
		rotations = 30
	}
	var used atomic.Int64
	ended := make(chan struct{})
	var clients sync.WaitGroup
	for n := range 2 * len(ways) {
		get := ways[n%len(ways)].get
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
		environ = append(environ, strings.ReplaceAll(s, "CLIENT", p.id))
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
		p := &realProvider{issuer: started.Issuer, caFile: started.CA.File, http: started.Client(t), id: "client", secret: "secret", back: started.Issuer + "/callback"}
		if name == "better-auth" { // which takes no address of this machine
			p.back = app
		}
		p.rotate = p.rotateItself
		p.endpoints(t)
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

func byClientCredentials(parameters url.Values) grant {
	return func(t *testing.T, p *realProvider) string {
		form := url.Values{"grant_type": {"client_credentials"}}
		maps.Copy(form, parameters)
		return p.token(t, "access_token", form, p.id, p.secret)
	}
}

// token asks the token endpoint for the token by that name. Providers differ in where they want the client's secret.
func (p *realProvider) token(t *testing.T, name string, form url.Values, id, secret string) string {
	t.Helper()
	var failures []string
	for _, inForm := range []bool{true, false} {
		body := maps.Clone(form)
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
		var answer map[string]any
		b, _ := io.ReadAll(resp.Body)
		resp.Body.Close()
		_ = json.Unmarshal(b, &answer)
		if token, _ := answer[name].(string); token != "" {
			return token
		}
		failures = append(failures, fmt.Sprintf("status %d: %s", resp.StatusCode, b))
	}
	t.Errorf("no token: %q", failures)
	return ""
}

// byAuthorizationCode is a browser's way, with PKCE: the login page, if there is one, gets credentials.
func byAuthorizationCode(parameters, credentials url.Values) grant {
	return func(t *testing.T, p *realProvider) string {
		browser := *p.http
		browser.Jar = must(cookiejar.New(nil))
		var code string
		browser.CheckRedirect = func(r *http.Request, _ []*http.Request) error {
			if strings.HasPrefix(r.URL.String(), p.back) {
				code = r.URL.Query().Get("code")
				return http.ErrUseLastResponse
			}
			return nil
		}
		query, proof := p.authorization()
		maps.Copy(query, parameters)
		resp, err := browser.Get(p.login + "?" + query.Encode())
		if err != nil {
			t.Error(err)
			return ""
		}
		resp.Body.Close()
		if code == "" && credentials != nil {
			at := resp.Request.URL
			form := url.Values{"id": {at.Query().Get("authRequestID")}}
			maps.Copy(form, credentials)
			at.RawQuery = ""
			if resp, err = browser.PostForm(at.String(), form); err != nil {
				t.Error(err)
				return ""
			}
			resp.Body.Close()
		}
		proof.Set("code", code)
		return p.token(t, "access_token", proof, p.id, p.secret)
	}
}

// authorization is a request for a code, with PKCE (RFC 7636), and the one for a token, which lacks the code.
func (p *realProvider) authorization() (query, proof url.Values) {
	verifier := rand.Text() + rand.Text()
	challenge := sha256.Sum256([]byte(verifier))
	query = url.Values{"client_id": {p.id}, "response_type": {"code"}, "redirect_uri": {p.back}, "state": {"s"},
		"code_challenge": {b64(challenge[:])}, "code_challenge_method": {"S256"}}
	return query, url.Values{"grant_type": {"authorization_code"}, "redirect_uri": {p.back}, "code_verifier": {verifier}}
}

// bySession is better-auth's own way: who is logged in asks for a token.
func bySession() grant {
	var session http.Client
	var logIn sync.Once
	return func(t *testing.T, p *realProvider) string {
		var answer struct{ Token string }
		call := func(path string, body map[string]string) {
			method, content := http.MethodGet, io.Reader(http.NoBody)
			if body != nil {
				method, content = http.MethodPost, bytes.NewReader(must(json.Marshal(body)))
			}
			req := must(http.NewRequest(method, p.issuer+path, content))
			req.Header.Set("Content-Type", "application/json")
			req.Header.Set("Origin", strings.TrimSuffix(p.issuer, "/api/auth"))
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
		logIn.Do(func() {
			session = *p.http
			session.Jar = must(cookiejar.New(nil))
			call("/sign-in/email", map[string]string{"email": "ada@example.com", "password": "of the test"})
		})
		call("/token", nil)
		return answer.Token
	}
}

const vaultPassword = "of the test"

// startVault is a Vault that is set up as docs/identity/vault.md says. Its one entity, ada,
// logs in as a person and, by AppRole, as a machine does.
func startVault(t *testing.T) *realProvider {
	t.Helper()
	server, err := vaulttest.Start(t.Context(), t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = server.Stop() })
	p := &realProvider{issuer: server.Address + "/v1/identity/oidc", caFile: server.CACert, http: trusting(t, server.CACert), vault: server}
	p.runOnVault(t, "At the provider")
	root := must(server.Client(server.RootToken))
	entity := must(root.Logical().Read("identity/entity/name/ada"))
	write := func(path string, data map[string]any) {
		if _, err := root.Logical().Write(path, data); err != nil {
			t.Fatal(err)
		}
	}
	for _, method := range []string{"userpass", "approle"} {
		if err := root.Sys().EnableAuth(method, method, ""); err != nil {
			t.Fatal(err)
		}
	}
	write("auth/userpass/users/ada", map[string]any{"password": vaultPassword})
	write("auth/approle/role/ada", nil)
	mounts := must(root.Sys().ListAuth())
	for mount, alias := range map[string]any{"userpass/": "ada", "approle/": roleOfVault(server)["role_id"]} {
		write("identity/entity-alias", map[string]any{"name": alias, "canonical_id": entity.Data["id"], "mount_accessor": mounts[mount].Accessor})
	}
	p.rotate = func(t *testing.T) { write("identity/oidc/key/orgkeys/rotate", nil) }
	return p
}

// runOnVault runs the commands behind a heading of the page.
func (p *realProvider) runOnVault(t *testing.T, heading string) {
	t.Helper()
	page := string(must(os.ReadFile(filepath.Join(pagesDir, "vault.md"))))
	script := strings.ReplaceAll(fenced(t, page, heading), "https://vault.example:8200", p.vault.Address)
	cmd := exec.CommandContext(t.Context(), "bash", "-euc", `vault() { "$VAULT_CLI" "$@"; }`+"\n"+script)
	cmd.Env = append(os.Environ(), append(p.vault.Env(), "VAULT_CLI="+must(vaulttest.Binary()), "VAULT_TOKEN="+p.vault.RootToken)...)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("the page's commands: %v\n%s", err, out)
	}
}

func trusting(t *testing.T, caFile string) *http.Client {
	t.Helper()
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(must(os.ReadFile(caFile)))
	transport := &http.Transport{TLSClientConfig: &tls.Config{RootCAs: pool}}
	t.Cleanup(transport.CloseIdleConnections)
	return &http.Client{Transport: transport, Timeout: 30 * time.Second}
}

// roleOfVault is what a machine logs in to Vault with: an ID and a secret.
func roleOfVault(server *vaulttest.Server) map[string]any {
	root := must(server.Client(server.RootToken))
	role := must(root.Logical().Read("auth/approle/role/ada/role-id"))
	secret := must(root.Logical().Write("auth/approle/role/ada/secret-id", nil))
	return map[string]any{"role_id": role.Data["role_id"], "secret_id": secret.Data["secret_id"]}
}

// byEntity logs in to Vault once, and reads identity tokens.
func byEntity(login string, credentials func(*vaulttest.Server) map[string]any) grant {
	var user *vaultapi.Client
	var logIn sync.Once
	return func(t *testing.T, p *realProvider) string {
		logIn.Do(func() { user = logInToVault(p, login, credentials(p.vault)) })
		secret, err := user.Logical().Read("identity/oidc/token/orgkeys")
		if err != nil {
			t.Error(err)
			return ""
		}
		token, _ := secret.Data["token"].(string)
		return token
	}
}

func logInToVault(p *realProvider, path string, credentials map[string]any) *vaultapi.Client {
	client := must(p.vault.Client(""))
	login := must(client.Logical().Write(path, credentials))
	client.SetToken(login.Auth.ClientToken)
	return client
}

// startVaultsProvider is a Vault that is an OIDC provider besides, as the page says.
func startVaultsProvider(t *testing.T) *realProvider {
	t.Helper()
	p := startVault(t)
	p.runOnVault(t, "Vault as an OIDC provider")
	client := must(must(p.vault.Client(p.vault.RootToken)).Logical().Read("identity/oidc/client/orgkeys"))
	p.id, p.secret = client.Data["client_id"].(string), client.Data["client_secret"].(string)
	p.issuer, p.back = p.issuer+"/provider/orgkeys", app
	p.endpoints(t)
	resp, err := p.http.PostForm(p.tokens, url.Values{"grant_type": {"client_credentials"}, "client_id": {p.id}, "client_secret": {p.secret}})
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if b := must(io.ReadAll(resp.Body)); !strings.Contains(string(b), "unsupported_grant_type") {
		t.Errorf("it knows client credentials, which nobody tries: status %d: %s", resp.StatusCode, b)
	}
	return p
}

// byVaultsProvider is a browser's way at Vault's OIDC provider, where Vault's own pages call
// its API with the token of who is logged in. The access token is opaque, the ID token is a JWT.
func byVaultsProvider() grant {
	var user *vaultapi.Client
	var logIn sync.Once
	return func(t *testing.T, p *realProvider) string {
		logIn.Do(func() { user = logInToVault(p, "auth/userpass/login/ada", map[string]any{"password": vaultPassword}) })
		query, proof := p.authorization()
		query.Set("scope", "openid orgkeys")
		resp, err := user.Logical().ReadRawWithData("identity/oidc/provider/orgkeys/authorize", query)
		if err != nil {
			t.Error(err)
			return ""
		}
		defer resp.Body.Close()
		var answer struct{ Code string }
		if err := json.NewDecoder(resp.Body).Decode(&answer); err != nil || answer.Code == "" {
			t.Errorf("no code: status %d, %v", resp.StatusCode, err)
		}
		proof.Set("code", answer.Code)
		return p.token(t, "id_token", proof, p.id, p.secret)
	}
}
