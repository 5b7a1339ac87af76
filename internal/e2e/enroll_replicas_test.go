package e2e

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/rsa"
	"database/sql"
	"encoding/json"
	"fmt"
	"io"
	"math/big"
	mathrand "math/rand/v2"
	"net"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/orgkeys/orgkeys/client"
	"github.com/orgkeys/orgkeys/internal/chaos/cluster"
	"github.com/orgkeys/orgkeys/internal/e2e/harness"
	"github.com/orgkeys/orgkeys/internal/envelope"
	"github.com/orgkeys/orgkeys/internal/orgkey/backendtest"
)

// replicasOf starts n replicas on one PostgreSQL and Redis, on SoftHSM or on Vault.
func replicasOf(t *testing.T, backend string, n int, more ...harness.Option) *cluster.Cluster {
	t.Helper()
	if backend == "Vault" {
		return cluster.Start(t, n, more...)
	}
	c := cluster.ConfigureOnHSM(t, n, more...)
	for _, r := range c.Replicas {
		r.Start(t) // one after the other: the first makes the token
	}
	return c
}

// onEveryBackend runs a test of replicas on SoftHSM, and in its long form on Vault too.
func onEveryBackend(t *testing.T, run func(t *testing.T, backend string)) {
	t.Run("SoftHSM", func(t *testing.T) { run(t, "SoftHSM") })
	if long() {
		t.Run("Vault", func(t *testing.T) { run(t, "Vault") })
	}
}

func clusterDatabase(t *testing.T, c *cluster.Cluster) *sql.DB {
	t.Helper()
	db, err := sql.Open("pgx", c.Database)
	must(t, err)
	t.Cleanup(func() { db.Close() })
	return db
}

// nothingInTheBackend fails unless only the service's own keys are in the back end.
func nothingInTheBackend(t *testing.T, c *cluster.Cluster) {
	t.Helper()
	if c.Vault == nil {
		onlyOwnKeys(t, c.Replicas[0])
		return
	}
	harness.Eventually(t, time.Minute, "no sealed key and no recipient is left in Vault", func() bool {
		left, err := root(t, c.Vault).ListWithContext(t.Context(), "orgkeys-sealed/keys")
		must(t, err)
		return left == nil
	})
}

// TestPromise12_ClaimedFetchedAndReceivedOnThreeReplicas: the replica that has
// just served is killed each time, at some moment while it serves.
func TestPromise12_ClaimedFetchedAndReceivedOnThreeReplicas(t *testing.T) {
	onEveryBackend(t, func(t *testing.T, backend string) {
		c := replicasOf(t, backend, 3, shortLife(t, 3*time.Second))
		rounds := 3
		if long() {
			rounds = 60
		}
		random := mathrand.New(mathrand.NewPCG(*seed, 4))
		org, node := harness.Org(), newRecipient(t)
		fingerprints := map[string]bool{}
		for round := range rounds {
			a, b, third := c.Replicas[round%3], c.Replicas[(round+1)%3], c.Replicas[(round+2)%3]
			m := mintBy(t, b, org, c.Owner(t, org), `{}`)
			// Claimed on one, which dies meanwhile.
			lost := make(chan error, 1)
			go func() {
				_, err := enrollment(t, a.API, m.Token, node, 0).Fetch(context.Background())
				lost <- err
			}()
			time.Sleep(time.Duration(random.IntN(400)) * time.Millisecond)
			a.Kill()
			err := <-lost
			// Fetched from another, which dies when it has answered.
			first, fetchErr := enrollment(t, b.API, m.Token, node, time.Minute).Fetch(t.Context())
			must(t, fetchErr)
			b.Kill()
			again, fetchErr := enrollment(t, third.API, m.Token, node, time.Minute).Fetch(t.Context())
			must(t, fetchErr)
			if !bytes.Equal(first.PEM, again.PEM) || first.SHA256 != again.SHA256 || fingerprints[first.Fingerprint] {
				t.Fatalf("round %d (the first replica said %v): two keys for one enrollment, or one for two", round, err)
			}
			fingerprints[first.Fingerprint] = true
			// Its receipt goes to the third, which dies as well; and again to the first.
			private, parseErr := client.ParsePrivateKey(again.PEM)
			must(t, parseErr)
			must(t, enrollment(t, third.API, m.Token, node, time.Minute).Client.Receipt(t.Context(), again.Delivery, private))
			third.Kill()
			for _, r := range []*harness.Server{a, b, third} {
				r.Start(t)
			}
			must(t, enrollment(t, a.API, m.Token, node, time.Minute).Client.Receipt(t.Context(), again.Delivery, private))
		}
		oneKeyEach(t, clusterDatabase(t, c), rounds)
		nothingInTheBackend(t, c)
	})
}

// oneKeyEach fails unless n deliveries ended with a receipt, each with one key
// that has its place, its events once, and nothing else is left of them.
func oneKeyEach(t *testing.T, db *sql.DB, n int) {
	t.Helper()
	for what, query := range map[string]string{
		"keys released and in their places":              "SELECT count(*) FROM keys_of_nodes WHERE slot IS NOT NULL AND state = 'released'",
		"places taken":                                   "SELECT count(*) FROM keys_of_nodes WHERE slot IS NOT NULL",
		"keys that there ever were":                      "SELECT count(*) FROM keys_of_nodes",
		"deliveries received, without the wrapped bytes": "SELECT count(*) FROM deliveries WHERE stage = 'received' AND wrapped IS NULL",
		"deliveries":                                     "SELECT count(*) FROM deliveries",
		"fingerprints":                                   "SELECT count(DISTINCT fingerprint) FROM deliveries",
		"events of creations":                            "SELECT count(*) FROM events WHERE type = 'orgkey.created'",
		"events of sealings":                             "SELECT count(*) FROM events WHERE type = 'orgkey.sealed'",
		"events of receipts":                             "SELECT count(*) FROM events WHERE type = 'orgkey.received'",
		"events of claims":                               "SELECT count(*) FROM events WHERE type = 'enrollment.claimed'",
	} {
		if got := harness.Number(t, db, query); got != int64(n) {
			t.Errorf("%d %s, want %d", got, what, n)
		}
	}
}

// mintBy is mint with a token of another issuer than the development one.
func mintBy(t *testing.T, s *harness.Server, org, owner, terms string) minted {
	t.Helper()
	resp := s.Do(t, harness.Request{Method: http.MethodPost, Path: "/organization/" + org + "/enrollment", Token: owner, Body: []byte(terms)})
	resp.Want(t, http.StatusCreated, "Enrollment created. The token is shown only once.")
	var answer struct {
		Data minted `json:"data"`
	}
	mustUnmarshal(t, resp.Body, &answer)
	return answer.Data
}

// manyRecipients makes n recipients.
func manyRecipients(t *testing.T, n int) []*rsa.PrivateKey {
	t.Helper()
	return keysOf(t, n, 3072)
}

// keysOf makes n keys quickly: each of a few primes is in several.
func keysOf(t *testing.T, n, bits int) []*rsa.PrivateKey {
	t.Helper()
	var primes []*big.Int
	var all []*rsa.PrivateKey
	for len(all) < n {
		p, err := rand.Prime(rand.Reader, bits/2)
		must(t, err)
		for _, q := range primes {
			if k := keyOf(p, q, bits); k != nil && len(all) < n {
				all = append(all, k)
			}
		}
		primes = append(primes, p)
	}
	return all
}

// keyOf is the key of two primes, or nil if they make none of that many bits.
func keyOf(p, q *big.Int, bits int) *rsa.PrivateKey {
	one := big.NewInt(1)
	k := &rsa.PrivateKey{PublicKey: rsa.PublicKey{N: new(big.Int).Mul(p, q), E: 65537}, Primes: []*big.Int{p, q}}
	phi := new(big.Int).Mul(new(big.Int).Sub(p, one), new(big.Int).Sub(q, one))
	if k.D = new(big.Int).ModInverse(big.NewInt(65537), phi); k.D == nil || k.N.BitLen() != bits {
		return nil
	}
	k.Precompute()
	return k
}

// TestPromise13_AHundredWantOneToken sends as many claims at once over three
// replicas, each for another recipient.
func TestPromise13_AHundredWantOneToken(t *testing.T) {
	onEveryBackend(t, func(t *testing.T, backend string) {
		c := replicasOf(t, backend, 3)
		recipients := manyRecipients(t, 100)
		db := clusterDatabase(t, c)
		given := 0
		for _, uses := range []int{1, 7} {
			org := harness.Org()
			m := mintBy(t, c.Replicas[0], org, c.Owner(t, org), fmt.Sprintf(`{"uses":%d}`, uses))
			got, refused := claimAtOnce(t, c, m, recipients)
			given += len(got)
			if len(got) != uses || refused != len(recipients)-uses {
				t.Errorf("%d uses: %d recipients got a key, %d were refused", uses, len(got), refused)
			}
			at := "/organization/" + org + "/enrollment/" + m.ID
			resp := c.Replicas[1].Do(t, harness.Request{Method: http.MethodGet, Path: at, Token: c.Owner(t, org)})
			var seen struct{ Data shown }
			mustUnmarshal(t, resp.Body, &seen)
			conflicts := harness.Number(t, db, "SELECT count(*) FROM events WHERE type = 'enrollment.conflict' AND object = $1", m.ID)
			if conflicts != 20 || seen.Data.Conflicts < refused || len(seen.Data.Claims) != uses {
				t.Errorf("%d uses: %d events of conflicts, %d counted, %d claims", uses, conflicts, seen.Data.Conflicts, len(seen.Data.Claims))
			}
			if n := harness.Number(t, db, "SELECT count(*) FROM keys_of_nodes WHERE org_id = $1 AND slot IS NOT NULL", org); n != int64(uses) {
				t.Errorf("%d uses: %d places are taken", uses, n)
			}
		}
		oneKeyEach(t, db, given)
		nothingInTheBackend(t, c)
	})
}

// claimAtOnce has every recipient ask until it has a key or is refused.
func claimAtOnce(t *testing.T, c *cluster.Cluster, m minted, recipients []*rsa.PrivateKey) (got map[string]bool, refused int) {
	t.Helper()
	got = map[string]bool{}
	var mu sync.Mutex
	bodies := make([][]byte, len(recipients))
	for i, r := range recipients {
		bodies[i] = claimRequest(t, m, r)
	}
	inParallel(len(recipients), func(i int) {
		deadline := time.Now().Add(2 * time.Minute)
		for attempt := i; time.Now().Before(deadline); attempt++ {
			resp := c.Replicas[attempt%len(c.Replicas)].Do(t, asks(m, bodies[i]))
			switch resp.Status {
			case http.StatusOK:
				var sealed struct {
					Sealed envelope.SealedKey `json:"sealed"`
				}
				must(t, json.Unmarshal(resp.Body, &sealed))
				key, err := backendtest.OpenSealed(sealed.Sealed, recipients[i])
				if err != nil {
					t.Error(err)
					return
				}
				receipt(t, c.Replicas[i%len(c.Replicas)], resp, key)
				mu.Lock()
				defer mu.Unlock()
				fingerprint := client.Fingerprint(key.Public())
				if got[fingerprint] {
					t.Errorf("two recipients got one key")
				}
				got[fingerprint] = true
				return
			case http.StatusConflict:
				mu.Lock()
				defer mu.Unlock()
				refused++
				return
			case http.StatusAccepted, http.StatusServiceUnavailable:
				time.Sleep(200 * time.Millisecond)
			default:
				t.Errorf("claiming: %d %s", resp.Status, resp.Body)
				return
			}
		}
		t.Errorf("recipient %d is still waiting", i)
	})
	return got, refused
}

// nodeKey is a key that a node fetched, as the node uses it.
type nodeKey struct {
	id, org string
	key     *rsa.PrivateKey
}

// enrolled has a node fetch its key, and sign for it.
func enrolled(t *testing.T, c *cluster.Cluster, s *harness.Server, org string, recipient *rsa.PrivateKey) nodeKey {
	t.Helper()
	d := fetch(t, enrollment(t, s.API, mintBy(t, s, org, c.Owner(t, org), `{}`).Token, recipient, time.Minute))
	return nodeKey{d.KeyID, org, harness.ParsePrivate(t, d.PEM)}
}

// ask sends a signed request for the node at ip and returns status and code.
func (k nodeKey) ask(t *testing.T, nodes *http.Client, s *harness.Server, path, ip string, named bool) string {
	t.Helper()
	body, err := cluster.Signed(k.key, k.org, ip)
	must(t, err)
	var fields map[string]any
	mustUnmarshal(t, body, &fields)
	if named {
		fields["key_id"] = k.id
	}
	if path == "/unregister" {
		delete(fields, "version")
		delete(fields, "status")
	}
	body, err = json.Marshal(fields)
	must(t, err)
	resp, err := nodes.Post(s.API+path, "application/json", bytes.NewReader(body))
	must(t, err)
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	must(t, err)
	var answer struct {
		Code string `json:"errorCode"`
	}
	_ = json.Unmarshal(text, &answer) // what is not JSON has no code
	return fmt.Sprintf("%d %s", resp.StatusCode, answer.Code)
}

var nodePaths = []string{"/secrets", "/register", "/unregister"}

// TestPromise14_ANodeKeyActsForItsNodeOnEveryReplica: on another node's address,
// after its node was deleted on one replica, and after the key was, it is refused
// on both at once, although both have opened it and keep it.
func TestPromise14_ANodeKeyActsForItsNodeOnEveryReplica(t *testing.T) {
	c := replicasOf(t, "SoftHSM", 2)
	rounds := 2
	if long() {
		rounds = 100
	}
	recipient := newRecipient(t)
	for round := range rounds {
		org := harness.Org()
		owner := c.Owner(t, org)
		a, b := c.Replicas[round%2], c.Replicas[1-round%2]
		first, second := enrolled(t, c, a, org, recipient), enrolled(t, c, b, org, recipient)
		const here, there, free = "192.0.2.1", "192.0.2.2", "192.0.2.3"
		// Failures are limited by address, and these come on purpose.
		nodes := from(net.IPv4(127, 14, byte(round), 1))
		want := func(k nodeKey, ip, answer string, replicas ...*harness.Server) {
			t.Helper()
			for _, r := range replicas {
				for _, path := range nodePaths {
					for _, named := range []bool{true, false} {
						expected := answer
						if !named && answer == "409 address_in_use" {
							expected = "400 bad_signature" // the key that is bound to the address did not sign
						}
						if got := k.ask(t, nodes, r, path, ip, named); got != expected {
							t.Errorf("round %d: %s for %s, key named %t: %s, want %s", round, path, ip, named, got, expected)
						}
					}
				}
			}
		}
		for k, ip := range map[*nodeKey]string{&first: here, &second: there} {
			for _, r := range c.Replicas {
				for _, path := range []string{"/register", "/secrets"} {
					if got := k.ask(t, nodes, r, path, ip, true); got != "200 " {
						t.Fatalf("round %d: %s for its own node: %s", round, path, got)
					}
				}
			}
		}
		want(first, there, "409 address_in_use", a, b)
		want(second, here, "409 address_in_use", b, a)

		// The node is deleted on one replica, and its key ends on the other.
		resp := a.Do(t, harness.Request{Method: "GET", Path: "/organization/" + org + "/nodes", Token: owner})
		var list struct {
			Data []struct{ ID, IP string } `json:"data"`
		}
		mustUnmarshal(t, resp.Body, &list)
		for _, n := range list.Data {
			if n.IP == here {
				do(t, a, 200, harness.Request{Method: "DELETE", Path: "/organization/" + org + "/node/" + n.ID, Token: owner})
			}
		}
		want(first, here, "400 bad_signature", b, a)
		want(first, free, "400 bad_signature", b, a)
		// The key is deleted, its node is not.
		do(t, b, 200, harness.Request{Method: "DELETE", Path: harness.KeyPath(org) + "/" + second.id, Token: owner})
		want(second, there, "400 bad_signature", a, b)
		want(second, free, "400 bad_signature", a, b)
		nodes.CloseIdleConnections()
	}
}

// TestPathsThatAreNoText: what PostgreSQL takes for no text is as unknown as what
// there is none of.
func TestPathsThatAreNoText(t *testing.T) {
	t.Parallel()
	c := replicasOf(t, "SoftHSM", 1)
	s, org := c.Replicas[0], harness.Org()
	owner := s.Token(t, org, "OWNER")
	for _, c := range []struct {
		method, path string
		status       int
	}{
		{"GET", "/device/%s", 404}, {"DELETE", "/device/%s", 404}, {"PUT", "/device/%s", 400},
		{"DELETE", "/secret/%s", 404}, {"DELETE", "/node/%s", 404},
		{"DELETE", "/key/%s", 404}, {"GET", "/key/%s/sealed", 404},
		{"GET", "/enrollment/%s", 404}, {"DELETE", "/enrollment/%s", 404},
		{"GET", "/event/%s/proof", 404}, {"GET", "/event?object=%s", 400}, {"GET", "/event?actor=%s", 400}, {"GET", "/event?type=%s", 400},
		{"GET", "/decision/%s", 400},
	} {
		for _, text := range []string{"%00", "a%00b", "%ff", "a%c3"} {
			path := strings.Replace(c.path, "%s", text, 1)
			if got := s.Do(t, harness.Request{Method: c.method, Path: "/organization/" + org + path, Token: owner}); got.Status != c.status {
				t.Errorf("%s %s: %d %s, want %d", c.method, path, got.Status, got.Body, c.status)
			}
		}
	}
}
