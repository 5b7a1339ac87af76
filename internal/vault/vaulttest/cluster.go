package vaulttest

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/hashicorp/vault/api"

	"github.com/orgkeys/orgkeys/internal/freeport"
	"github.com/orgkeys/orgkeys/internal/sourcetree"
)

// Cluster is three Vaults that share their storage by raft, with TLS, behind a
// haproxy that sends everybody to the active one, as docs/operations.md has it.
// Each node has an audit file of its own.
type Cluster struct {
	*Server // reached through haproxy; never started or stopped itself
	Nodes   []*Server

	haproxy *exec.Cmd
}

// StartCluster runs a new cluster below dir, unsealed, with its audit device
// enabled but nothing of orgkeys in it yet.
func StartCluster(ctx context.Context, dir string) (*Cluster, error) {
	binary, err := Binary()
	if err != nil {
		return nil, err
	}
	c := &Cluster{Server: &Server{Dir: dir, binary: binary, CACert: filepath.Join(dir, "tls.crt")}}
	if err := writeCertificate(c.CACert, filepath.Join(dir, "tls.key")); err != nil {
		return nil, err
	}
	for i := range 3 {
		node, err := c.newNode(fmt.Sprintf("n%d", i+1))
		if err != nil {
			return nil, err
		}
		c.Nodes = append(c.Nodes, node)
	}
	if err := c.start(ctx); err != nil {
		return nil, errors.Join(err, c.Stop())
	}
	return c, nil
}

func (c *Cluster) newNode(name string) (*Server, error) {
	dir := filepath.Join(c.Dir, name)
	if err := os.MkdirAll(filepath.Join(dir, "raft"), 0o700); err != nil {
		return nil, err
	}
	port, err := freeport.Find(1)
	if err != nil {
		return nil, err
	}
	return &Server{
		Dir: dir, binary: c.binary, CACert: c.CACert, AuditFile: filepath.Join(dir, "audit.log"),
		Address: fmt.Sprintf("https://127.0.0.1:%d", port), cluster: fmt.Sprintf("https://127.0.0.1:%d", port+1),
	}, nil
}

// configure writes a node's configuration. A node joins whichever of the others
// it finds, and takes over fast.
func (c *Cluster) configure(node *Server) error {
	var text strings.Builder
	fmt.Fprintf(&text, "storage \"raft\" {\n  path = %q\n  node_id = %q\n  performance_multiplier = 1\n", filepath.Join(node.Dir, "raft"), filepath.Base(node.Dir))
	for _, other := range c.Nodes {
		if other != node {
			fmt.Fprintf(&text, "  retry_join {\n    leader_api_addr = %q\n    leader_ca_cert_file = %q\n  }\n", other.Address, c.CACert)
		}
	}
	fmt.Fprintf(&text, "}\nlistener \"tcp\" {\n  address = %q\n  cluster_address = %q\n  tls_cert_file = %q\n  tls_key_file = %q\n}\napi_addr = %q\ncluster_addr = %q\ndisable_mlock = true\n",
		host(node.Address), host(node.cluster), c.CACert, filepath.Join(c.Dir, "tls.key"), node.Address, node.cluster)
	return os.WriteFile(filepath.Join(node.Dir, "server.hcl"), []byte(text.String()), 0o600)
}

func host(address string) string { return strings.TrimPrefix(address, "https://") }

func (c *Cluster) start(ctx context.Context) error {
	for i, node := range c.Nodes {
		if err := c.configure(node); err != nil {
			return err
		}
		if err := node.run(ctx); err != nil {
			return err
		}
		if i == 0 {
			if err := c.found(ctx, node); err != nil {
				return err
			}
		}
		node.RootToken, node.unseal = c.RootToken, c.Server.unseal
		if err := node.join(ctx); err != nil {
			return err
		}
	}
	if err := c.balance(); err != nil {
		return err
	}
	root, err := c.Client(c.RootToken)
	if err != nil {
		return err
	}
	if err := c.AwaitActive(ctx); err != nil {
		return err
	}
	// Relative, so that each node has a file of its own.
	err = root.Sys().EnableAuditWithOptionsWithContext(ctx, "file", &api.EnableAuditOptions{Type: "file", Options: map[string]string{"file_path": "audit.log"}})
	if err != nil {
		// The client sends a request again whose answer it did not get.
		if there, listErr := root.Sys().ListAuditWithContext(ctx); listErr != nil || there["file/"] == nil {
			return fmt.Errorf("enabling the audit device: %w", errors.Join(err, listErr))
		}
	}
	return c.awaitVoters(ctx, root)
}

// awaitVoters waits until every node may be elected: raft takes a new one in as a
// non-voter, and autopilot gives it its vote some seconds later. Without the
// votes of the others, nobody follows a leader that is gone.
func (c *Cluster) awaitVoters(ctx context.Context, root *api.Client) error {
	ctx, cancel := context.WithTimeout(ctx, readyWithin)
	defer cancel()
	for {
		voters := 0
		answer, err := root.Logical().ReadWithContext(ctx, "sys/storage/raft/configuration")
		if err == nil && answer != nil {
			config, _ := answer.Data["config"].(map[string]any)
			servers, _ := config["servers"].([]any)
			for _, server := range servers {
				if s, _ := server.(map[string]any); s["voter"] == true {
					voters++
				}
			}
		}
		if voters == len(c.Nodes) {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%d of %d nodes have a vote: %w", voters, len(c.Nodes), errors.Join(ctx.Err(), err))
		case <-time.After(200 * time.Millisecond):
		}
	}
}

func (c *Cluster) found(ctx context.Context, node *Server) error {
	client, err := node.Client("")
	if err != nil {
		return err
	}
	made, err := client.Sys().InitWithContext(ctx, &api.InitRequest{SecretShares: 1, SecretThreshold: 1})
	if err != nil {
		return fmt.Errorf("initializing the cluster: %w", err)
	}
	c.RootToken, c.Server.unseal = made.RootToken, made.Keys[0]
	return nil
}

// join unseals a node, which first has to be given what the others have.
func (s *Server) join(ctx context.Context) error {
	client, err := s.Client("")
	if err != nil {
		return err
	}
	deadline := time.Now().Add(readyWithin)
	for {
		if _, err = client.Sys().UnsealWithContext(ctx, s.unseal); err == nil {
			break
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("unsealing a node: %w", err)
		}
		time.Sleep(100 * time.Millisecond)
	}
	return s.await(ctx, "to join", func(h health) bool { return h.Initialized && !h.Sealed })
}

// Rejoin starts a node that was stopped or killed, and unseals it.
func (c *Cluster) Rejoin(ctx context.Context, node *Server) error {
	if err := node.run(ctx); err != nil {
		return err
	}
	return node.join(ctx)
}

// UnsealNode unseals a node that was sealed.
func (c *Cluster) UnsealNode(ctx context.Context, node *Server) error { return node.join(ctx) }

// Active is the node that serves, or nil while none does.
func (c *Cluster) Active(ctx context.Context) *Server {
	client, err := c.HTTP()
	if err != nil {
		return nil
	}
	defer client.CloseIdleConnections()
	for _, node := range c.Nodes {
		if h, err := readHealth(ctx, client, node.Address); err == nil && h.Initialized && !h.Sealed && !h.Standby {
			return node
		}
	}
	return nil
}

// AwaitActive waits until haproxy leads to an active node.
func (c *Cluster) AwaitActive(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, readyWithin)
	defer cancel()
	client, err := c.HTTP()
	if err != nil {
		return err
	}
	defer client.CloseIdleConnections()
	for {
		if h, err := readHealth(ctx, client, c.Address); err == nil && h.Initialized && !h.Sealed && !h.Standby {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("waiting for an active node: %w", ctx.Err())
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// AwaitAnother waits until another node than the one given is active, and
// haproxy leads to it.
func (c *Cluster) AwaitAnother(ctx context.Context, node *Server) error {
	ctx, cancel := context.WithTimeout(ctx, readyWithin)
	defer cancel()
	for {
		if active := c.Active(ctx); active != nil && active != node {
			return c.AwaitActive(ctx)
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("waiting for another active node: %w", ctx.Err())
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// StepDown has the active node hand over.
func (c *Cluster) StepDown(ctx context.Context, node *Server) error {
	client, err := node.Client(c.RootToken)
	if err != nil {
		return err
	}
	return client.Sys().StepDownWithContext(ctx)
}

// AuditFiles are those of all nodes that ever wrote one.
func (c *Cluster) AuditFiles() []string {
	var files []string
	for _, node := range c.Nodes {
		if info, err := os.Stat(node.AuditFile); err == nil && info.Size() > 0 {
			files = append(files, node.AuditFile)
		}
	}
	return files
}

const documentedCA = "/etc/haproxy/vault-ca.pem"

// documentedBalancer is haproxy's section in docs/operations.md, without its servers.
func documentedBalancer() (string, error) {
	root, err := sourcetree.Root()
	if err != nil {
		return "", err
	}
	text, err := os.ReadFile(filepath.Join(root, "docs", "operations.md"))
	if err != nil {
		return "", err
	}
	_, after, found := strings.Cut(string(text), "```text\nlisten vault\n")
	section, _, ended := strings.Cut(after, "  server n1 ")
	if !found || !ended || !strings.Contains(section, "bind :8200\n") || !strings.Contains(section, documentedCA) {
		return "", errors.New("docs/operations.md shows no haproxy in front of a cluster that tests can use")
	}
	return "listen vault\n" + section, nil
}

// balance runs haproxy, which asks each node whether it is the active one.
func (c *Cluster) balance() error {
	port, err := freeport.Find()
	if err != nil {
		return err
	}
	c.Address = fmt.Sprintf("https://127.0.0.1:%d", port)
	documented, err := documentedBalancer()
	if err != nil {
		return err
	}
	var text strings.Builder
	text.WriteString("defaults\n  timeout connect 2s\n  timeout client 60s\n  timeout server 60s\n")
	text.WriteString(strings.NewReplacer("bind :8200", fmt.Sprintf("bind 127.0.0.1:%d", port), documentedCA, c.CACert).Replace(documented))
	for _, node := range c.Nodes {
		fmt.Fprintf(&text, "  server %s %s\n", filepath.Base(node.Dir), host(node.Address))
	}
	file := filepath.Join(c.Dir, "haproxy.cfg")
	if err := os.WriteFile(file, []byte(text.String()), 0o600); err != nil {
		return err
	}
	output, err := os.Create(filepath.Join(c.Dir, "haproxy.log"))
	if err != nil {
		return err
	}
	defer output.Close()
	c.haproxy = exec.Command("haproxy", "-db", "-f", file)
	c.haproxy.Stdout, c.haproxy.Stderr = output, output
	c.haproxy.SysProcAttr = ownProcess()
	if err := c.haproxy.Start(); err != nil {
		return fmt.Errorf("starting haproxy, of the Debian package haproxy: %w", err)
	}
	return nil
}

// Stop ends haproxy and every node.
func (c *Cluster) Stop() error {
	var failed []error
	if c.haproxy != nil {
		failed = append(failed, c.haproxy.Process.Kill())
		c.haproxy.Wait()
	}
	for _, node := range c.Nodes {
		if node.process != nil {
			failed = append(failed, node.Kill())
		}
	}
	return errors.Join(failed...)
}
