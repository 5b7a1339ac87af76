package e2e

import (
	"crypto/rsa"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"net/http"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/vault/api"

	"github.com/orgkeys/orgkeys/client"
	"github.com/orgkeys/orgkeys/internal/e2e/harness"
	"github.com/orgkeys/orgkeys/internal/envelope"
	"github.com/orgkeys/orgkeys/internal/vault/vaulttest"
)

// onItsOwnVault are the settings of a server on a Vault that no other test
// uses, and the proxy in front of it: its audit file tells of one log alone.
func onItsOwnVault(t *testing.T) (*vaulttest.Server, *vaulttest.Proxy, harness.Option) {
	t.Helper()
	v, err := vaulttest.Start(t.Context(), t.TempDir())
	must(t, err)
	t.Cleanup(func() { must(t, v.Stop()) })
	proxy, err := vaulttest.NewProxy(v)
	must(t, err)
	t.Cleanup(proxy.Close)
	login, err := v.AppRole(t.Context())
	must(t, err)
	return v, proxy, func(s *harness.Server) {
		for name, value := range map[string]string{
			"ORGKEYS_KEYSTORE": "vault", "VAULT_ADDR": proxy.Address, "VAULT_CACERT": v.CACert,
			"ORGKEYS_VAULT_ROLE_ID_FILE": login.RoleIDFile, "ORGKEYS_VAULT_SECRET_ID_FILE": login.SecretIDFile,
		} {
			harness.Set(name, value)(s)
		}
	}
}

// thief has the service's Vault token and nothing else.
type thief struct {
	api       *api.Logical
	recipient *rsa.PrivateKey
	public    string
}

func (th *thief) use(token string, v *vaulttest.Server) error {
	c, err := v.Client(token)
	if err == nil {
		th.api = c.Logical()
	}
	return err
}

// give imports the thief's recipient under a name.
func (th *thief) give(name string) error {
	_, err := th.api.Write("orgkeys-sealed/keys/"+name+"/import", map[string]any{"type": "rsa-3072", "public_key": th.public})
	return err
}

// steal has the key of that name exported to the recipient of another, and opens it.
func (th *thief) steal(to, name string) (*rsa.PrivateKey, error) {
	answer, err := th.api.Read("orgkeys-sealed/byok-export/" + to + "/" + name + "/1")
	if err != nil {
		return nil, err
	}
	text, err := json.Marshal(map[string]any{"alg": envelope.WrapSHA256, "value": answer.Data["keys"].(map[string]any)["1"]})
	if err != nil {
		return nil, err
	}
	var sealed envelope.SealedKey
	if err := json.Unmarshal(text, &sealed); err != nil {
		return nil, err
	}
	der, err := sealed.Open(th.recipient)
	if err != nil {
		return nil, err
	}
	key, err := client.ParsePrivateKey(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}))
	if err != nil {
		return nil, err
	}
	return key.(*rsa.PrivateKey), nil
}

// The one thing that is left to a thief of the service's Vault token: a
// recipient of their own. Vault's audit file, counted against the log, names the
// keys that they have; what crashes leave behind accuses nobody.
func TestAThiefOfTheVaultTokenIsFound(t *testing.T) {
	t.Parallel()
	v, proxy, settings := onItsOwnVault(t)
	s := harness.Start(t, settings, harness.Set("ORGKEYS_RESERVATION_TTL", "4s"))
	org, node := harness.Org(), newRecipient(t)
	th := &thief{recipient: newRecipient(t)}
	th.public = publicPEM(t, th.recipient)
	deliver := func() *client.Delivered {
		t.Helper()
		return fetch(t, enrollment(t, s.API, mint(t, s, org, `{}`).Token, node, time.Minute))
	}

	// An honest run: deliveries, one that is cut off between wrapping and
	// committing, and one whose export fails.
	deliver()
	m := mint(t, s, org, `{}`)
	for _, dies := range []bool{true, false} {
		struck := make(chan bool, 1)
		proxy.After(func(r *http.Response) error {
			if !strings.Contains(r.Request.URL.Path, "/byok-export/") || len(struck) > 0 {
				return nil
			}
			struck <- true
			if dies {
				s.Kill()
			}
			return errors.New("cut off")
		})
		patience := time.Minute
		if dies {
			patience = 0
		}
		_, err := enrollment(t, s.API, m.Token, node, patience).Fetch(t.Context())
		proxy.After(nil)
		if len(struck) == 0 || dies == (err == nil) {
			t.Fatalf("a delivery that was to be cut off (the server dies: %t): %v", dies, err)
		}
		if dies {
			s.Kill() // returns when it is dead
			s.Start(t)
		}
	}
	fetch(t, enrollment(t, s.API, m.Token, node, time.Minute))
	if out, code := counted(t, s, v); code != 0 || !strings.Contains(out, "2 sealed keys of the log left Vault to one recipient each") || !strings.Contains(out, "2 keys left Vault that the log does not know") {
		t.Fatalf("an honest run is accused, or not understood: exit code %d\n%s", code, out)
	}

	// The thief looks on as keys are delivered, and takes one.
	taken := make(chan error, 1)
	var stolen *rsa.PrivateKey
	atExport := func(act func(to, name string) error) {
		proxy.Before(func(_ http.ResponseWriter, r *http.Request) bool {
			parts := strings.Split(strings.TrimPrefix(r.URL.Path, "/v1/orgkeys-sealed/"), "/")
			if parts[0] == "byok-export" {
				if th.api == nil {
					must(t, th.use(r.Header.Get("X-Vault-Token"), v))
				}
				taken <- act(parts[1], parts[2])
			}
			return true
		})
	}
	atExport(func(_, name string) (err error) {
		const mine = "0f0e0d0c-0000-4000-8000-000000000000"
		if err := th.give(mine); err != nil {
			return err
		}
		stolen, err = th.steal(mine, name)
		return err
	})
	victim := deliver()
	proxy.Before(nil)
	if err := <-taken; err != nil || client.Fingerprint(&stolen.PublicKey) != victim.Fingerprint {
		t.Fatalf("the theft that the test is about came to nothing: %v", err)
	}
	deliver()
	out, code := counted(t, s, v)
	if code != 1 || !strings.Contains(out, "key "+victim.KeyID) || !strings.Contains(out, "left Vault to two recipients") || strings.Count(out, " left Vault") != 1 {
		t.Errorf("exit code %d: %s", code, out)
	}
}

// A thief who puts a recipient of their own in the place of the right one reads
// what the service stores or sends. The node notices at once, and the count says so.
func TestARecipientThatWasExchangedInVaultIsFound(t *testing.T) {
	t.Parallel()
	v, proxy, settings := onItsOwnVault(t)
	s := harness.Start(t, settings)
	org, node := harness.Org(), newRecipient(t)
	th := &thief{recipient: newRecipient(t)}
	th.public = publicPEM(t, th.recipient)
	exchanged := make(chan error, 1)
	proxy.Before(func(_ http.ResponseWriter, r *http.Request) bool {
		parts := strings.Split(strings.TrimPrefix(r.URL.Path, "/v1/orgkeys-sealed/"), "/")
		if parts[0] == "byok-export" {
			must(t, th.use(r.Header.Get("X-Vault-Token"), v))
			_, allowed := th.api.Write("orgkeys-sealed/keys/"+parts[1]+"/config", map[string]any{"deletion_allowed": true})
			_, err := th.api.Delete("orgkeys-sealed/keys/" + parts[1])
			exchanged <- errors.Join(allowed, err, th.give(parts[1]))
		}
		return true
	})
	m := mint(t, s, org, `{}`)
	_, err := enrollment(t, s.API, m.Token, node, 0).Fetch(t.Context())
	proxy.Before(nil)
	if left := <-exchanged; left != nil || !errors.Is(err, client.ErrSealedUseless) {
		t.Fatalf("exchanging: %v; the node: %v", left, err)
	}
	key := show(t, s, org, m.ID).Claims[0].KeyID
	out, code := counted(t, s, v)
	if code != 1 || !strings.Contains(out, "key "+key) || !strings.Contains(out, "under which 2 recipients were imported") {
		t.Errorf("exit code %d: %s", code, out)
	}
}

// counted is what the audit log's export and Vault's audit file say together.
func counted(t *testing.T, s *harness.Server, v *vaulttest.Server) (output string, code int) {
	t.Helper()
	s.Stop(t)
	defer s.Start(t)
	archive := filepath.Join(t.TempDir(), "export.tar.gz")
	key := strings.TrimSpace(succeeds(t, s, "audit", "key"))
	succeeds(t, s, "audit", "export", archive)
	out, errs, code := s.Run(t, "audit", "verify-export", archive, "--key", key, "--vault-audit", v.AuditFile)
	return fmt.Sprint(out, errs), code
}
