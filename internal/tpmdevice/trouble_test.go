package tpmdevice_test

import (
	"context"
	"crypto"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"
	"golang.org/x/sys/unix"

	"github.com/orgkeys/orgkeys/internal/tpm"
	"github.com/orgkeys/orgkeys/internal/tpm/tpmtest"
	"github.com/orgkeys/orgkeys/internal/tpmdevice"
)

// before answers in a TPM's place as long as answer returns something.
func before(t *testing.T, real *tpmtest.TPM, answer func() []byte) tpmdevice.Device {
	t.Helper()
	dir, err := os.MkdirTemp("", "tpm")
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("unix", filepath.Join(dir, "s"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = l.Close()
		_ = os.RemoveAll(dir)
	})
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go serve(c, real, answer)
		}
	}()
	return tpmdevice.Device{Path: l.Addr().String()}
}

func serve(c io.ReadWriteCloser, real *tpmtest.TPM, answer func() []byte) {
	defer c.Close()
	var behind net.Conn
	for {
		command, err := message(c)
		if err != nil {
			return
		}
		response := answer()
		if response == nil {
			if behind == nil { // a TPM has one connection at a time
				if behind, err = net.Dial("unix", real.Socket); err != nil {
					return
				}
				defer behind.Close()
			}
			if _, err := behind.Write(command); err != nil {
				return
			}
			if response, err = message(behind); err != nil {
				return
			}
		}
		if _, err := c.Write(response); err != nil {
			return
		}
	}
}

func message(c io.Reader) ([]byte, error) {
	header := make([]byte, 10)
	if _, err := io.ReadFull(c, header); err != nil {
		return nil, err
	}
	rest := make([]byte, max(int(binary.BigEndian.Uint32(header[2:]))-10, 0))
	_, err := io.ReadFull(c, rest)
	return append(header, rest...), err
}

func code(rc tpm2.TPMRC) []byte {
	return binary.BigEndian.AppendUint32([]byte{0x80, 0x01, 0, 0, 0, 10}, uint32(rc))
}

// What a TPM answers in place of what was asked for is told apart, and what passes
// is waited for.
func TestHostileAndBusyAnswers(t *testing.T) {
	t.Parallel()
	real := tpmtest.Start(t)
	key, err := tpmdevice.Device{Path: real.Socket}.Create(t.Context(), tpmdevice.Speaking)
	if err != nil {
		t.Fatal(err)
	}
	text, err := key.PEM()
	if err != nil {
		t.Fatal(err)
	}
	check := func(answer func() []byte) error {
		between, err := before(t, real, answer).Parse(text)
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		return between.Check(ctx)
	}
	always := func(response []byte) func() []byte { return func() []byte { return response } }
	for what, c := range map[string]struct {
		answer []byte
		want   error
	}{
		"locked out":     {code(tpm2.TPMRCLockout), tpmdevice.ErrLockedOut},
		"a password":     {code(tpm2.TPMRCBadAuth), tpmdevice.ErrOwned},
		"another's":      {code(tpm2.TPMRCAuthFail | 0x980), tpmdevice.ErrOwned},
		"switched off":   {code(tpm2.TPMRCHierarchy | 0x180), tpmdevice.ErrOwned},
		"out of memory":  {code(tpm2.TPMRCObjectMemory), tpmdevice.ErrBusy},
		"not started":    {code(tpm2.TPMRCInitialize), tpmdevice.ErrBusy},
		"failure":        {code(tpm2.TPMRCFailure), tpmdevice.ErrFailed},
		"a short size":   {[]byte{0x80, 1, 0, 0, 0, 3, 0, 0, 0, 0}, tpmdevice.ErrFailed},
		"a long size":    {[]byte{0x80, 1, 0xff, 0, 0, 10, 0, 0, 0, 0}, tpmdevice.ErrFailed},
		"nothing in it":  {code(0), tpmdevice.ErrFailed},
		"bytes behind":   {append(code(0), 1), tpmdevice.ErrFailed},
		"another's text": {[]byte("HTTP/1.1 400 Bad Request\r\n\r\n"), tpmdevice.ErrNotTPM},
		"a TPM 1.2's":    {[]byte{0, 0xc4, 0, 0, 0, 10, 0, 0, 0, 0x1e}, tpmdevice.ErrNotTPM},
	} {
		if err := check(always(c.answer)); !errors.Is(err, c.want) {
			t.Errorf("%s: %v, want %v", what, err, c.want)
		}
	}
	var asked atomic.Int32
	if err := check(func() []byte {
		for i, busy := range []tpm2.TPMRC{tpm2.TPMRCRetry, tpm2.TPMRCYielded, tpm2.TPMRCTesting, tpm2.TPMRCNVRate} {
			if asked.CompareAndSwap(int32(i), int32(i+1)) {
				return code(busy)
			}
		}
		return nil
	}); err != nil {
		t.Errorf("after it was busy four times: %v", err)
	}
	// Another program holds the only connection.
	ctx, cancel := context.WithTimeout(t.Context(), 500*time.Millisecond)
	defer cancel()
	real.Do(t, func(transport.TPM) {
		if err := key.Check(ctx); !errors.Is(err, tpmdevice.ErrBusy) {
			t.Errorf("while another program has it: %v", err)
		}
	})
}

// A TPM may be a character device, such as Linux's. A terminal is one, too.
func TestADevice(t *testing.T) {
	t.Parallel()
	real := tpmtest.Start(t)
	master, path := terminal(t)
	go serve(master, real, func() []byte { return nil })
	d := tpmdevice.Device{Path: path}
	key, err := d.Create(t.Context(), tpmdevice.Speaking)
	if err != nil {
		t.Fatal(err)
	}
	digest := sha256.Sum256(nil)
	if _, err := key.Sign(nil, digest[:], crypto.SHA256); err != nil {
		t.Error(err)
	}
}

// terminal returns both ends of one that changes no byte, the second by its path.
func terminal(t *testing.T) (*os.File, string) {
	t.Helper()
	master, err := os.OpenFile("/dev/ptmx", os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = master.Close() })
	raw, err := master.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	number := 0
	if e := raw.Control(func(fd uintptr) {
		if err = unix.IoctlSetPointerInt(int(fd), unix.TIOCSPTLCK, 0); err != nil {
			return
		}
		if number, err = unix.IoctlGetInt(int(fd), unix.TIOCGPTN); err != nil {
			return
		}
		err = unix.IoctlSetTermios(int(fd), unix.TCSETS, &unix.Termios{Cflag: unix.CS8 | unix.CREAD, Cc: [19]uint8{unix.VMIN: 1}})
	}); e != nil || err != nil {
		t.Fatal(e, err)
	}
	path := fmt.Sprintf("/dev/pts/%d", number)
	// The other end stays open between two uses: a terminal that nobody has open is hung up.
	kept, err := os.OpenFile(path, os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = kept.Close() })
	return master, path
}

// Power cuts while the key is in use do not lock it.
func TestFourPowerCutsInARow(t *testing.T) {
	t.Parallel()
	real := tpmtest.Start(t)
	key, err := tpmdevice.Device{Path: real.Socket}.Create(t.Context(), tpmdevice.Speaking)
	if err != nil {
		t.Fatal(err)
	}
	digest := sha256.Sum256(nil)
	for i := range 4 {
		ended := make(chan error, 1)
		go func() {
			_, err := key.Sign(nil, digest[:], crypto.SHA256)
			ended <- err
		}()
		time.Sleep(time.Duration(i+1) * 5 * time.Millisecond) // at any moment of it
		real.Restart(t)
		if err := <-ended; err != nil && !errors.Is(err, tpmdevice.ErrBusy) && !errors.Is(err, tpmdevice.ErrNoTPM) {
			t.Errorf("a power cut is %v", err)
		}
	}
	if _, err := key.Sign(nil, digest[:], crypto.SHA256); err != nil {
		t.Errorf("after four power cuts: %v", err)
	}
}

// A private key from outside cannot be in a TPM with fixedTPM, which is what the
// service looks at.
func TestAKeyFromOutsideIsNotFixed(t *testing.T) {
	t.Parallel()
	real := tpmtest.Start(t)
	outside, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	area := tpm2.TPMTPublic{
		Type: tpm2.TPMAlgRSA, NameAlg: tpm2.TPMAlgSHA256,
		ObjectAttributes: tpm2.TPMAObject{SensitiveDataOrigin: true, UserWithAuth: true, Decrypt: true, SignEncrypt: true},
		Parameters: tpm2.NewTPMUPublicParms(tpm2.TPMAlgRSA, &tpm2.TPMSRSAParms{
			Symmetric: tpm2.TPMTSymDefObject{Algorithm: tpm2.TPMAlgNull}, Scheme: tpm2.TPMTRSAScheme{Scheme: tpm2.TPMAlgNull}, KeyBits: 2048,
		}),
		Unique: tpm2.NewTPMUPublicID(tpm2.TPMAlgRSA, &tpm2.TPM2BPublicKeyRSA{Buffer: outside.N.Bytes()}),
	}
	load := func(area tpm2.TPMTPublic) (err error) {
		real.Do(t, func(raw transport.TPM) {
			var loaded *tpm2.LoadExternalResponse
			loaded, err = tpm2.LoadExternal{
				InPrivate: tpm2.New2B(tpm2.TPMTSensitive{SensitiveType: tpm2.TPMAlgRSA,
					Sensitive: tpm2.NewTPMUSensitiveComposite(tpm2.TPMAlgRSA, &tpm2.TPM2BPrivateKeyRSA{Buffer: outside.Primes[0].Bytes()})}),
				InPublic: tpm2.New2B(area), Hierarchy: tpm2.TPMRHNull,
			}.Execute(raw)
			if err == nil {
				_, err = tpm2.FlushContext{FlushHandle: loaded.ObjectHandle}.Execute(raw)
			}
		})
		return err
	}
	if err := load(area); err != nil {
		t.Fatalf("with sensitiveDataOrigin: %v", err)
	}
	if _, err := tpm.ReadKey(tpm2.Marshal(area), tpm.Speaking); err == nil {
		t.Error("the service reads it as a key that was made in the TPM")
	}
	area.ObjectAttributes.FixedTPM, area.ObjectAttributes.FixedParent = true, true
	if err := load(area); err == nil {
		t.Error("a private key from outside is loaded with fixedTPM")
	}
}
