// Package backendtest is the contract of orgkey's back ends as tests. Every
// implementation of orgkey.Keystore and orgkey.Sealer runs them.
package backendtest

import (
	"bytes"
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"

	"github.com/orgkeys/orgkeys/internal/orgkey"
)

// patience bounds every test's calls; a generation takes well under a second.
const patience = time.Minute

func bounded(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	t.Cleanup(cancel)
	return ctx
}

// Keystore tests ks. gone looks into the back end, past ks, and fails the test
// if anything there still has the name.
func Keystore(t *testing.T, ks orgkey.Keystore, gone func(t *testing.T, name string)) {
	t.Run("a key is created, exported and destroyed", func(t *testing.T) { lifeOfKey(t, ks, gone) })
	t.Run("two keys differ, also if made at once", func(t *testing.T) { keysDiffer(t, ks) })
	t.Run("destroying twice is no error", func(t *testing.T) { destroyTwice(t, ks, gone) })
	t.Run("a key never exported is destroyed", func(t *testing.T) { destroyUnexported(t, ks, gone) })
	t.Run("a key is destroyed although the request is over", func(t *testing.T) { destroyCancelled(t, ks, gone) })
	t.Run("a destroyed key is not exported", func(t *testing.T) { exportDestroyed(t, ks) })
	t.Run("nothing is made for a request that is over", func(t *testing.T) { createCancelled(t, ks, gone) })
	t.Run("nothing stays of a request that ends during generation", func(t *testing.T) { createInterrupted(t, ks, gone) })
	t.Run("many callers at once each get their own key", func(t *testing.T) { parallel(t, ks, gone) })
}

// create makes a key that is destroyed when the test ends, if not before.
func create(t *testing.T, ks orgkey.Keystore) (orgkey.BackendKey, string) {
	t.Helper()
	name := uuid.NewString()
	key, err := ks.Create(bounded(t), name)
	if err != nil {
		t.Fatalf("Create: %v", err)
	}
	t.Cleanup(func() {
		if err := key.Destroy(context.Background()); err != nil {
			t.Errorf("Destroy at the end: %v", err)
		}
	})
	return key, name
}

func checkExport(der []byte, public orgkey.Public) error {
	private, err := x509.ParsePKCS1PrivateKey(der)
	if err != nil {
		return fmt.Errorf("not PKCS#1: %w", err)
	}
	if private.N.BitLen() != orgkey.Bits || private.E != 65537 {
		return fmt.Errorf("%d bits, exponent %d; want %d and 65537", private.N.BitLen(), private.E, orgkey.Bits)
	}
	if orgkey.NewPublic(&private.PublicKey).Fingerprint() != public.Fingerprint() {
		return errors.New("not the private half of Public")
	}
	return private.Validate()
}

func lifeOfKey(t *testing.T, ks orgkey.Keystore, gone func(*testing.T, string)) {
	key, name := create(t, ks)
	der, err := key.Export(bounded(t))
	if err != nil {
		t.Fatalf("Export: %v", err)
	}
	if err := checkExport(der, key.Public()); err != nil {
		t.Errorf("exported key: %v", err)
	}
	clear(der)
	if err := key.Destroy(bounded(t)); err != nil {
		t.Fatalf("Destroy: %v", err)
	}
	gone(t, name)
}

func keysDiffer(t *testing.T, ks orgkey.Keystore) {
	var wg sync.WaitGroup
	var prints [2]string
	for i := range prints {
		wg.Go(func() {
			key, err := ks.Create(bounded(t), uuid.NewString())
			if err != nil {
				t.Errorf("Create: %v", err)
				return
			}
			prints[i] = key.Public().Fingerprint()
			if err := key.Destroy(bounded(t)); err != nil {
				t.Errorf("Destroy: %v", err)
			}
		})
	}
	wg.Wait()
	if !t.Failed() && prints[0] == prints[1] {
		t.Error("two creations gave one key")
	}
}

func destroyTwice(t *testing.T, ks orgkey.Keystore, gone func(*testing.T, string)) {
	key, name := create(t, ks)
	for i := range 2 {
		if err := key.Destroy(bounded(t)); err != nil {
			t.Errorf("Destroy number %d: %v", i+1, err)
		}
		gone(t, name)
	}
}

func destroyUnexported(t *testing.T, ks orgkey.Keystore, gone func(*testing.T, string)) {
	key, name := create(t, ks)
	if err := key.Destroy(bounded(t)); err != nil {
		t.Fatalf("Destroy: %v", err)
	}
	gone(t, name)
}

func destroyCancelled(t *testing.T, ks orgkey.Keystore, gone func(*testing.T, string)) {
	key, name := create(t, ks)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := key.Destroy(ctx); err != nil {
		t.Fatalf("Destroy with a context that has ended: %v", err)
	}
	gone(t, name)
}

func exportDestroyed(t *testing.T, ks orgkey.Keystore) {
	key, _ := create(t, ks)
	if err := key.Destroy(bounded(t)); err != nil {
		t.Fatalf("Destroy: %v", err)
	}
	if der, err := key.Export(bounded(t)); err == nil {
		clear(der)
		t.Error("a destroyed key was exported")
	}
}

func createCancelled(t *testing.T, ks orgkey.Keystore, gone func(*testing.T, string)) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	name := uuid.NewString()
	key, err := ks.Create(ctx, name)
	if err == nil {
		t.Errorf("Create succeeded; destroyed: %v", key.Destroy(t.Context()))
	} else if !errors.Is(err, context.Canceled) {
		t.Errorf("Create: %v, want context.Canceled", err)
	}
	gone(t, name)
}

// A back end may finish a generation that nobody waits for; then it destroys
// the key, in its own time.
func createInterrupted(t *testing.T, ks orgkey.Keystore, gone func(*testing.T, string)) {
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Millisecond)
	defer cancel()
	name := uuid.NewString()
	key, err := ks.Create(ctx, name)
	if err == nil { // it was quicker
		if err := key.Destroy(t.Context()); err != nil {
			t.Errorf("Destroy: %v", err)
		}
	} else if !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("Create: %v, want context.DeadlineExceeded", err)
	}
	// What was left generating ends before the places of all others do.
	parallel(t, ks, func(*testing.T, string) {})
	gone(t, name)
}

func parallel(t *testing.T, ks orgkey.Keystore, gone func(*testing.T, string)) {
	const callers = 6
	var wg sync.WaitGroup
	names := make([]string, callers)
	publics := make([]orgkey.Public, callers)
	for i := range callers {
		names[i] = uuid.NewString()
		wg.Go(func() {
			var err error
			if publics[i], err = generate(bounded(t), ks, names[i]); err != nil {
				t.Errorf("caller %d: %v", i, err)
			}
		})
	}
	wg.Wait()
	if t.Failed() {
		return
	}
	for i, name := range names {
		gone(t, name)
		for j := range i {
			if publics[i].Fingerprint() == publics[j].Fingerprint() {
				t.Errorf("callers %d and %d were given one key", i, j)
			}
		}
	}
}

// generate is what the service does with a key.
func generate(ctx context.Context, ks orgkey.Keystore, name string) (orgkey.Public, error) {
	key, err := ks.Create(ctx, name)
	if err != nil {
		return orgkey.Public{}, fmt.Errorf("making a key: %w", err)
	}
	der, err := key.Export(ctx)
	if err == nil {
		err = checkExport(der, key.Public())
		clear(der)
	}
	if err := errors.Join(err, key.Destroy(ctx)); err != nil {
		return orgkey.Public{}, err
	}
	return key.Public(), nil
}

// Sealer tests s. Sealed values must not be malleable: a changed byte that
// makes no difference to opening is a failure too.
func Sealer(t *testing.T, s orgkey.Sealer) {
	t.Run("what was sealed opens", func(t *testing.T) { roundTrips(t, s) })
	t.Run("it opens under its own binding only", func(t *testing.T) { otherBindings(t, s) })
	t.Run("two values that changed places do not open", func(t *testing.T) { swapped(t, s) })
	t.Run("no byte can be changed", func(t *testing.T) { everyByteFlipped(t, s) })
	t.Run("nothing can be cut off or appended", func(t *testing.T) { otherLengths(t, s) })
	t.Run("garbage does not open", func(t *testing.T) { garbage(t, s) })
	t.Run("values that are sealed together open apart", func(t *testing.T) { sealedTogether(t, s) })
	t.Run("a batch opens in order", func(t *testing.T) { batch(t, s) })
	t.Run("a batch opens as a whole or not at all", func(t *testing.T) { allOrNothing(t, s) })
	t.Run("equal values are sealed differently", func(t *testing.T) { equalDiffers(t, s) })
	t.Run("nothing is done for a request that is over", func(t *testing.T) { sealCancelled(t, s) })
	t.Run("many callers at once", func(t *testing.T) { sealInParallel(t, s) })
}

func binding() orgkey.Binding {
	return orgkey.Binding{Purpose: orgkey.PublicKey, Org: "acme", ID: uuid.NewString()}
}

func seal(t *testing.T, s orgkey.Sealer, b orgkey.Binding, plaintext []byte) []byte {
	t.Helper()
	sealed, err := s.Seal(bounded(t), b, plaintext)
	if err != nil {
		t.Fatalf("Seal: %v", err)
	}
	return sealed
}

func open(t *testing.T, s orgkey.Sealer, items ...orgkey.Sealed) ([][]byte, error) {
	t.Helper()
	return s.Open(bounded(t), items)
}

func broken(t *testing.T, s orgkey.Sealer, what string, items ...orgkey.Sealed) {
	t.Helper()
	opened, err := open(t, s, items...)
	if !errors.Is(err, orgkey.ErrSealBroken) || errors.Is(err, orgkey.ErrUnavailable) {
		t.Errorf("%s: Open reports %v, want ErrSealBroken only", what, err)
	}
	if opened != nil {
		t.Errorf("%s: Open returned %d values beside its error", what, len(opened))
	}
}

func roundTrips(t *testing.T, s orgkey.Sealer) {
	for name, plaintext := range map[string][]byte{
		"empty":    {},
		"one byte": {0},
		"a line":   []byte("a line\n"),
		"64 KiB":   bytes.Repeat([]byte{0xa5, 0, 0xff, 10}, 16<<10),
	} {
		for _, purpose := range []string{orgkey.PublicKey, orgkey.BootSecret} {
			b := orgkey.Binding{Purpose: purpose, Org: "acme", ID: "id"}
			opened, err := open(t, s, orgkey.Sealed{Binding: b, Ciphertext: seal(t, s, b, plaintext)})
			if err != nil {
				t.Errorf("%s, purpose %q: Open: %v", name, purpose, err)
			} else if len(opened) != 1 || !bytes.Equal(opened[0], plaintext) {
				t.Errorf("%s, purpose %q: another value came back", name, purpose)
			}
		}
	}
}

func otherBindings(t *testing.T, s orgkey.Sealer) {
	b := orgkey.Binding{Purpose: orgkey.PublicKey, Org: "acme", ID: "one"}
	sealed := seal(t, s, b, []byte("value"))
	for name, other := range map[string]orgkey.Binding{
		"another organization":       {Purpose: b.Purpose, Org: "acme2", ID: b.ID},
		"its name in other letters":  {Purpose: b.Purpose, Org: "ACME", ID: b.ID},
		"another ID":                 {Purpose: b.Purpose, Org: b.Org, ID: "two"},
		"another purpose":            {Purpose: orgkey.BootSecret, Org: b.Org, ID: b.ID},
		"no organization":            {Purpose: b.Purpose, ID: b.ID},
		"no ID":                      {Purpose: b.Purpose, Org: b.Org},
		"organization and ID traded": {Purpose: b.Purpose, Org: b.ID, ID: b.Org},
		"the border between moved":   {Purpose: b.Purpose, Org: "acm", ID: "eone"},
	} {
		broken(t, s, name, orgkey.Sealed{Binding: other, Ciphertext: sealed})
	}
}

func swapped(t *testing.T, s orgkey.Sealer) {
	a, b := binding(), binding()
	sealedA, sealedB := seal(t, s, a, []byte("value of a")), seal(t, s, b, []byte("value of b"))
	broken(t, s, "b's value in a's place", orgkey.Sealed{Binding: a, Ciphertext: sealedB})
	broken(t, s, "both traded", orgkey.Sealed{Binding: a, Ciphertext: sealedB}, orgkey.Sealed{Binding: b, Ciphertext: sealedA})
}

func everyByteFlipped(t *testing.T, s orgkey.Sealer) {
	b := binding()
	sealed := seal(t, s, b, []byte("sixteen or so bytes"))
	for i := range sealed {
		changed := bytes.Clone(sealed)
		changed[i] ^= 1
		broken(t, s, fmt.Sprintf("lowest bit of byte %d of %d", i, len(sealed)), orgkey.Sealed{Binding: b, Ciphertext: changed})
	}
	if _, err := open(t, s, orgkey.Sealed{Binding: b, Ciphertext: sealed}); err != nil {
		t.Errorf("afterwards the value itself does not open: %v", err)
	}
}

func otherLengths(t *testing.T, s orgkey.Sealer) {
	b := binding()
	sealed := seal(t, s, b, []byte("value"))
	for n := range sealed {
		broken(t, s, fmt.Sprintf("the first %d of %d bytes", n, len(sealed)), orgkey.Sealed{Binding: b, Ciphertext: sealed[:n:n]})
	}
	broken(t, s, "nil", orgkey.Sealed{Binding: b})
	broken(t, s, "a byte appended", orgkey.Sealed{Binding: b, Ciphertext: append(bytes.Clone(sealed), 0)})
	broken(t, s, "a line's end appended", orgkey.Sealed{Binding: b, Ciphertext: append(bytes.Clone(sealed), '\n')})
	broken(t, s, "the value twice", orgkey.Sealed{Binding: b, Ciphertext: append(bytes.Clone(sealed), sealed...)})
}

func garbage(t *testing.T, s orgkey.Sealer) {
	for name, ciphertext := range map[string][]byte{
		"zeros":          make([]byte, 64),
		"ones":           bytes.Repeat([]byte{0xff}, 64),
		"text":           []byte("-----BEGIN PUBLIC KEY-----"),
		"a back end's":   []byte("vault:v1:"),
		"64 KiB of text": bytes.Repeat([]byte("garbage "), 8<<10),
	} {
		broken(t, s, name, orgkey.Sealed{Binding: binding(), Ciphertext: ciphertext})
	}
}

func sealMany(t *testing.T, s orgkey.Sealer, n int) []orgkey.Sealed {
	t.Helper()
	items := make([]orgkey.Sealed, n)
	for i := range items {
		b := binding()
		items[i] = orgkey.Sealed{Binding: b, Ciphertext: seal(t, s, b, fmt.Appendf(nil, "value %d", i))}
	}
	return items
}

func sealedTogether(t *testing.T, s orgkey.Sealer) {
	values := []orgkey.Unsealed{
		{Binding: binding(), Plaintext: []byte("the same")}, {Binding: binding()},
		{Binding: binding(), Plaintext: []byte("the same")}, {Binding: binding(), Plaintext: bytes.Repeat([]byte{0xff}, 2000)},
	}
	sealed, err := s.SealAll(bounded(t), values)
	if err != nil || len(sealed) != len(values) {
		t.Fatalf("SealAll: %d values, %v", len(sealed), err)
	}
	for i, v := range values {
		opened, err := open(t, s, orgkey.Sealed{Binding: v.Binding, Ciphertext: sealed[i]})
		if err != nil || !bytes.Equal(opened[0], v.Plaintext) {
			t.Errorf("value %d: %d bytes, %v", i, len(opened), err)
		}
	}
	broken(t, s, "an equal value's place", orgkey.Sealed{Binding: values[0].Binding, Ciphertext: sealed[2]})
	if sealed, err := s.SealAll(bounded(t), nil); err != nil || len(sealed) != 0 {
		t.Errorf("sealing nothing: %d values, %v", len(sealed), err)
	}
}

func batch(t *testing.T, s orgkey.Sealer) {
	opened, err := open(t, s, sealMany(t, s, 20)...)
	if err != nil {
		t.Fatalf("Open: %v", err)
	}
	for i, value := range opened {
		if want := fmt.Sprintf("value %d", i); string(value) != want {
			t.Errorf("item %d is %q", i, value)
		}
	}
	if opened, err := open(t, s); err != nil || len(opened) != 0 {
		t.Errorf("opening nothing: %d values, %v", len(opened), err)
	}
}

func allOrNothing(t *testing.T, s orgkey.Sealer) {
	for _, bad := range []int{0, 2, 4} {
		items := sealMany(t, s, 5)
		items[bad].Ciphertext[len(items[bad].Ciphertext)/2] ^= 1
		broken(t, s, fmt.Sprintf("item %d of 5 is broken", bad), items...)
	}
}

func equalDiffers(t *testing.T, s orgkey.Sealer) {
	b := binding()
	seen := map[string]bool{}
	for range 50 {
		seen[string(seal(t, s, b, []byte("the same value")))] = true
	}
	if len(seen) != 50 {
		t.Errorf("50 equal values gave %d ciphertexts", len(seen))
	}
}

func sealCancelled(t *testing.T, s orgkey.Sealer) {
	b := binding()
	sealed := seal(t, s, b, []byte("value"))
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := s.Seal(ctx, b, []byte("value")); !errors.Is(err, context.Canceled) {
		t.Errorf("Seal: %v, want context.Canceled", err)
	}
	if _, err := s.SealAll(ctx, []orgkey.Unsealed{{Binding: b, Plaintext: []byte("value")}}); !errors.Is(err, context.Canceled) {
		t.Errorf("SealAll: %v, want context.Canceled", err)
	}
	if _, err := s.Open(ctx, []orgkey.Sealed{{Binding: b, Ciphertext: sealed}}); !errors.Is(err, context.Canceled) || errors.Is(err, orgkey.ErrSealBroken) {
		t.Errorf("Open: %v, want context.Canceled", err)
	}
}

func sealInParallel(t *testing.T, s orgkey.Sealer) {
	ctx := bounded(t)
	var wg sync.WaitGroup
	for caller := range 8 {
		wg.Go(func() {
			for i := range 20 {
				b, want := binding(), fmt.Sprintf("caller %d, value %d", caller, i)
				sealed, err := s.Seal(ctx, b, []byte(want))
				if err != nil {
					t.Errorf("Seal: %v", err)
					return
				}
				opened, err := s.Open(ctx, []orgkey.Sealed{{Binding: b, Ciphertext: sealed}})
				if err != nil || string(opened[0]) != want {
					t.Errorf("%s: came back as %q, %v", want, opened, err)
				}
			}
		})
	}
	wg.Wait()
}
