package e2e

import (
	"context"
	"crypto/rsa"
	"errors"
	"fmt"
	mathrand "math/rand/v2"
	"net/http"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/orgkeys/orgkeys/client"
	"github.com/orgkeys/orgkeys/internal/e2e/harness"
	"github.com/orgkeys/orgkeys/internal/freeport"
	"github.com/orgkeys/orgkeys/internal/vault/vaulttest"
)

// deliveries is one server that is killed while a node fetches keys from it,
// one after another, each with a token of its own.
type deliveries struct {
	s         *harness.Server
	org       string
	recipient *rsa.PrivateKey
	seen      map[string]bool // fingerprints
	begun     int
}

// onItsPort has a server keep its port, so that a node finds it again.
func onItsPort(t *testing.T) harness.Option {
	t.Helper()
	port, err := freeport.Find(1000)
	must(t, err)
	return harness.Set("ORGKEYS_LISTEN", fmt.Sprintf("127.0.0.1:%d", port))
}

// through has a node fetch a key and sign for it while strike does what it
// does to the server. strike returns once the server has died, or whole is closed.
func (d *deliveries) through(t *testing.T, strike func(whole <-chan struct{})) {
	t.Helper()
	d.begun++
	m := mint(t, d.s, d.org, `{}`)
	e := enrollment(t, d.s.API, m.Token, d.recipient, 2*time.Minute)
	whole := make(chan struct{})
	fingerprints := map[string]bool{}
	var failed error
	go func() {
		defer close(whole)
		failed = d.node(e, fingerprints)
	}()
	strike(whole)
	if !d.s.Running() {
		d.s.Start(t)
	}
	<-whole
	if failed != nil {
		t.Fatalf("delivery %d: %v", d.begun, failed)
	}
	if len(fingerprints) != 1 {
		t.Fatalf("delivery %d ended with %d keys", d.begun, len(fingerprints))
	}
	for f := range fingerprints {
		if d.seen[f] {
			t.Fatalf("delivery %d ended with the key of another", d.begun)
		}
		d.seen[f] = true
	}
	if got := show(t, d.s, d.org, m.ID); got.State != "received" || len(got.Claims) != 1 || !fingerprints[got.Claims[0].Fingerprint] {
		t.Errorf("delivery %d is shown as %+v", d.begun, got)
	}
}

// node fetches a key twice, as one does whose first answer was lost after it
// came, and sends its receipt twice.
func (d *deliveries) node(e *client.Enrollment, fingerprints map[string]bool) error {
	var key *client.Delivered
	for range 2 {
		var err error
		if key, err = e.Fetch(context.Background()); err != nil {
			return fmt.Errorf("fetching: %w", err)
		}
		fingerprints[key.Fingerprint] = true
	}
	private, err := client.ParsePrivateKey(key.PEM)
	if err != nil {
		return err
	}
	for range 2 {
		if err := e.Client.Receipt(context.Background(), key.Delivery, private); err != nil {
			return fmt.Errorf("signing for it: %w", err)
		}
	}
	return nil
}

// randomly kills the server at some moment of a delivery.
func (d *deliveries) randomly(random *mathrand.Rand) func(<-chan struct{}) {
	return func(whole <-chan struct{}) {
		select {
		case <-whole:
		case <-time.After(time.Duration(random.IntN(600)) * time.Millisecond):
		}
		d.s.Kill()
	}
}

// atCall kills the server at the nth of some system calls on a file.
func (d *deliveries) atCall(t *testing.T, file string, calls []string, n int) func(<-chan struct{}) {
	return func(whole <-chan struct{}) {
		i := d.s.Interfere(t, file, calls, fmt.Sprintf("signal=SIGKILL:when=%d", n))
		for d.s.Running() {
			select {
			case <-whole: // it has no such call
				d.s.Kill()
			case <-time.After(5 * time.Millisecond):
			}
		}
		i.Stop(t)
	}
}

// endsWell looks at what is left.
func (d *deliveries) endsWell(t *testing.T) {
	t.Helper()
	settled(t, d.s)
	oneKeyEach(t, d.s.Database(t), d.begun)
	d.s.Stop(t)
	if out, stderr, code := d.s.Run(t, "audit", "verify"); code != 0 && code != 3 { // 3: the sink lies beside the log
		t.Errorf("audit verify: exit code %d\n%s%s", code, out, stderr)
	}
}

// kills12 is how often the tests of promise 12 kill the server: at so many steps
// in turn, or all there are, and then at random.
func kills12(inTurn int) (steps, random int) {
	if long() {
		return 1000, 250
	}
	return inTurn, max(1, *kills-inTurn)
}

// TestPromise12_KilledAfterEachStepOnSoftHSM: at each write to the database and
// at each time that one is made durable, and at random.
func TestPromise12_KilledAfterEachStepOnSoftHSM(t *testing.T) {
	t.Parallel()
	d := &deliveries{
		s:   harness.Start(t, onItsPort(t), shortLife(t, 6*time.Second)),
		org: harness.Org(), recipient: newRecipient(t), seen: map[string]bool{},
	}
	steps, random := kills12(3)
	wal := filepath.Join(d.s.Dir, "orgkeys.db-wal")
	source := mathrand.New(mathrand.NewPCG(*seed, 7))
	kills := 0
	for _, calls := range [][]string{writes, syncs} {
		for n := range steps {
			at := n + 1
			if !long() {
				at = 1 + source.IntN(12)
			}
			reached := true
			d.through(t, func(whole <-chan struct{}) {
				d.atCall(t, wal, calls, at)(whole)
				select {
				case <-whole:
					reached = false
				default:
				}
			})
			kills++
			if !reached && long() {
				break // there were fewer
			}
		}
	}
	for range random {
		d.through(t, d.randomly(source))
		kills++
	}
	onlyOwnKeys(t, d.s)
	d.endsWell(t)
	t.Logf("%d deliveries, %d kills", d.begun, kills)
}

// TestPromise12_KilledAfterEachStepOnVault: after each call to Vault that a
// delivery makes, and at random.
func TestPromise12_KilledAfterEachStepOnVault(t *testing.T) {
	v, proxy, settings := throughVault(t)
	d := &deliveries{
		s:   harness.Start(t, settings, onItsPort(t), shortLife(t, 6*time.Second)),
		org: harness.Org(), recipient: newRecipient(t), seen: map[string]bool{},
	}
	steps, random := kills12(3)
	source := mathrand.New(mathrand.NewPCG(*seed, 8))
	kills := 0
	for n := range steps {
		at := n + 1
		if !long() {
			at = 1 + source.IntN(16)
		}
		reached := true
		d.through(t, func(whole <-chan struct{}) { reached = d.afterCall(proxy, at, whole) })
		kills++
		if !reached && long() {
			break
		}
	}
	for range random {
		d.through(t, d.randomly(source))
		kills++
	}
	harness.Eventually(t, time.Minute, "no sealed key and no recipient is left in Vault", func() bool { return len(sealedInVault(t, v)) == 0 })
	d.endsWell(t)
	t.Logf("%d deliveries, %d kills", d.begun, kills)
}

func sealedInVault(t *testing.T, v *vaulttest.Server) []any {
	t.Helper()
	list, err := root(t, v).ListWithContext(t.Context(), "orgkeys-sealed/keys")
	must(t, err)
	if list == nil {
		return nil
	}
	return list.Data["keys"].([]any)
}

// afterCall kills the server after its nth call to Vault from the creation of a
// key on, and reports whether there was one.
func (d *deliveries) afterCall(proxy *vaulttest.Proxy, n int, whole <-chan struct{}) bool {
	var mu sync.Mutex
	counted, killed := 0, make(chan struct{})
	proxy.After(func(r *http.Response) error {
		mu.Lock()
		defer mu.Unlock()
		if counted == 0 && !strings.Contains(r.Request.URL.Path, "/orgkeys-sealed/keys/") || counted >= n {
			return nil
		}
		if counted++; counted < n {
			return nil
		}
		d.s.Kill()
		close(killed)
		return errors.New("killed")
	})
	defer proxy.After(nil)
	select {
	case <-killed:
		return true
	case <-whole:
		d.s.Kill()
		return false
	}
}
