package chaos

import (
	"bytes"
	"context"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"math/big"
	"math/rand/v2"
	"net/http"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/orgkeys/orgkeys/internal/chaos/cluster"
)

// load is clients that generate, list, use and delete keys, and write down
// what they got.
type load struct {
	addresses []string // of the replicas
	orgs      []string
	tokens    map[string]string
	client    *http.Client

	mu       sync.Mutex
	asked    int
	received []Received
	usable   map[string][]held // by organization
	requests map[string]bool   // the IDs of requests that delete
	deleted  []string
	answered map[string]time.Time // when a deletion was, by the key's ID
	statuses map[int]int
	failed   int // requests without a whole answer
	wrong    []string
}

// held is a private key in a client's hands.
type held struct {
	id      string
	private *rsa.PrivateKey
}

func newLoad(t *testing.T, c *cluster.Cluster, orgs int) *load {
	l := &load{
		tokens: map[string]string{}, usable: map[string][]held{}, requests: map[string]bool{}, answered: map[string]time.Time{}, statuses: map[int]int{},
		client: &http.Client{Timeout: 40 * time.Second, Transport: &http.Transport{MaxIdleConnsPerHost: 16}},
	}
	for _, r := range c.Replicas {
		l.addresses = append(l.addresses, r.Address())
	}
	for i := range orgs {
		org := fmt.Sprintf("chaos-%02d", i)
		l.orgs = append(l.orgs, org)
		l.tokens[org] = c.Owner(t, org)
	}
	return l
}

// run has so many clients make requests until ctx ends, and waits for them.
func (l *load) run(ctx context.Context, clients int, seed uint64) {
	var wg sync.WaitGroup
	for i := range clients {
		wg.Go(func() {
			dice := rand.New(rand.NewPCG(seed, uint64(i)))
			for ctx.Err() == nil {
				l.act(dice)
			}
		})
	}
	wg.Wait()
	l.client.CloseIdleConnections()
}

func (l *load) act(dice *rand.Rand) {
	org := l.orgs[dice.IntN(len(l.orgs))]
	switch n := dice.IntN(100); {
	case n < 45:
		l.generate(dice, org)
	case n < 60:
		l.do(dice, http.MethodGet, keys(org), l.tokens[org], nil)
	case n < 75:
		l.use(dice, org)
	case n < 97:
		l.delete(dice, org)
	default:
		l.deleteAll(dice, org)
	}
}

func keys(org string) string { return "/organization/" + org + "/key" }

// answer is a whole answer.
type answer struct {
	status int
	header http.Header
	body   []byte
}

var errNoAnswer = errors.New("no whole answer")

// do sends a request to one of the replicas. Its ID is the request's own.
func (l *load) do(dice *rand.Rand, method, path, token string, body []byte) (answer, string, error) {
	id := fmt.Sprintf("chaos-%016x%016x", dice.Uint64(), dice.Uint64())
	if method == http.MethodDelete {
		l.mu.Lock()
		l.requests[id] = true
		l.mu.Unlock()
	}
	request, err := http.NewRequest(method, "http://"+l.addresses[dice.IntN(len(l.addresses))]+path, bytes.NewReader(body))
	if err != nil {
		return answer{}, id, err
	}
	request.Header.Set("X-Request-Id", id)
	if token != "" {
		request.Header.Set("Authorization", "Bearer "+token)
	}
	a, err := l.exchange(request)
	l.mu.Lock()
	defer l.mu.Unlock()
	l.asked++
	if err != nil {
		l.failed++
		return answer{}, id, errNoAnswer
	}
	l.statuses[a.status]++
	return a, id, nil
}

func (l *load) exchange(request *http.Request) (answer, error) {
	response, err := l.client.Do(request)
	if err != nil {
		time.Sleep(20 * time.Millisecond) // nobody listens: do not spin
		return answer{}, err
	}
	defer response.Body.Close()
	body, err := io.ReadAll(response.Body)
	if response.StatusCode == http.StatusServiceUnavailable {
		time.Sleep(20 * time.Millisecond) // likewise
	}
	return answer{response.StatusCode, response.Header, body}, err
}

func (l *load) generate(dice *rand.Rand, org string) {
	a, _, err := l.do(dice, http.MethodPost, keys(org), l.tokens[org], nil)
	if err != nil || a.status != http.StatusOK {
		return
	}
	id := a.header.Get("X-Key-Id")
	block, _ := pem.Decode(a.body)
	l.mu.Lock()
	defer l.mu.Unlock()
	if block == nil {
		l.wrong = append(l.wrong, fmt.Sprintf("key %s: a whole answer is not a key", id))
		return
	}
	private, err := x509.ParsePKCS1PrivateKey(block.Bytes)
	if err != nil {
		l.wrong = append(l.wrong, fmt.Sprintf("key %s: %v", id, err))
		return
	}
	l.received = append(l.received, Received{org, id, thumbprint(&private.PublicKey)})
	l.usable[org] = append(l.usable[org], held{id, private})
}

// thumbprint is RFC 7638's.
func thumbprint(k *rsa.PublicKey) string {
	text := base64.RawURLEncoding.EncodeToString
	sum := sha256.Sum256([]byte(fmt.Sprintf(`{"e":%q,"kty":"RSA","n":%q}`, text(big.NewInt(int64(k.E)).Bytes()), text(k.N.Bytes()))))
	return text(sum[:])
}

// pick takes a key that the client believes to have, and forgets it if remove.
func (l *load) pick(dice *rand.Rand, org string, remove bool) (held, bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	have := l.usable[org]
	if len(have) == 0 {
		return held{}, false
	}
	i := dice.IntN(len(have))
	key := have[i]
	if remove {
		l.usable[org] = slices.Delete(have, i, i+1)
	}
	return key, true
}

// use has a node fetch the organization's secrets with one of its keys.
func (l *load) use(dice *rand.Rand, org string) {
	key, ok := l.pick(dice, org, false)
	if !ok {
		return
	}
	body, err := cluster.Signed(key.private, org, "192.0.2.1")
	if err == nil {
		_, _, _ = l.do(dice, http.MethodPost, "/secrets", "", body)
	}
}

// delete deletes a key, and sees that no replica takes it any more.
func (l *load) delete(dice *rand.Rand, org string) {
	key, ok := l.pick(dice, org, true)
	if !ok {
		return
	}
	a, _, err := l.do(dice, http.MethodDelete, keys(org)+"/"+key.id, l.tokens[org], nil)
	if err != nil || a.status != http.StatusOK {
		return
	}
	l.mu.Lock()
	l.deleted = append(l.deleted, key.id)
	l.answered[key.id] = time.Now()
	l.mu.Unlock()
	body, err := cluster.Signed(key.private, org, "192.0.2.1")
	if err != nil {
		return
	}
	if a, _, err := l.do(dice, http.MethodPost, "/register", "", body); err == nil && a.status == http.StatusOK {
		l.mu.Lock()
		l.wrong = append(l.wrong, fmt.Sprintf("key %s: taken after its deletion was answered", key.id))
		l.mu.Unlock()
	}
}

func (l *load) deleteAll(dice *rand.Rand, org string) {
	l.mu.Lock()
	l.usable[org] = nil
	l.mu.Unlock()
	_, _, _ = l.do(dice, http.MethodDelete, keys(org), l.tokens[org], nil)
}
