package tpmdevice

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"github.com/google/go-tpm/tpm2"
	"golang.org/x/sys/unix"
)

const (
	maxResponse    = 4096 // bytes; what a TPM's device gives at once
	responseHeader = 10   // tag, size, response code
	tagOf12        = 0xc4 // of a TPM 1.2's answers (TPM_TAG_RSP_COMMAND)
	// commandTime bounds one command with its answer: making an RSA key may take a
	// slow TPM half a minute.
	commandTime = 90 * time.Second
	// retryTime is how long a TPM is asked again that says that it is busy.
	retryTime = 20 * time.Second
)

// connection is an open TPM. It is tpm2's transport.TPM, and keeps the response
// codes that go-tpm's own loses when it has asked too often.
type connection struct {
	ctx  context.Context
	path string
	file interface {
		io.ReadWriteCloser
		SetDeadline(time.Time) error
	}
}

// open opens a TPM's device, or a Unix socket behind which one is, such as swtpm's.
func open(ctx context.Context, path string) (*connection, error) {
	c := &connection{ctx: ctx, path: path}
	info, err := os.Stat(path)
	switch {
	case err != nil:
	case info.Mode()&fs.ModeSocket != 0:
		c.file, err = net.DialTimeout("unix", path, commandTime)
	case info.Mode()&fs.ModeCharDevice == 0:
		return nil, fmt.Errorf("%w: it is neither a device nor a socket", ErrNotTPM)
	default:
		// Nothing is written to what may do something else with it.
		if class := classOf(info); class != "" && class != "tpm" && class != "tpmrm" {
			return nil, fmt.Errorf("%w: it is a device of class %s", ErrNotTPM, class)
		}
		c.file, err = openDevice(path)
	}
	switch {
	case err == nil:
		return c, nil
	case errors.Is(err, syscall.EBUSY), errors.Is(err, syscall.EAGAIN): // EAGAIN: others wait for the socket
		return nil, fmt.Errorf("%w: another program has it open", ErrBusy)
	case errors.Is(err, fs.ErrPermission):
		return nil, fmt.Errorf("%w: %w", ErrDenied, err)
	}
	return nil, fmt.Errorf("%w: %w", ErrNoTPM, err)
}

// classOf is what Linux calls the devices of that kind; empty if it does not say.
func classOf(device fs.FileInfo) string {
	stat, ok := device.Sys().(*syscall.Stat_t)
	if !ok {
		return ""
	}
	class, err := os.Readlink(fmt.Sprintf("/sys/dev/char/%d:%d/subsystem", unix.Major(uint64(stat.Rdev)), unix.Minor(uint64(stat.Rdev))))
	if err != nil {
		return ""
	}
	return filepath.Base(class)
}

// openDevice opens a device so that a command is done when it is written. Linux
// answers a read of one that does not block with nothing, as at an end, until the
// response is there (drivers/char/tpm/tpm-dev-common.c), and os.OpenFile would
// have it not block. The driver has its own limit to how long a command takes.
func openDevice(path string) (*os.File, error) {
	fd, err := syscall.Open(path, syscall.O_RDWR|syscall.O_CLOEXEC|syscall.O_NOCTTY, 0)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: path, Err: err}
	}
	return os.NewFile(uintptr(fd), path), nil
}

func (c *connection) close() { _ = c.file.Close() } // what was not answered is lost anyhow

// Send implements transport.TPM.
func (c *connection) Send(command []byte) ([]byte, error) {
	until, pause := time.Now().Add(retryTime), 20*time.Millisecond
	for {
		response, err := c.exchange(command)
		if err != nil {
			return nil, err
		}
		code := tpm2.TPMRC(binary.BigEndian.Uint32(response[6:]))
		switch code {
		case tpm2.TPMRCRetry, tpm2.TPMRCYielded, tpm2.TPMRCTesting, tpm2.TPMRCNVRate:
		default:
			return response, nil
		}
		if time.Now().After(until) {
			return nil, fmt.Errorf("%w: it answers %w", ErrBusy, code)
		}
		select {
		case <-c.ctx.Done():
			return nil, c.ctx.Err()
		case <-time.After(pause):
		}
		pause = min(2*pause, time.Second)
	}
}

func (c *connection) exchange(command []byte) ([]byte, error) {
	if err := c.ctx.Err(); err != nil {
		return nil, err
	}
	deadline := time.Now().Add(commandTime)
	if at, ok := c.ctx.Deadline(); ok && at.Before(deadline) {
		deadline = at
	}
	// A device has none.
	if err := c.file.SetDeadline(deadline); err != nil && !errors.Is(err, os.ErrNoDeadline) {
		return nil, c.lost(err)
	}
	if _, err := c.file.Write(command); err != nil {
		return nil, c.lost(err)
	}
	buffer, n := make([]byte, maxResponse), 0
	for {
		more, err := c.file.Read(buffer[n:])
		n += more
		if n >= responseHeader {
			switch tag, size := tpm2.TPMST(binary.BigEndian.Uint16(buffer)), int(binary.BigEndian.Uint32(buffer[2:])); {
			case tag == tagOf12:
				return nil, fmt.Errorf("%w: it answers as a TPM 1.2 does", ErrNotTPM)
			case tag != tpm2.TPMSTNoSessions && tag != tpm2.TPMSTSessions:
				return nil, fmt.Errorf("%w: it answers as no TPM does", ErrNotTPM)
			case size < responseHeader || size > maxResponse:
				return nil, fmt.Errorf("%w: an answer of %d bytes", ErrFailed, size)
			case n == size:
				return buffer[:n], nil
			case n > size:
				return nil, fmt.Errorf("%w: an answer with something behind it", ErrFailed)
			}
		}
		if err != nil {
			return nil, c.lost(err)
		}
	}
}

func (c *connection) lost(err error) error {
	switch {
	case errors.Is(err, os.ErrDeadlineExceeded), errors.Is(err, syscall.EBUSY):
		return fmt.Errorf("%w: it does not answer; another program may be using it", ErrBusy)
	case errors.Is(err, io.EOF), errors.Is(err, syscall.EPIPE), errors.Is(err, syscall.ECONNRESET):
		return fmt.Errorf("%w: it went away", ErrBusy)
	}
	return fmt.Errorf("%w: %w", ErrFailed, err)
}
