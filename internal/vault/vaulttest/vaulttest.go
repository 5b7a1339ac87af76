// Package vaulttest runs a real Vault for tests: the one of vault/devserver,
// in server mode with file storage, TLS and a file audit device, set up by the
// very files that operators use.
package vaulttest

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/go-json-experiment/json"
	"github.com/hashicorp/vault/api"

	"github.com/orgkeys/orgkeys/internal/freeport"
	"github.com/orgkeys/orgkeys/internal/sourcetree"
	"github.com/orgkeys/orgkeys/internal/vault"
)

const readyWithin = 60 * time.Second

// Server is a running Vault. Everything it writes is below Dir.
type Server struct {
	Dir       string
	Address   string // https URL
	CACert    string // file
	AuditFile string
	RootToken string

	binary  string
	unseal  string
	cluster string // URL for the other nodes, if it is one of several
	process *exec.Cmd
	exited  chan struct{}
}

// Binary is the Vault to run: ORGKEYS_TEST_VAULT, or what vault/devserver/build built.
func Binary() (string, error) {
	if path := os.Getenv("ORGKEYS_TEST_VAULT"); path != "" {
		return path, nil
	}
	root, err := sourcetree.Root()
	if err != nil {
		return "", err
	}
	hash := sha256.New()
	for _, name := range []string{"go.mod", "go.sum", "main.go"} {
		b, err := os.ReadFile(filepath.Join(root, "vault", "devserver", name))
		if err != nil {
			return "", err
		}
		hash.Write(b)
	}
	cache := os.Getenv("ORGKEYS_CACHE")
	if cache == "" {
		dir, err := os.UserCacheDir()
		if err != nil {
			return "", err
		}
		cache = filepath.Join(dir, "orgkeys")
	}
	path := filepath.Join(cache, fmt.Sprintf("vault-%x", hash.Sum(nil)[:8]))
	if _, err := os.Stat(path); err != nil {
		return "", fmt.Errorf("there is no Vault to test with: run vault/devserver/build (it takes about ten minutes once): %w", err)
	}
	return path, nil
}

// Start runs a new Vault below dir, unsealed, with its audit device enabled
// but nothing of orgkeys in it yet: Setup does that.
func Start(ctx context.Context, dir string) (*Server, error) {
	binary, err := Binary()
	if err != nil {
		return nil, err
	}
	s := &Server{Dir: dir, binary: binary, CACert: filepath.Join(dir, "tls.crt"), AuditFile: filepath.Join(dir, "audit.log")}
	if err := writeCertificate(s.CACert, filepath.Join(dir, "tls.key")); err != nil {
		return nil, err
	}
	if err := s.configure(); err != nil {
		return nil, err
	}
	if err := s.run(ctx); err != nil {
		return nil, err
	}
	if err := s.initialize(ctx); err != nil {
		return nil, errors.Join(err, s.Stop())
	}
	return s, nil
}

func (s *Server) configure() error {
	port, err := freeport.Find(1) // Vault listens for its cluster beside it
	if err != nil {
		return err
	}
	address := fmt.Sprintf("127.0.0.1:%d", port)
	s.Address = "https://" + address
	config := fmt.Sprintf(`storage "file" {
  path = %q
}
listener "tcp" {
  address       = %q
  tls_cert_file = %q
  tls_key_file  = %q
}
api_addr      = %q
disable_mlock = true
allow_audit_log_prefixing = true
raw_storage_endpoint = true
`, filepath.Join(s.Dir, "storage"), address, s.CACert, filepath.Join(s.Dir, "tls.key"), s.Address)
	return os.WriteFile(filepath.Join(s.Dir, "server.hcl"), []byte(config), 0o600)
}

func (s *Server) run(ctx context.Context) error {
	output, err := os.OpenFile(filepath.Join(s.Dir, "server.log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer output.Close()
	s.process = exec.Command(s.binary, "server", "-config="+filepath.Join(s.Dir, "server.hcl"))
	s.process.Dir = s.Dir
	s.process.Stdout, s.process.Stderr = output, output
	s.process.SysProcAttr = ownProcess()
	if err := s.process.Start(); err != nil {
		return fmt.Errorf("starting Vault: %w", err)
	}
	s.exited = make(chan struct{})
	go func() { s.process.Wait(); close(s.exited) }()
	return s.await(ctx, "to listen", func(h health) bool { return true })
}

type health struct {
	Initialized bool `json:"initialized"`
	Sealed      bool `json:"sealed"`
	Standby     bool `json:"standby"`
}

// await polls sys/health, which needs no token and leaves no audit entry.
func (s *Server) await(ctx context.Context, what string, ok func(health) bool) error {
	ctx, cancel := context.WithTimeout(ctx, readyWithin)
	defer cancel()
	client, err := s.HTTP()
	if err != nil {
		return err
	}
	defer client.CloseIdleConnections()
	for {
		if h, err := readHealth(ctx, client, s.Address); err == nil && ok(h) {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("waiting for Vault %s: %w", what, ctx.Err())
		case <-s.exited:
			log, _ := os.ReadFile(filepath.Join(s.Dir, "server.log"))
			return fmt.Errorf("the Vault exited: %s", log)
		case <-time.After(20 * time.Millisecond):
		}
	}
}

func readHealth(ctx context.Context, client *http.Client, address string) (health, error) {
	q, err := http.NewRequestWithContext(ctx, http.MethodGet, address+"/v1/sys/health", nil)
	if err != nil {
		return health{}, err
	}
	r, err := client.Do(q)
	if err != nil {
		return health{}, err
	}
	defer r.Body.Close()
	b, err := io.ReadAll(r.Body)
	if err != nil {
		return health{}, err
	}
	var h health
	return h, json.Unmarshal(b, &h)
}

func (s *Server) initialize(ctx context.Context) error {
	client, err := s.Client("")
	if err != nil {
		return err
	}
	made, err := client.Sys().InitWithContext(ctx, &api.InitRequest{SecretShares: 1, SecretThreshold: 1})
	if err != nil {
		return fmt.Errorf("initializing Vault: %w", err)
	}
	s.RootToken, s.unseal = made.RootToken, made.Keys[0]
	if err := s.Unseal(ctx); err != nil {
		return err
	}
	root, err := s.Client(s.RootToken)
	if err != nil {
		return err
	}
	err = root.Sys().EnableAuditWithOptionsWithContext(ctx, "file", &api.EnableAuditOptions{
		Type: "file", Options: map[string]string{"file_path": s.AuditFile},
	})
	if err != nil {
		return fmt.Errorf("enabling the audit device: %w", err)
	}
	return nil
}

// Seal seals the Vault.
func (s *Server) Seal(ctx context.Context) error {
	root, err := s.Client(s.RootToken)
	if err != nil {
		return err
	}
	return root.Sys().SealWithContext(ctx)
}

// Unseal unseals the Vault and waits until it serves.
func (s *Server) Unseal(ctx context.Context) error {
	client, err := s.Client("")
	if err != nil {
		return err
	}
	if _, err := client.Sys().UnsealWithContext(ctx, s.unseal); err != nil {
		return fmt.Errorf("unsealing Vault: %w", err)
	}
	return s.await(ctx, "to be unsealed", func(h health) bool { return h.Initialized && !h.Sealed && !h.Standby })
}

// Stop ends the Vault and waits for it.
func (s *Server) Stop() error {
	if err := s.process.Process.Signal(syscall.SIGTERM); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return err
	}
	select {
	case <-s.exited:
		return nil
	case <-time.After(20 * time.Second):
		return errors.Join(errors.New("the Vault did not stop when asked to"), s.Kill())
	}
}

// Kill ends the Vault at once, as a crash does.
func (s *Server) Kill() error {
	err := s.process.Process.Kill()
	<-s.exited
	if errors.Is(err, os.ErrProcessDone) {
		return nil
	}
	return err
}

// Restart starts a Vault that was stopped or killed, and unseals it.
func (s *Server) Restart(ctx context.Context) error {
	if err := s.run(ctx); err != nil {
		return err
	}
	return s.Unseal(ctx)
}

// Env is the environment that leads a Vault client here.
func (s *Server) Env() []string {
	return []string{"VAULT_ADDR=" + s.Address, "VAULT_CACERT=" + s.CACert}
}

// Client returns a plain client with the given token.
func (s *Server) Client(token string) (*api.Client, error) {
	config := api.DefaultConfig()
	if config.Error != nil {
		return nil, config.Error
	}
	config.Address = s.Address
	if err := config.ConfigureTLS(&api.TLSConfig{CACert: s.CACert}); err != nil {
		return nil, err
	}
	client, err := api.NewClient(config)
	if err != nil {
		return nil, err
	}
	client.SetToken(token)
	return client, nil
}

// HTTP returns an HTTP client that trusts the server's certificate.
func (s *Server) HTTP() (*http.Client, error) {
	config := api.DefaultConfig()
	if err := config.ConfigureTLS(&api.TLSConfig{CACert: s.CACert}); err != nil {
		return nil, err
	}
	return config.HttpClient, nil
}

// Setup runs vault/setup with a short-lived token of the policy in
// vault/setup.hcl, and returns what it printed.
func (s *Server) Setup(ctx context.Context, args ...string) (string, error) {
	root, err := sourcetree.Root()
	if err != nil {
		return "", err
	}
	policy, err := os.ReadFile(filepath.Join(root, "vault", "setup.hcl"))
	if err != nil {
		return "", err
	}
	client, err := s.Client(s.RootToken)
	if err != nil {
		return "", err
	}
	if err := client.Sys().PutPolicyWithContext(ctx, "orgkeys-setup", string(policy)); err != nil {
		return "", fmt.Errorf("writing the set-up's policy: %w", err)
	}
	secret, err := client.Auth().Token().CreateWithContext(ctx, &api.TokenCreateRequest{Policies: []string{"orgkeys-setup"}, TTL: "15m", NoDefaultPolicy: true})
	if err != nil {
		return "", fmt.Errorf("making the set-up's token: %w", err)
	}
	return s.RunSetup(ctx, secret.Auth.ClientToken, args...)
}

// RunSetup runs vault/setup with the given token, and returns what it printed.
// Of VAULT_ variables it gets those that a caller's shell may well have set
// and that change what Vault's command line prints.
func (s *Server) RunSetup(ctx context.Context, token string, args ...string) (string, error) {
	root, err := sourcetree.Root()
	if err != nil {
		return "", err
	}
	var output bytes.Buffer
	cmd := exec.CommandContext(ctx, filepath.Join(root, "vault", "setup"), args...)
	cmd.Env = append(withoutVault(os.Environ()), append(s.Env(), "VAULT_CLI="+s.binary, "VAULT_TOKEN="+token, "VAULT_FORMAT=json", "VAULT_WRAP_TTL=60")...)
	cmd.Stdout, cmd.Stderr = &output, &output
	if err := cmd.Run(); err != nil {
		return output.String(), fmt.Errorf("vault/setup: %w: %s", err, output.String())
	}
	return output.String(), nil
}

func withoutVault(env []string) []string {
	var kept []string
	for _, e := range env {
		if !strings.HasPrefix(e, "VAULT_") {
			kept = append(kept, e)
		}
	}
	return kept
}

// AppRole runs vault/setup if needed and returns the service's login, with
// credential files below the server's directory.
func (s *Server) AppRole(ctx context.Context) (*vault.AppRole, error) {
	dir := filepath.Join(s.Dir, "credentials")
	login := &vault.AppRole{RoleIDFile: filepath.Join(dir, "role_id"), SecretIDFile: filepath.Join(dir, "secret_id")}
	if _, err := os.Stat(login.SecretIDFile); err == nil {
		return login, nil
	}
	_, err := s.Setup(ctx, "--credentials", dir)
	return login, err
}

// BreakAudit makes the audit device's file unwritable, as a full disk does:
// where the file was is a directory. What was written stays beside it.
func (s *Server) BreakAudit() error {
	if err := os.Rename(s.AuditFile, s.AuditFile+".before"); err != nil {
		return err
	}
	if err := os.Mkdir(s.AuditFile, 0o700); err != nil {
		return err
	}
	return s.process.Process.Signal(syscall.SIGHUP) // Vault opens its audit files again
}

// MendAudit puts the file back.
func (s *Server) MendAudit() error {
	if err := os.Remove(s.AuditFile); err != nil {
		return err
	}
	if err := os.Rename(s.AuditFile+".before", s.AuditFile); err != nil {
		return err
	}
	return s.process.Process.Signal(syscall.SIGHUP)
}
