package e2e

import (
	"bytes"
	"crypto/rsa"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"fmt"
	mathrand "math/rand/v2"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/orgkeys/orgkeys/client"
	"github.com/orgkeys/orgkeys/internal/e2e/harness"
	"github.com/orgkeys/orgkeys/internal/envelope"
	"github.com/orgkeys/orgkeys/internal/orgkey/backendtest"
	"github.com/orgkeys/orgkeys/internal/vault/vaulttest"
)

// claimRequest is a node's request for the key of an enrollment, as it goes over the wire.
func claimRequest(t *testing.T, m minted, recipient *rsa.PrivateKey) []byte {
	t.Helper()
	token, err := envelope.ParseToken([]byte(m.Token))
	must(t, err)
	id, err := envelope.Recipient(&recipient.PublicKey)
	must(t, err)
	body, err := json.Marshal(map[string]any{"recipient": publicPEM(t, recipient), "mac": envelope.ClaimMAC(token.K, token.ID, id)})
	must(t, err)
	return body
}

func asks(m minted, body []byte) harness.Request {
	return harness.Request{Method: http.MethodPost, Path: "/enroll/" + m.ID, Body: body, Header: http.Header{"Content-Type": {"application/json"}}}
}

// snapshots copies the server's memory at some of the calls that it makes to
// Vault, while it waits for the answer.
type snapshots struct {
	mu     sync.Mutex
	calls  []string
	wanted func(call string) bool
	taken  map[string][]byte // by call
}

func lookingAtMemory(t *testing.T, s *harness.Server, proxy *vaulttest.Proxy) *snapshots {
	t.Helper()
	look := &snapshots{}
	proxy.Before(func(_ http.ResponseWriter, r *http.Request) bool {
		look.mu.Lock()
		defer look.mu.Unlock()
		if look.wanted != nil && r.Header.Get("X-Vault-Token") != "" {
			name := fmt.Sprintf("%d %s %s", len(look.calls), r.Method, r.URL.Path)
			if look.wanted(name) {
				look.taken[name] = s.Memory(t)
			}
			look.calls = append(look.calls, name)
		}
		return true
	})
	t.Cleanup(func() { proxy.Before(nil) })
	return look
}

// during takes the wanted snapshots while do runs, and one when it is done.
func (look *snapshots) during(t *testing.T, s *harness.Server, wanted func(string) bool, do func()) map[string][]byte {
	look.mu.Lock()
	look.wanted, look.calls, look.taken = wanted, nil, map[string][]byte{}
	look.mu.Unlock()
	do()
	look.mu.Lock()
	defer look.mu.Unlock()
	look.wanted = nil
	look.taken["at the end"] = s.Memory(t)
	return look.taken
}

// at returns a function that wants calls in whose name one of parts is.
func at(parts ...string) func(string) bool {
	return func(call string) bool {
		return slices.ContainsFunc(parts, func(part string) bool { return strings.Contains(call, part) })
	}
}

// TestPromise11_NoSealedKeyIsInTheServersMemory searches the server's whole
// memory, at the calls it makes to Vault and after them, for the numbers of
// every key that was delivered and for every delivery's AES key. The search
// finds what was put there on purpose, in each form.
func TestPromise11_NoSealedKeyIsInTheServersMemory(t *testing.T) {
	_, proxy, settings := throughVault(t)
	s := harness.Start(t, settings, harness.Set("ORGKEYS_RESERVATION_TTL", "5m"))
	org, node := harness.Org(), newRecipient(t)
	look := lookingAtMemory(t, s, proxy)
	plantedIsFound(t, s, look, org)

	// When the server has the wrapped key, and when it stores it.
	deliveries, wanted := 2, at("DELETE", "/encrypt/")
	random := mathrand.New(mathrand.NewPCG(*seed, 11))
	if long() {
		deliveries, wanted = 200, func(string) bool { return random.IntN(5) == 0 }
	}
	secrets := &harness.Scanner{}
	looks, searched := 0, 0
	for i := range deliveries {
		m := mint(t, s, org, `{}`)
		var answer harness.Response
		memory := look.during(t, s, wanted, func() {
			answer = patiently(t, s, asks(m, claimRequest(t, m, node)))
		})
		private := addDelivery(t, secrets, fmt.Sprintf("delivery %d:", i), answer, node)
		for call, b := range memory {
			looks++
			searched += len(b)
			for _, f := range secrets.ScanMemory(b) {
				t.Errorf("at %s the server's memory holds %s", call, f)
			}
			// So that memory was searched in which the delivery was.
			if call == "at the end" && !bytes.Contains(b, []byte(m.ID)) {
				t.Error("the enrollment's ID is not in the memory: this is not the server's")
			}
		}
		receipt(t, s, answer, private)
	}
	t.Logf("%d deliveries, %d looks at %d MiB each on average", deliveries, looks, searched/looks>>20)
}

// patiently asks again, as a node does, until the answer is 200: a server that is looked at
// for long may give up a call to Vault.
func patiently(t *testing.T, s *harness.Server, r harness.Request) (answer harness.Response) {
	t.Helper()
	for try := 0; try < 60 && answer.Status != http.StatusOK; try++ {
		time.Sleep(time.Duration(min(try, 1)) * time.Second)
		answer = s.Do(t, r)
	}
	return answer
}

// plantedIsFound has the server hold a secret in each form, and a key that it
// gives out in plain.
func plantedIsFound(t *testing.T, s *harness.Server, look *snapshots, org string) {
	t.Helper()
	secrets := &harness.Scanner{}
	var planted bytes.Buffer
	forms := map[string]func(*rsa.PrivateKey) string{
		"p":                  func(k *rsa.PrivateKey) string { return string(k.Primes[0].Bytes()) },
		"q in little endian": func(k *rsa.PrivateKey) string { q := k.Primes[1].Bytes(); slices.Reverse(q); return string(q) },
		"d in hexadecimal":   func(k *rsa.PrivateKey) string { return hex.EncodeToString(k.D.Bytes()) },
	}
	for offset := range 3 {
		forms[fmt.Sprintf("p in base64 at %d", offset)] = func(k *rsa.PrivateKey) string {
			return base64.StdEncoding.EncodeToString(append(make([]byte, offset), k.Primes[0].Bytes()...))
		}
	}
	for name, form := range forms {
		k := newRSAKey(t)
		secrets.AddPrivate("<"+name+">", k)
		planted.WriteString(form(k))
	}
	aes := sha256.Sum256([]byte(org))
	secrets.AddAESKey("<AES key>", aes[:])
	planted.Write(aes[:])
	found := map[string]bool{}
	add := func(memory map[string][]byte) {
		for _, b := range memory {
			for _, f := range secrets.ScanMemory(b) {
				name, _, _ := strings.Cut(f, ">")
				found[name+">"] = true
			}
		}
	}
	owner := s.Token(t, org, "OWNER")
	add(look.during(t, s, at("/encrypt/"), func() {
		patiently(t, s, harness.Request{
			Method: http.MethodPut, Path: "/organization/" + org + "/secret/planted", Token: owner, Body: planted.Bytes(),
			Header: http.Header{"Content-Type": {"application/octet-stream"}},
		})
	}))
	var plain harness.Key
	memory := look.during(t, s, at("DELETE"), func() {
		plain = harness.ReadKey(t, org, patiently(t, s, harness.Request{Method: http.MethodPost, Path: harness.KeyPath(org), Token: owner}))
	})
	secrets.AddPrivate("<a key that is given out in plain>", plain.Private)
	add(memory)
	for name := range forms {
		if !found["<"+name+">"] {
			t.Errorf("%s was planted, and is not found", name)
		}
	}
	for _, name := range []string{"<AES key>", "<a key that is given out in plain>"} {
		if !found[name] {
			t.Errorf("%s was in the memory, and is not found", name)
		}
	}
	if t.Failed() {
		t.FailNow()
	}
}

// addDelivery adds the private key of a sealed answer, and its AES key.
func addDelivery(t *testing.T, secrets *harness.Scanner, name string, answer harness.Response, node *rsa.PrivateKey) *rsa.PrivateKey {
	t.Helper()
	if answer.Status != http.StatusOK {
		t.Fatalf("a delivery: %d %s", answer.Status, answer.Body)
	}
	var sealed struct {
		Sealed envelope.SealedKey `json:"sealed"`
	}
	must(t, json.Unmarshal(answer.Body, &sealed))
	private, err := backendtest.OpenSealed(sealed.Sealed, node)
	must(t, err)
	secrets.AddPrivate(name, private)
	aes, err := rsa.DecryptOAEP(sha256.New(), nil, node, sealed.Sealed.Value[:node.Size()], nil)
	must(t, err)
	secrets.AddAESKey(name+" AES key", aes)
	return private
}

// receipt signs for a sealed answer.
func receipt(t *testing.T, s *harness.Server, answer harness.Response, private *rsa.PrivateKey) {
	t.Helper()
	var d client.Delivery
	must(t, json.Unmarshal(answer.Body, &d))
	c, err := client.New(client.Config{Server: s.API})
	must(t, err)
	must(t, c.Receipt(t.Context(), d, private))
}
