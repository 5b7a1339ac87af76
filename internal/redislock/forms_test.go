package redislock_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"log/slog"
	"math/big"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/orgkeys/orgkeys/internal/freeport"
	"github.com/orgkeys/orgkeys/internal/redislock"
)

// authority is a CA and what it has signed, as files.
type authority struct {
	dir  string
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

func newAuthority(t *testing.T) *authority {
	t.Helper()
	a := &authority{dir: t.TempDir()}
	a.sign(t, "ca", true)
	return a
}

func (a *authority) file(name string) string { return filepath.Join(a.dir, name) }

func (a *authority) sign(t *testing.T, name string, isCA bool) {
	t.Helper()
	a.signFor(t, name, isCA, net.IPv4(127, 0, 0, 1))
}

func (a *authority) signFor(t *testing.T, name string, isCA bool, ip net.IP) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(t, err)
	template := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: name}, IsCA: isCA, BasicConstraintsValid: true,
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), IPAddresses: []net.IP{ip},
		KeyUsage: x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign,
	}
	parent, by := template, key
	if !isCA {
		parent, by = a.cert, a.key
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, &key.PublicKey, by)
	must(t, err)
	if isCA {
		a.key = key
		a.cert, err = x509.ParseCertificate(der)
		must(t, err)
	}
	private, err := x509.MarshalPKCS8PrivateKey(key)
	must(t, err)
	must(t, os.WriteFile(a.file(name+".crt"), pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), 0o644))
	must(t, os.WriteFile(a.file(name+".key"), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: private}), 0o600))
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// run starts a Redis program and waits until its port is open.
func run(t *testing.T, port int, name string, args ...string) (kill func()) {
	t.Helper()
	return runAt(t, fmt.Sprintf("127.0.0.1:%d", port), name, args...)
}

func runAt(t *testing.T, address, name string, args ...string) (kill func()) {
	t.Helper()
	cmd := exec.Command(name, args...)
	cmd.Dir = t.TempDir()
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	must(t, cmd.Start())
	kill = sync.OnceFunc(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait() // it was killed
	})
	t.Cleanup(kill)
	eventually(t, name+" listens", func() error {
		conn, err := net.Dial("tcp", address)
		if err == nil {
			conn.Close()
		}
		return err
	})
	return kill
}

func eventually(t *testing.T, what string, try func() error) {
	t.Helper()
	deadline := time.Now().Add(30 * time.Second)
	for {
		err := try()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("%s: not within 30 s: %v", what, err)
		}
		time.Sleep(50 * time.Millisecond)
	}
}

func port(t *testing.T) int {
	t.Helper()
	p, err := freeport.Find()
	must(t, err)
	return p
}

// check locks, and returns what Healthy says.
func check(t *testing.T, c redislock.Config) error {
	t.Helper()
	l, err := redislock.Open(c, slog.New(slog.DiscardHandler))
	must(t, err)
	defer l.Close()
	if err := l.Healthy(within(t, 5*time.Second)); err != nil {
		return err
	}
	unlock, err := l.Lock(within(t, 5*time.Second), "acme")
	if err != nil {
		return err
	}
	unlock()
	return nil
}

func TestTLS(t *testing.T) {
	a, foreign := newAuthority(t), newAuthority(t)
	a.sign(t, "server", false)
	a.sign(t, "client", false)
	p := port(t)
	run(t, p, "redis-server", "--port", "0", "--tls-port", fmt.Sprint(p), "--bind", "127.0.0.1", "--save", "",
		"--tls-cert-file", a.file("server.crt"), "--tls-key-file", a.file("server.key"), "--tls-ca-cert-file", a.file("ca.crt"), "--tls-auth-clients", "yes")
	url := fmt.Sprintf("rediss://127.0.0.1:%d", p)
	good := redislock.Config{URL: url, CAFile: a.file("ca.crt"), CertFile: a.file("client.crt"), KeyFile: a.file("client.key")}
	eventually(t, "a lock with a client certificate", func() error { return check(t, good) })
	for name, c := range map[string]redislock.Config{
		"without a client certificate": {URL: url, CAFile: a.file("ca.crt")},
		"of another authority":         {URL: url, CAFile: foreign.file("ca.crt"), CertFile: good.CertFile, KeyFile: good.KeyFile},
		"of no known authority":        {URL: url},
		"without TLS":                  {URL: strings.Replace(url, "rediss", "redis", 1)},
	} {
		if err := check(t, c); !errors.Is(err, redislock.ErrTLS) {
			t.Errorf("%s: %v", name, err)
		}
	}
	authorities, err := os.ReadFile(a.file("ca.crt"))
	if err != nil {
		t.Fatal(err)
	}
	loose := filepath.Join(t.TempDir(), "ca.crt")
	if err := errors.Join(os.WriteFile(loose, authorities, 0o600), os.Chmod(loose, 0o666)); err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]redislock.Config{
		"no such file":        {URL: url, CAFile: "/nonexistent"},
		"no certificate":      {URL: url, CAFile: a.file("ca.key")},
		"writable by all":     {URL: url, CAFile: loose, CertFile: good.CertFile, KeyFile: good.KeyFile},
		"not the key of it":   {URL: url, CertFile: a.file("client.crt"), KeyFile: a.file("server.key")},
		"a key without a key": {URL: url, CertFile: a.file("client.crt"), KeyFile: a.file("ca.crt")},
	} {
		if l, err := redislock.Open(c, slog.New(slog.DiscardHandler)); err == nil {
			l.Close()
			t.Errorf("%s: opened", name)
		}
	}
}

// acl are the arguments that give a server a user with the least rights that
// the documents name, and nobody else any.
func acl(more ...string) []string {
	args := []string{"--user", "default", "off", "--user", "orgkeys", "on", ">password", "~orgkeys:quota:*", "resetchannels", "-@all"}
	return append(append(args, strings.Fields(redislock.Commands)...), more...)
}

func TestTheLeastRightsSuffice(t *testing.T) {
	text, err := os.ReadFile("../../docs/operations.md")
	if err != nil || !strings.Contains(string(text), "~orgkeys:quota:* resetchannels -@all "+redislock.Commands+"\n") {
		t.Errorf("docs/operations.md names other rights, or none: %v", err)
	}
	s := start(t, acl()...)
	if err := check(t, redislock.Config{URL: "redis://orgkeys:password@" + s.Addr()}); err != nil {
		t.Error(err)
	}
	if err := check(t, redislock.Config{URL: "redis://orgkeys:wrong@" + s.Addr()}); !errors.Is(err, redislock.ErrLogin) {
		t.Errorf("a wrong password: %v", err)
	}
	for _, needed := range []string{"set", "get", "del", "evalsha"} {
		s := start(t, acl("-"+needed)...)
		if err := check(t, redislock.Config{URL: "redis://orgkeys:password@" + s.Addr()}); !errors.Is(err, redislock.ErrPermission) {
			t.Errorf("without %s: %v", needed, err)
		}
	}
}

func TestFullMemoryIsSaid(t *testing.T) {
	s := start(t, "--maxmemory", "1", "--maxmemory-policy", "noeviction")
	if err := check(t, redislock.Config{URL: s.URL()}); !errors.Is(err, redislock.ErrMemory) {
		t.Error(err)
	}
}

// A cluster of three, with the least rights, by two of its nodes.
func TestCluster(t *testing.T) {
	var addrs []string
	for range 3 {
		p := port(t)
		bus := port(t)
		file := filepath.Join(t.TempDir(), "node.conf")
		must(t, os.WriteFile(file, fmt.Appendf(nil, "port %d\nbind 127.0.0.1\nsave \"\"\ncluster-enabled yes\ncluster-port %d\n"+
			"user default off\nuser admin on nopass ~* &* +@all\nuser orgkeys on >password ~orgkeys:quota:* resetchannels -@all %s\n", p, bus, redislock.Commands), 0o600))
		run(t, p, "redis-server", file)
		addrs = append(addrs, fmt.Sprintf("127.0.0.1:%d", p))
	}
	create := append([]string{"--user", "admin", "--pass", "x", "--no-auth-warning", "--cluster", "create"}, append(addrs, "--cluster-yes")...)
	if out, err := exec.Command("redis-cli", create...).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	url := "redis://orgkeys:password@" + addrs[0]
	eventually(t, "a lock in the cluster", func() error { return check(t, redislock.Config{URL: url + "?addr=" + addrs[1]}) })
	moved := false
	for range 20 { // probes are spread over the nodes
		moved = moved || errors.Is(check(t, redislock.Config{URL: url}), redislock.ErrMoved)
	}
	if !moved {
		t.Error("one node, asked as if it were alone, never said that it is not")
	}
}

// Each node of a cluster has a certificate of its own host.
func TestAClusterWithTLSOnSeveralHosts(t *testing.T) {
	a := newAuthority(t)
	files := func(name string) []string {
		return []string{"--tls-cert-file", a.file(name + ".crt"), "--tls-key-file", a.file(name + ".key"), "--tls-ca-cert-file", a.file("ca.crt"), "--tls-auth-clients", "no"}
	}
	var addrs []string
	for i := range 3 {
		host, name := net.IPv4(127, 0, 0, byte(i+1)), fmt.Sprintf("node-%d", i)
		a.signFor(t, name, false, host)
		addr := fmt.Sprintf("%s:%d", host, port(t))
		_, p, _ := net.SplitHostPort(addr)
		runAt(t, addr, "redis-server", append([]string{"--port", "0", "--tls-port", p, "--bind", host.String(), "--bind-source-addr", host.String(), "--cluster-announce-ip", host.String(),
			"--save", "", "--cluster-enabled", "yes",
			"--cluster-port", fmt.Sprint(port(t)), "--tls-cluster", "yes"}, files(name)...)...)
		addrs = append(addrs, addr)
	}
	create := append([]string{"20", "redis-cli", "--tls", "--cacert", a.file("ca.crt"), "--cluster", "create"}, append(addrs, "--cluster-yes")...)
	if out, err := exec.Command("timeout", create...).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	c := redislock.Config{URL: "rediss://" + addrs[0] + "?addr=" + addrs[1], CAFile: a.file("ca.crt")}
	eventually(t, "a lock in the cluster", func() error { return check(t, c) })
	for range 10 { // probes are spread over the nodes
		if err := check(t, c); err != nil {
			t.Fatal(err)
		}
	}
}

// Sentinels know the primary, also the next one. The URL's user is the primary's,
// unless that one is given apart; with TLS each host has a certificate of its own.
func TestSentinels(t *testing.T) {
	for name, tt := range map[string]struct {
		theirs string // the sentinels' password
		tls    bool
		user   string
		more   string
	}{
		"without a password of their own": {"", false, "orgkeys:password@", ""},
		"with one":                        {"theirs", false, ":theirs@", "&username=orgkeys&password=password"},
		"with TLS":                        {"", true, "orgkeys:password@", ""},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			a := newAuthority(t)
			listen := func(host net.IP, port int) (text string) {
				if !tt.tls {
					return fmt.Sprintf("port %d\nbind %s\nbind-source-addr %s\n", port, host, host)
				}
				name := fmt.Sprintf("host-%d", port)
				a.signFor(t, name, false, host)
				return fmt.Sprintf("port 0\ntls-port %d\nbind %s\nbind-source-addr %s\ntls-cert-file %s\ntls-key-file %s\ntls-ca-cert-file %s\ntls-auth-clients no\ntls-replication yes\n",
					port, host, host, a.file(name+".crt"), a.file(name+".key"), a.file("ca.crt"))
			}
			runWith := func(host net.IP, port int, text string, args ...string) (kill func()) {
				file := filepath.Join(t.TempDir(), "redis.conf")
				must(t, os.WriteFile(file, []byte(listen(host, port)+text), 0o600))
				return runAt(t, fmt.Sprintf("%s:%d", host, port), "redis-server", append([]string{file}, args...)...)
			}
			server := "save \"\"\nrequirepass secret\nmasterauth secret\nuser orgkeys on >password ~orgkeys:quota:* resetchannels -@all " + redislock.Commands + "\n"
			first, second := net.IPv4(127, 0, 0, 2), net.IPv4(127, 0, 0, 3)
			primary, replica := port(t), port(t)
			kill := runWith(first, primary, server)
			runWith(second, replica, server+fmt.Sprintf("replicaof %s %d\n", first, primary))
			sentinel := fmt.Sprintf("sentinel monitor orgkeys %s %d 1\nsentinel auth-pass orgkeys secret\nsentinel down-after-milliseconds orgkeys 500\nsentinel failover-timeout orgkeys 3000\n", first, primary)
			if tt.theirs != "" {
				sentinel += "requirepass " + tt.theirs + "\nsentinel sentinel-pass " + tt.theirs + "\n"
			}
			var addrs []string
			for i := range 2 {
				host, p := net.IPv4(127, 0, 0, byte(4+i)), port(t)
				runWith(host, p, sentinel, "--sentinel")
				addrs = append(addrs, fmt.Sprintf("%s:%d", host, p))
			}
			c := redislock.Config{URL: "redis://" + tt.user + addrs[0] + "?master_name=orgkeys&addr=" + addrs[1] + tt.more}
			alone := redislock.Config{URL: fmt.Sprintf("redis://orgkeys:password@%s:%d", second, replica)}
			if tt.tls {
				c.URL, c.CAFile = strings.Replace(c.URL, "redis:", "rediss:", 1), a.file("ca.crt")
				alone.URL, alone.CAFile = strings.Replace(alone.URL, "redis:", "rediss:", 1), c.CAFile
			}
			eventually(t, "a lock by sentinels", func() error { return check(t, c) })
			eventually(t, "the replica is one", func() error {
				if err := check(t, alone); !errors.Is(err, redislock.ErrReadOnly) {
					return fmt.Errorf("the replica: %w", err)
				}
				return nil
			})
			time.Sleep(time.Second) // the sentinels know each other and the replica
			kill()
			eventually(t, "a lock of the next primary", func() error { return check(t, c) })
		})
	}
}
