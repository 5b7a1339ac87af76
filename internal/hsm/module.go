//go:build cgo

package hsm

/*
#cgo linux LDFLAGS: -ldl
#include <dlfcn.h>
#include <stdlib.h>

typedef unsigned long ulong_t;

// CK_FUNCTION_LIST of PKCS#11 2.40: a version, then the functions in the order
// in which the standard lists them.
struct functions { unsigned char version[2]; void *f[68]; };

// CK_MECHANISM.
struct mechanism { ulong_t type; void *parameter; ulong_t length; };

enum { ENCRYPT = 30, DECRYPT = 34, WRAP_KEY = 60 };

// What the binding's Ctx points to: its "struct ctx".
struct binding { void *library; struct functions *functions; };

// crypt calls C_Encrypt or C_Decrypt.
static ulong_t crypt_(struct functions *l, int which, ulong_t session, void *in, ulong_t size, void *out, ulong_t *room) {
	ulong_t (*call)(ulong_t, void *, ulong_t, void *, ulong_t *) = (ulong_t (*)(ulong_t, void *, ulong_t, void *, ulong_t *))l->f[which];
	return call(session, in, size, out, room);
}

// stay has a library that is loaded stay so.
static void stay(const char *name) { dlopen(name, RTLD_LAZY | RTLD_NOLOAD | RTLD_NODELETE); }

static ulong_t wrap_key(struct functions *l, ulong_t session, ulong_t type, void *parameter, ulong_t length,
		ulong_t wrapping, ulong_t key, void *out, ulong_t *room) {
	struct mechanism m = { type, length ? parameter : NULL, length };
	ulong_t (*call)(ulong_t, struct mechanism *, ulong_t, ulong_t, void *, ulong_t *) =
		(ulong_t (*)(ulong_t, struct mechanism *, ulong_t, ulong_t, void *, ulong_t *))l->f[WRAP_KEY];
	return call(session, &m, wrapping, key, out, room);
}
*/
import "C"

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"time"
	"unsafe"

	"github.com/miekg/pkcs11"
	"golang.org/x/sys/unix"
)

// module is a PKCS#11 library. For three functions the binding first asks the
// library how long the output will be, and gives it no more room than that. NSS
// answers too low: without the tag for AES-GCM, and without what RFC 5649 adds.
// So these are called here, with room to spare and no question.
type module struct {
	*pkcs11.Ctx
	functions *C.struct_functions
	path      string
	unloads   bool
}

// load loads the library at path. It stays loaded: unloading one that has
// registered exit or thread handlers, as OpenSSL's do, crashes the process later.
// The exception is opencryptoki: see Finalize.
func load(path string) (*module, error) {
	m := &module{path: path}
	return m, m.load()
}

func (m *module) load() error {
	ctx := pkcs11.New(m.path)
	if ctx == nil {
		return fmt.Errorf("loading the PKCS#11 module %q: not there, or not a PKCS#11 module", m.path)
	}
	// The binding does not export the function list, and another one will not do:
	// p11-kit's proxy makes a list with sessions of its own for each who asks.
	// TestTheBindingsFunctionList fails when the binding's layout changes.
	functions := (*(**C.struct_binding)(unsafe.Pointer(ctx))).functions
	if functions == nil || functions.version[0] < 2 || functions.version[0] > 3 {
		return fmt.Errorf("the PKCS#11 module %q does not implement PKCS#11 2 or 3", m.path)
	}
	m.Ctx, m.functions = ctx, functions
	return nil
}

const (
	opencryptoki     = "Meta PKCS11 LIBRARY" // how its library describes itself
	opencryptokiFile = "/libopencryptoki.so"
)

var errLoadedByAnother = errors.New("opencryptoki's library was loaded by another module, such as p11-kit's proxy, and stays loaded, which corrupts this process's connections (docs/hsm.md, opencryptoki): configure opencryptoki's own module")

// Initialize calls C_Initialize.
func (m *module) Initialize(options ...pkcs11.InitializeOption) error {
	if m.Ctx == nil {
		if isLoaded(opencryptokiFile) {
			return errLoadedByAnother
		}
		if err := m.load(); err != nil {
			return err
		}
	}
	err := m.Ctx.Initialize(options...)
	if info, asked := m.GetInfo(); asked == nil {
		m.unloads = info.LibraryDescription == opencryptoki
	}
	if err == nil && !m.unloads && isLoaded(opencryptokiFile) {
		return errors.Join(errLoadedByAnother, m.Ctx.Finalize())
	}
	return err
}

// turns is the directory of opencryptoki's own locks, which all that use a token of its on
// this machine have.
const (
	turns    = "/run/lock/opencryptoki"
	turnWait = 30 * time.Second
)

// takeTurn waits until no other process of orgkeys begins to use opencryptoki: each
// login, too, writes the token's record after the lock on it was given back, and so may
// undo what another process wrote meanwhile. Other modules need no turns.
func (m *module) takeTurn(ctx context.Context) (end func(), err error) {
	if !m.unloads && !isLoaded(opencryptokiFile) {
		return func() {}, nil
	}
	ctx, cancel := context.WithTimeout(ctx, turnWait)
	defer cancel()
	f, err := os.Open(turns)
	if errors.Is(err, fs.ErrNotExist) {
		return func() {}, nil // built with its locks elsewhere
	}
	if err != nil {
		return nil, fmt.Errorf("taking turns at opencryptoki's token: %w", err)
	}
	for {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return func() { _ = f.Close() }, nil // it was only locked
		}
		select {
		case <-ctx.Done():
			return nil, errors.Join(fmt.Errorf("%s is locked: another process has been beginning to use opencryptoki's token for too long: %w", turns, err), f.Close())
		case <-time.After(10 * time.Millisecond):
		}
	}
}

// isLoaded reports whether this process has a library with that in its path.
func isLoaded(file string) bool {
	maps, err := os.ReadFile("/proc/self/maps") // elsewhere than on Linux there is no opencryptoki
	return err == nil && bytes.Contains(maps, []byte(file))
}

// Finalize calls C_Finalize; no other call may be under way. opencryptoki closes
// the descriptor of its lock there and goes on using the number: from the second
// time on it closes whatever of this process has it by then
// (findings/opencryptoki-closes-a-descriptor-of-its-program.sh). It forgets the number
// when it is unloaded. libitm, which has thread handlers, is loaded by it and stays.
func (m *module) Finalize() error {
	err := m.Ctx.Finalize()
	if m.unloads {
		name := C.CString("libitm.so.1")
		C.stay(name)
		C.free(unsafe.Pointer(name))
		m.Destroy()
		m.Ctx, m.functions = nil, nil
	}
	return err
}

// initialize calls C_Initialize; args is what the library documents for
// CK_C_INITIALIZE_ARGS.pReserved, empty for none.
func (m *module) initialize(args string) error {
	if args == "" {
		return m.Initialize()
	}
	text := C.CString(args)
	defer C.free(unsafe.Pointer(text))
	return m.Initialize(pkcs11.InitializeWithReserved(unsafe.Pointer(text)))
}

const (
	cipherRoom = 64       // bytes that a ciphertext may be longer than its plaintext
	wrapRoom   = 16 << 10 // bytes; an RSA-4096 key wrapped has 2.4 KiB
)

// Encrypt ends what EncryptInit began.
func (m *module) Encrypt(h pkcs11.SessionHandle, plaintext []byte) ([]byte, error) {
	return m.crypt(C.ENCRYPT, h, plaintext, len(plaintext)+cipherRoom)
}

// Decrypt ends what DecryptInit began.
func (m *module) Decrypt(h pkcs11.SessionHandle, ciphertext []byte) ([]byte, error) {
	return m.crypt(C.DECRYPT, h, ciphertext, len(ciphertext)+cipherRoom)
}

func (m *module) crypt(which C.int, h pkcs11.SessionHandle, in []byte, room int) ([]byte, error) {
	if len(in) == 0 {
		in = make([]byte, 1)[:0] // a place, since some modules refuse NULL
	}
	out, n := make([]byte, room), C.ulong_t(room)
	rv := C.crypt_(m.functions, which, C.ulong_t(h), unsafe.Pointer(unsafe.SliceData(in)), C.ulong_t(len(in)), unsafe.Pointer(unsafe.SliceData(out)), &n)
	return filled(rv, out, n)
}

// wrap encrypts key with the AES key wrapping; parameter is the mechanism's
// IV, or nil.
func (m *module) wrap(h pkcs11.SessionHandle, mechanism uint, parameter []byte, wrapping, key pkcs11.ObjectHandle) ([]byte, error) {
	out, n := make([]byte, wrapRoom), C.ulong_t(wrapRoom)
	rv := C.wrap_key(m.functions, C.ulong_t(h), C.ulong_t(mechanism), unsafe.Pointer(unsafe.SliceData(parameter)), C.ulong_t(len(parameter)),
		C.ulong_t(wrapping), C.ulong_t(key), unsafe.Pointer(unsafe.SliceData(out)), &n)
	return filled(rv, out, n)
}

func filled(rv C.ulong_t, out []byte, n C.ulong_t) ([]byte, error) {
	if rv != pkcs11.CKR_OK {
		clear(out)
		return nil, pkcs11.Error(rv)
	}
	if int(n) > len(out) {
		return nil, fmt.Errorf("the module says that it wrote %d bytes into %d", n, len(out))
	}
	return out[:n:n], nil
}
