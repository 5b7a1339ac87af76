package pgtest

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"time"

	"github.com/orgkeys/orgkeys/internal/freeport"
)

// logins are the roles that tests log in with, without passwords.
const logins = `"orgkeys" ""
"reader" ""
"replica_0" ""
"replica_1" ""
"replica_2" ""
`

// Pooler is a running PgBouncer before a Server.
type Pooler struct {
	port int
	user string // and password, of its URLs
	cmd  *exec.Cmd
	out  *bytes.Buffer
	done chan error
}

// Pooler starts a PgBouncer in a pool_mode: session, transaction or statement.
// Settings are further lines of its [pgbouncer] section, such as
// "default_pool_size = 5".
func (s *Server) Pooler(mode string, settings ...string) (*Pooler, error) {
	return s.pooler("orgkeys", logins, func(port int, users string) string {
		return fmt.Sprintf("[databases]\n* = host=127.0.0.1 port=%d\n[pgbouncer]\nlisten_addr = 127.0.0.1\nlisten_port = %d\nunix_socket_dir =\n"+
			"auth_type = trust\nauth_file = %s\npool_mode = %s\n%s\n", s.port, port, users, mode, strings.Join(settings, "\n"))
	})
}

// PoolerOf starts a PgBouncer with somebody's pgbouncer.ini, in which only what
// belongs to a machine is another: where the server is, the port, the users' file.
// Its users have a password.
func (s *Server) PoolerOf(ini string) (*Pooler, error) {
	const password = "of-the-pooler"
	return s.pooler("orgkeys:"+password, strings.ReplaceAll(logins, `""`, `"`+password+`"`), func(port int, users string) string {
		text := regexp.MustCompile(`host=\S+ port=\d+`).ReplaceAllString(ini, fmt.Sprintf("host=127.0.0.1 port=%d", s.port))
		text = regexp.MustCompile(`(?m)^listen_port = .*`).ReplaceAllString(text, fmt.Sprintf("listen_port = %d\nunix_socket_dir =", port))
		return regexp.MustCompile(`(?m)^auth_file = .*`).ReplaceAllString(text, "auth_file = "+users)
	})
}

func (s *Server) pooler(user, logins string, ini func(port int, users string) string) (*Pooler, error) {
	if _, err := exec.LookPath("pgbouncer"); err != nil {
		return nil, errors.New("PgBouncer is not installed: apt install pgbouncer")
	}
	port, err := freeport.Find()
	if err != nil {
		return nil, err
	}
	// Files of its own: another pooler may just be reading what this one writes.
	users, file := filepath.Join(s.dir, fmt.Sprintf("users-%d.txt", port)), filepath.Join(s.dir, fmt.Sprintf("pgbouncer-%d.ini", port))
	if err := errors.Join(os.WriteFile(users, []byte(logins), 0o644), os.WriteFile(file, []byte(ini(port, users)), 0o644)); err != nil {
		return nil, err
	}
	cmd := exec.Command("pgbouncer", file)
	cmd.Dir = s.dir
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: s.as, Pdeathsig: syscall.SIGKILL}
	p := &Pooler{port, user, cmd, new(bytes.Buffer), make(chan error, 1)}
	cmd.Stderr = p.out
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	go func() { p.done <- cmd.Wait() }()
	return p, p.ready()
}

// ready waits until the pooler listens.
func (p *Pooler) ready() error {
	deadline := time.Now().Add(10 * time.Second)
	for {
		conn, err := net.Dial("tcp", fmt.Sprintf("127.0.0.1:%d", p.port))
		if err == nil {
			return conn.Close()
		}
		if time.Now().After(deadline) {
			return errors.Join(fmt.Errorf("PgBouncer did not start within 10 s: %w", err), p.Close())
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// URL is a database's location behind the pooler.
func (p *Pooler) URL(database string) string {
	return fmt.Sprintf("postgres://%s@127.0.0.1:%d/%s?sslmode=disable", p.user, p.port, database)
}

// Close ends the pooler, and reports an error if it has ended by itself.
func (p *Pooler) Close() error {
	select {
	case err := <-p.done:
		return fmt.Errorf("PgBouncer ended by itself: %v: %s", err, p.out)
	default:
	}
	err := p.cmd.Process.Kill()
	<-p.done // it was killed
	return err
}
