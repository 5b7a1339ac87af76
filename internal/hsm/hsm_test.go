//go:build cgo

package hsm

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"
	"unsafe"

	"github.com/google/uuid"
	"github.com/miekg/pkcs11"

	"github.com/orgkeys/orgkeys/internal/hsm/hsmtest"
	"github.com/orgkeys/orgkeys/internal/orgkey"
	"github.com/orgkeys/orgkeys/internal/orgkey/backendtest"
)

// child names what this binary does instead of running tests; see runChild.
const child = "ORGKEYS_HSM_TEST_CHILD"

func TestMain(m *testing.M) {
	if name := os.Getenv(child); name != "" {
		if err := runChild(name); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// softHSM makes a new token.
func softHSM(t testing.TB) Config {
	t.Helper()
	cfg, created, err := InitSoftHSM(t.TempDir())
	if err != nil {
		t.Fatalf("InitSoftHSM: %v", err)
	}
	if !created {
		t.Fatal("InitSoftHSM found a token in an empty directory")
	}
	return cfg
}

// kind is the module under test, for a process of its own; see modules_test.go.
const kind = "ORGKEYS_HSM_TEST_KIND"

// freshToken makes a new token of the module under test, which is SoftHSM unless
// this process is another's.
func freshToken(t testing.TB) Config {
	t.Helper()
	switch os.Getenv(kind) {
	case "":
		return softHSM(t)
	case "SoftHSM, CBC and HMAC":
		cfg := softHSM(t)
		if err := dropSealingKey(cfg); err != nil {
			t.Fatal(err)
		}
		cfg.noGCM, cfg.CreateSealingKey = true, true
		return cfg
	}
	dir := t.TempDir()
	cfg := Config{TokenLabel: "orgkeys", PINFile: filepath.Join(dir, "pin"), AttemptFile: AttemptFile(dir), CreateSealingKey: true}
	switch os.Getenv(kind) {
	case "opencryptoki":
		cfg.Module = hsmtest.OpencryptokiModule(t)
		if err := initOpencryptoki(cfg, opencryptokiPIN); err != nil {
			t.Fatal(err)
		}
	case "NSS":
		cfg.Module, cfg.InitArgs = hsmtest.NSS(t, cfg.TokenLabel, opencryptokiPIN)
	case "NSS through p11-kit-proxy":
		module, args := hsmtest.NSS(t, cfg.TokenLabel, opencryptokiPIN)
		cfg.Module = hsmtest.Proxy(t, module, args)
	default:
		t.Fatalf("no such module: %s", os.Getenv(kind))
	}
	writePIN(t, cfg, opencryptokiPIN)
	return cfg
}

// begin loads and initialises a module, past any Token.
func begin(t testing.TB, cfg Config) *module {
	t.Helper()
	lib, err := load(cfg.Module)
	if err == nil {
		err = lib.initialize(cfg.InitArgs)
	}
	if err != nil {
		t.Fatal(err)
	}
	return lib
}

// open opens a token for the length of the test.
func open(t testing.TB, cfg Config) *Token {
	t.Helper()
	token, err := Open(t.Context(), cfg)
	if err != nil {
		t.Fatalf("Open: %v", err)
	}
	t.Cleanup(func() {
		if err := token.Close(); err != nil {
			t.Errorf("Close: %v", err)
		}
	})
	return token
}

// bounded is a context that outlasts what a test waits for.
func bounded(t testing.TB) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	t.Cleanup(cancel)
	return ctx
}

// objects counts what is in the token, token objects and session objects of
// every session of this process.
func objects(t testing.TB, token *Token, template ...*pkcs11.Attribute) int {
	t.Helper()
	var n int
	err := token.seal(bounded(t), func(_ *life, h pkcs11.SessionHandle) error {
		found, err := find(token.lib, h, 1000, template...)
		n = len(found)
		return err
	}, func() {})
	if err != nil {
		t.Fatalf("searching the token: %v", err)
	}
	return n
}

func privateKeys(t testing.TB, token *Token) int {
	t.Helper()
	return objects(t, token, pkcs11.NewAttribute(pkcs11.CKA_CLASS, pkcs11.CKO_PRIVATE_KEY))
}

// generateOne does with a key what the service does.
func generateOne(ctx context.Context, token interface {
	orgkey.Keystore
	orgkey.Sealer
}) error {
	key, err := token.Create(ctx, uuid.NewString())
	if err != nil {
		return err
	}
	return errors.Join(besideSealing(ctx, token, func() error { return take(ctx, key) }))
}

// take has a key given out and destroyed.
func take(ctx context.Context, key orgkey.BackendKey) error {
	der, err := key.Export(ctx)
	if err == nil {
		err = key.Public().CheckPrivate(der)
		clear(der)
	}
	return errors.Join(err, key.Destroy(ctx))
}

// besideSealing does something while something is sealed.
func besideSealing(ctx context.Context, sealer orgkey.Sealer, do func() error) (done, sealed error) {
	ended := make(chan error, 1)
	go func() { ended <- do() }()
	_, sealed = sealer.Seal(ctx, orgkey.Binding{Org: "acme", ID: "one"}, []byte("value"))
	return <-ended, sealed
}

// madeAhead is the token with keys that wait in the pool, for no time.
type madeAhead struct{ *Token }

func (m madeAhead) Create(ctx context.Context, name string) (orgkey.BackendKey, error) {
	return m.CreateAhead(ctx, name)
}

func (m madeAhead) CreateSealed(ctx context.Context, name string) (orgkey.SealableKey, error) {
	return m.CreateAhead(ctx, name)
}

func TestContract(t *testing.T) {
	token := open(t, freshToken(t))
	gone := func(t *testing.T, name string) {
		t.Helper()
		if n := objects(t, token, pkcs11.NewAttribute(pkcs11.CKA_ID, name)); n != 0 {
			t.Errorf("%d objects have the name %s", n, name)
		}
	}
	t.Run("keystore", func(t *testing.T) { backendtest.Keystore(t, token, gone) })
	t.Run("keys made ahead", func(t *testing.T) { backendtest.Keystore(t, madeAhead{token}, gone) })
	t.Run("sealer", func(t *testing.T) { backendtest.Sealer(t, token) })
	if n := privateKeys(t, token); n != 0 {
		t.Errorf("%d private keys stayed in the token", n)
	}
	if token.renewals != 0 {
		t.Errorf("%d renewals were needed", token.renewals)
	}
	if token.courier.wrap.rfc5649 {
		t.Run("sealed keys", func(t *testing.T) { backendtest.Sealed(t, token, gone) })
		t.Run("keys made ahead, sealed", func(t *testing.T) { backendtest.Sealed(t, madeAhead{token}, gone) })
	} else {
		t.Run("no sealed keys", func(t *testing.T) { backendtest.NoSealed(t, token) })
	}
}

// What load reads out of the binding is the module's own list of functions.
func TestTheBindingsFunctionList(t *testing.T) {
	if n := unsafe.Sizeof(pkcs11.Ctx{}); n != unsafe.Sizeof(uintptr(0)) {
		t.Fatalf("the binding's Ctx has %d bytes, and not one pointer", n)
	}
	lib := begin(t, freshToken(t))
	defer func() { _ = lib.Finalize() }()
	info, err := lib.GetInfo()
	if err != nil {
		t.Fatal(err)
	}
	if major := byte(lib.functions.version[0]); major != info.CryptokiVersion.Major {
		t.Errorf("the list says version %d, C_GetInfo %d", major, info.CryptokiVersion.Major)
	}
}

// A library that ends closes no descriptor of the program's, however often: with a
// connection's number, what is meant for one peer would go to another.
func TestFinalizeClosesNothingOfOurs(t *testing.T) {
	cfg := freshToken(t)
	lib := begin(t, cfg)
	if err := lib.Finalize(); err != nil {
		t.Fatal(err)
	}
	var ours []*os.File
	for range 50 { // whatever number the library had, one of these has it
		f, err := os.Open(os.DevNull)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		ours = append(ours, f)
	}
	for range 3 {
		if err := errors.Join(lib.initialize(cfg.InitArgs), lib.Finalize()); err != nil {
			t.Fatal(err)
		}
	}
	for _, f := range ours {
		if _, err := f.Stat(); err != nil {
			t.Error(err)
		}
	}
}
