// Package pgtest starts real PostgreSQL servers, and standbys of them, for tests, in a directory of
// its own and on a Unix socket and a loopback port of its own.
package pgtest

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	_ "github.com/jackc/pgx/v5/stdlib" // registers the driver "pgx"

	"github.com/orgkeys/orgkeys/internal/freeport"
)

// Server is a running PostgreSQL.
type Server struct {
	dir  string
	bin  string
	port int
	cmd  *exec.Cmd
	as   *syscall.Credential
}

// Start initialises and starts a server. Settings are postgresql.conf lines
// such as "fsync=off". It fails when PostgreSQL is not installed.
func Start(settings ...string) (*Server, error) {
	bin, err := findBin()
	if err != nil {
		return nil, err
	}
	dir, err := os.MkdirTemp("", "orgkeys-pg-")
	if err != nil {
		return nil, err
	}
	s := &Server{dir: dir, bin: bin}
	if s.port, err = freeport.Find(); err == nil {
		err = s.unprivileged()
	}
	if err != nil {
		return nil, err
	}
	if out, err := s.command("initdb", "-D", s.data(), "-U", "orgkeys", "-A", "trust", "--no-sync", "-E", "UTF8", "--locale=C.UTF-8").CombinedOutput(); err != nil {
		return nil, fmt.Errorf("initdb: %w: %s", err, out)
	}
	return s, s.Restart(settings...)
}

// findBin finds the newest installed PostgreSQL.
func findBin() (string, error) {
	found, err := filepath.Glob("/usr/lib/postgresql/*/bin")
	if err != nil {
		return "", err
	}
	if len(found) == 0 {
		path, err := exec.LookPath("initdb")
		if err != nil {
			return "", errors.New("PostgreSQL is not installed: apt install postgresql")
		}
		return filepath.Dir(path), nil
	}
	slices.Sort(found)
	return found[len(found)-1], nil
}

// unprivileged finds the user to run as: PostgreSQL refuses root.
func (s *Server) unprivileged() error {
	if os.Getuid() != 0 {
		return nil
	}
	u, err := user.Lookup("postgres")
	if err != nil {
		return err
	}
	uid, uidErr := strconv.Atoi(u.Uid)
	gid, gidErr := strconv.Atoi(u.Gid)
	s.as = &syscall.Credential{Uid: uint32(uid), Gid: uint32(gid)}
	return errors.Join(uidErr, gidErr, os.Chown(s.dir, uid, gid))
}

func (s *Server) data() string { return filepath.Join(s.dir, "data") }

func (s *Server) command(name string, args ...string) *exec.Cmd {
	cmd := exec.Command(filepath.Join(s.bin, name), args...)
	cmd.Dir = s.dir
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: s.as, Pdeathsig: syscall.SIGKILL}
	return cmd
}

// Restart starts the server, after stopping it where it runs.
func (s *Server) Restart(settings ...string) error {
	if err := s.Stop(); err != nil {
		return err
	}
	args := []string{"-D", s.data(), "-k", s.dir, "-h", "127.0.0.1", "-p", strconv.Itoa(s.port), "-c", "logging_collector=off"}
	for _, setting := range settings {
		args = append(args, "-c", setting)
	}
	s.cmd = s.command("postgres", args...)
	if err := s.cmd.Start(); err != nil {
		return err
	}
	return s.ready()
}

func (s *Server) ready() error {
	db, err := sql.Open("pgx", s.URL("postgres"))
	if err != nil {
		return err
	}
	defer db.Close()
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	for db.PingContext(ctx) != nil {
		select {
		case <-ctx.Done():
			return errors.New("PostgreSQL did not start within 30 s")
		case <-time.After(50 * time.Millisecond):
		}
	}
	return nil
}

// Stop ends the server at once, as an administrator does in a hurry.
func (s *Server) Stop() error {
	if s.cmd == nil {
		return nil
	}
	err := s.cmd.Process.Signal(syscall.SIGQUIT)
	_ = s.cmd.Wait() // an immediate shutdown is no clean exit
	s.cmd = nil
	return err
}

// Close stops the server and removes its directory.
func (s *Server) Close() error { return errors.Join(s.Stop(), os.RemoveAll(s.dir)) }

// URL is a database's location.
func (s *Server) URL(database string) string {
	return fmt.Sprintf("postgres://orgkeys@127.0.0.1:%d/%s?sslmode=disable", s.port, database)
}

// NewDatabase creates an empty database and returns its URL.
func (s *Server) NewDatabase(name string) (string, error) {
	db, err := sql.Open("pgx", s.URL("postgres"))
	if err != nil {
		return "", err
	}
	_, err = db.Exec("CREATE DATABASE " + `"` + strings.ReplaceAll(name, `"`, "") + `"`)
	return s.URL(name), errors.Join(err, db.Close())
}
