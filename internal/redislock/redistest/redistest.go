// Package redistest starts a real redis-server for tests, in a directory and
// on a loopback port of its own.
package redistest

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"syscall"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/orgkeys/orgkeys/internal/freeport"
)

// Server is a running Redis with an append-only file.
type Server struct {
	dir  string
	port int
	args []string
	cmd  *exec.Cmd
}

// Start starts a server with further arguments, such as "--requirepass", "x".
func Start(args ...string) (*Server, error) {
	if _, err := exec.LookPath("redis-server"); err != nil {
		return nil, errors.New("redis-server is not installed: apt install redis-server")
	}
	dir, err := os.MkdirTemp("", "orgkeys-redis-")
	if err != nil {
		return nil, err
	}
	port, err := freeport.Find()
	if err != nil {
		return nil, err
	}
	s := &Server{dir: dir, port: port, args: args}
	return s, s.Restart()
}

// Addr is the server's address.
func (s *Server) Addr() string { return fmt.Sprintf("127.0.0.1:%d", s.port) }

// URL is the server's location.
func (s *Server) URL() string { return "redis://" + s.Addr() }

// Signal sends the server a signal: SIGSTOP makes it hang, SIGCONT go on.
func (s *Server) Signal(sig syscall.Signal) error { return s.cmd.Process.Signal(sig) }

// Restart starts the server, after stopping it where it runs.
func (s *Server) Restart() error {
	if err := s.Stop(); err != nil {
		return err
	}
	args := append([]string{"--port", strconv.Itoa(s.port), "--bind", "127.0.0.1", "--dir", s.dir, "--appendonly", "yes", "--save", ""}, s.args...)
	s.cmd = exec.Command("redis-server", args...)
	s.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := s.cmd.Start(); err != nil {
		return err
	}
	deadline := time.Now().Add(10 * time.Second)
	for {
		err := s.ping()
		var refused redis.Error
		if err == nil || errors.As(err, &refused) { // NOAUTH is an answer too
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("redis-server did not start within 10 s: %w", err)
		}
		time.Sleep(20 * time.Millisecond)
	}
}

func (s *Server) ping() error {
	c := redis.NewClient(&redis.Options{Addr: s.Addr(), MaxRetries: -1})
	return errors.Join(c.Ping(context.Background()).Err(), c.Close())
}

// Flush makes the server forget everything.
func (s *Server) Flush(ctx context.Context) error {
	c := redis.NewClient(&redis.Options{Addr: s.Addr(), MaxRetries: -1})
	return errors.Join(c.FlushAll(ctx).Err(), c.Close())
}

// Stop kills the server.
func (s *Server) Stop() error {
	if s.cmd == nil {
		return nil
	}
	err := s.cmd.Process.Kill()
	_ = s.cmd.Wait() // it was killed
	s.cmd = nil
	return err
}

// Close stops the server and removes its directory.
func (s *Server) Close() error { return errors.Join(s.Stop(), os.RemoveAll(s.dir)) }
