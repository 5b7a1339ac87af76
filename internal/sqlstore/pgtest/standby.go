package pgtest

import (
	"database/sql"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/orgkeys/orgkeys/internal/freeport"
)

// Standby makes a streaming standby of the server, which calls itself name to
// it, and starts it. The server waits for its acknowledgements once its
// synchronous_standby_names has name.
func (s *Server) Standby(name string, settings ...string) (*Server, error) {
	dir, err := os.MkdirTemp("", "orgkeys-pg-")
	if err != nil {
		return nil, err
	}
	b := &Server{dir: dir, bin: s.bin}
	if b.port, err = freeport.Find(); err == nil {
		err = b.unprivileged()
	}
	if err != nil {
		return nil, err
	}
	return b, b.Rebuild(s, name, settings...)
}

// Kill ends the server and all its processes with -9, as a power cut does.
func (s *Server) Kill() error {
	if s.cmd == nil {
		return nil
	}
	pid := s.cmd.Process.Pid
	// The postmaster is stopped first: it must not start new processes for those that die.
	err := syscall.Kill(pid, syscall.SIGSTOP)
	b, readErr := os.ReadFile(fmt.Sprintf("/proc/%d/task/%d/children", pid, pid))
	for _, child := range strings.Fields(string(b)) {
		n, convErr := strconv.Atoi(child)
		err = errors.Join(err, convErr, ignoreGone(syscall.Kill(n, syscall.SIGKILL)))
	}
	err = errors.Join(err, readErr, s.cmd.Process.Kill())
	_ = s.cmd.Wait() // it was killed
	s.cmd = nil
	return err
}

func ignoreGone(err error) error {
	if errors.Is(err, syscall.ESRCH) {
		return nil
	}
	return err
}

// Query asks the server, as its superuser, for one row.
func (s *Server) Query(query string, into ...any) error {
	db, err := sql.Open("pgx", s.URL("postgres"))
	if err != nil {
		return err
	}
	return errors.Join(db.QueryRow(query).Scan(into...), db.Close())
}

// Set changes a setting of the running server, in its configuration.
func (s *Server) Set(name, value string) error {
	db, err := sql.Open("pgx", s.URL("postgres"))
	if err != nil {
		return err
	}
	_, err = db.Exec("ALTER SYSTEM SET " + name + " = '" + strings.ReplaceAll(value, "'", "''") + "'")
	if err == nil {
		_, err = db.Exec("SELECT pg_reload_conf()")
	}
	return errors.Join(err, db.Close())
}

// Streaming waits until so many standbys follow the server.
func (s *Server) Streaming(standbys int) error {
	for deadline := time.Now().Add(30 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		var n int
		err := s.Query("SELECT count(*) FROM pg_stat_replication WHERE state = 'streaming'", &n)
		if err == nil && n == standbys {
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("%d standbys follow, not %d: %w", n, standbys, err)
		}
	}
}

// Shell runs lines as the server's user, in a directory of its own, with PGDATA.
func (s *Server) Shell(lines string, env ...string) error {
	cmd := exec.Command("/bin/sh", "-euc", lines)
	cmd.Dir = s.dir
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: s.as, Pdeathsig: syscall.SIGKILL}
	cmd.Env = append(env, "PATH="+s.bin+":"+os.Getenv("PATH"), "PGDATA="+s.data(), "PGHOST=127.0.0.1", fmt.Sprintf("PGPORT=%d", s.port), "PGUSER=orgkeys")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%s: %w: %s", lines, err, out)
	}
	return nil
}

// Dir is the directory that Shell runs in.
func (s *Server) Dir() string { return s.dir }

// Port is the loopback port that the server listens on.
func (s *Server) Port() int { return s.port }

// Rebuild makes a stopped server a standby of primary, whatever it was before, and
// starts it.
func (s *Server) Rebuild(primary *Server, name string, settings ...string) error {
	if err := os.RemoveAll(s.data()); err != nil {
		return err
	}
	source := fmt.Sprintf("host=127.0.0.1 port=%d user=orgkeys application_name=%s", primary.port, name)
	if out, err := s.command("pg_basebackup", "-D", s.data(), "-d", source, "-R", "-X", "stream", "--checkpoint=fast", "--no-sync").CombinedOutput(); err != nil {
		return fmt.Errorf("pg_basebackup: %w: %s", err, out)
	}
	return s.Restart(settings...)
}
