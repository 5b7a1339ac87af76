//go:build cgo

package hsm

import (
	"context"
	"crypto/rsa"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"math/big"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/miekg/pkcs11"

	"github.com/orgkeys/orgkeys/internal/orgkey"
)

// What a child is told, by its environment.
const (
	childDir    = "ORGKEYS_HSM_TEST_DIR"
	childModule = "ORGKEYS_HSM_TEST_MODULE"
	childConfig = "ORGKEYS_HSM_TEST_CONFIG"
)

// configEnv hands cfg to a child.
func configEnv(cfg Config) []string {
	cfg.Log = nil
	text, err := json.Marshal(cfg)
	if err != nil {
		panic(err) // a Config of text and numbers
	}
	return []string{childConfig + "=" + string(text)}
}

func configFromEnv() (cfg Config) {
	if err := json.Unmarshal([]byte(os.Getenv(childConfig)), &cfg); err != nil {
		panic(err) // configEnv made it
	}
	return cfg
}

const childKeys = 3

func childCommand(t testing.TB, name, dir string, env ...string) *exec.Cmd {
	t.Helper()
	binary, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), binary)
	cmd.Env = append(os.Environ(), child+"="+name, childDir+"="+dir)
	cmd.Env = append(cmd.Env, env...)
	return cmd
}

func runChild(name string) error {
	switch name {
	case "init":
		_, _, err := InitSoftHSM(os.Getenv(childDir))
		return err
	case "first start":
		return firstStart(context.Background())
	case "looking on":
		return lookOn(configFromEnv())
	case "under load":
		return underLoad(context.Background())
	case "pin states":
		return pinStates(configFromEnv())
	case "open":
		token, err := Open(context.Background(), configFromEnv())
		if err != nil {
			return err
		}
		return token.Close()
	case "spied on while it seals keys":
		return sealKeys(context.Background())
	case "spied on":
		return json.NewEncoder(os.Stdout).Encode(mustReport())
	}
	return fmt.Errorf("no such child: %s", name)
}

// report is what the child that is spied on knows of its work.
type report struct {
	Err         string
	Secrets     []string // hex of each number of each private key
	PrivateKeys int      // objects left in the token
	Public      []string // hex of the moduli
}

func mustReport() (r report) {
	if err := r.fill(context.Background()); err != nil {
		r.Err = err.Error()
	}
	return r
}

// fill makes keys as the service does, seals and opens, and then looks for
// private keys.
func (r *report) fill(ctx context.Context) error {
	cfg, _, err := InitSoftHSM(os.Getenv(childDir))
	if err != nil {
		return err
	}
	// So that the spy sees one made.
	if err := dropSealingKey(cfg); err != nil {
		return err
	}
	cfg.Module = os.Getenv(childModule)
	cfg.CreateSealingKey = true
	token, err := Open(ctx, cfg)
	if err != nil {
		return err
	}
	for range childKeys {
		if err := r.generate(ctx, token); err != nil {
			return err
		}
	}
	item := orgkey.Sealed{Binding: orgkey.Binding{Org: "acme", ID: "one"}}
	if item.Ciphertext, err = token.Seal(ctx, item.Binding, []byte("value")); err != nil {
		return err
	}
	if _, err := token.Open(ctx, []orgkey.Sealed{item}); err != nil {
		return err
	}
	err = token.seal(ctx, func(_ *life, h pkcs11.SessionHandle) error {
		found, err := find(token.lib, h, 100, pkcs11.NewAttribute(pkcs11.CKA_CLASS, pkcs11.CKO_PRIVATE_KEY))
		r.PrivateKeys = len(found)
		return err
	}, func() {})
	if err != nil {
		return err
	}
	return token.Close()
}

func dropSealingKey(cfg Config) error {
	return withSession(cfg, func(lib *module, h pkcs11.SessionHandle) error {
		key, err := lookUpSealingKey(lib, h)
		if err != nil {
			return err
		}
		return lib.DestroyObject(h, key)
	})
}

// withSession runs f in a session of its own, logged in, past any Token.
func withSession(cfg Config, f func(lib *module, h pkcs11.SessionHandle) error) (err error) {
	pin, err := readPIN(cfg.PINFile)
	if err != nil {
		return err
	}
	lib, err := load(cfg.Module)
	if err != nil {
		return err
	}
	slot, err := enterToken(lib, cfg)
	for tries := 0; lost(err) && tries < 20; tries++ { // after a kill, opencryptoki needs a moment
		time.Sleep(100 * time.Millisecond)
		slot, err = enterToken(lib, cfg)
	}
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, lib.Finalize()) }()
	h, err := lib.OpenSession(slot, pkcs11.CKF_SERIAL_SESSION|pkcs11.CKF_RW_SESSION)
	if err != nil {
		return err
	}
	if err := lib.Login(h, pkcs11.CKU_USER, string(pin)); err != nil {
		return err
	}
	return f(lib, h)
}

func enterToken(lib *module, cfg Config) (slot uint, err error) {
	if err = lib.initialize(cfg.InitArgs); err != nil {
		return 0, fmt.Errorf("initialising the module: %w", err)
	}
	if slot, err = cfg.findToken(lib); err != nil {
		err = errors.Join(err, lib.Finalize())
	}
	return slot, err
}

func (r *report) generate(ctx context.Context, token *Token) error {
	key, err := token.Create(ctx, uuid.NewString())
	if err != nil {
		return err
	}
	der, err := key.Export(ctx)
	if err != nil {
		return err
	}
	if err := key.Destroy(ctx); err != nil {
		return err
	}
	private, err := x509.ParsePKCS1PrivateKey(der)
	if err != nil {
		return err
	}
	p := private.Precomputed
	for _, n := range []*big.Int{private.D, private.Primes[0], private.Primes[1], p.Dp, p.Dq, p.Qinv} {
		r.Secrets = append(r.Secrets, strings.ToLower(hex.EncodeToString(n.Bytes())))
	}
	r.Public = append(r.Public, strings.ToLower(hex.EncodeToString(private.N.Bytes())))
	return nil
}

// childRecipient is the file that holds the recipient's public key, PKIX DER.
const childRecipient = "ORGKEYS_HSM_TEST_RECIPIENT"

// sealKeys makes keys and seals each to the recipient.
func sealKeys(ctx context.Context) error {
	cfg, _, err := InitSoftHSM(os.Getenv(childDir))
	if err != nil {
		return err
	}
	der, err := os.ReadFile(os.Getenv(childRecipient))
	if err != nil {
		return err
	}
	recipient, err := x509.ParsePKIXPublicKey(der)
	if err != nil {
		return err
	}
	cfg.Module = os.Getenv(childModule)
	token, err := Open(ctx, cfg)
	if err != nil {
		return err
	}
	for range childKeys {
		key, err := token.CreateSealed(ctx, uuid.NewString())
		if err != nil {
			return err
		}
		if _, err := key.Seal(ctx, recipient.(*rsa.PublicKey)); err != nil {
			return err
		}
		if err := key.Destroy(ctx); err != nil {
			return err
		}
	}
	return token.Close()
}
