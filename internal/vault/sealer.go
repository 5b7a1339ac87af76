package vault

import (
	"bytes"
	"cmp"
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"net/http"
	"regexp"
	"strconv"
	"time"

	"github.com/go-json-experiment/json"

	"github.com/orgkeys/orgkeys/internal/orgkey"
)

// sealBatch is how many items one call opens or wraps again. Transit takes
// ten thousand; this many answer well within a call's time.
const sealBatch = 1000

// sealBytes is about how many bytes of ciphertexts one call carries. Vault
// takes no request of more than 32 MiB.
const sealBytes = 4 << 20

var ciphertextHead = regexp.MustCompile(`^vault:v([1-9][0-9]{0,8}):`)

// parseCiphertext returns the key version of a Transit ciphertext, or an error
// that wraps orgkey.ErrSealBroken. Transit itself decodes more than one text
// to the same bytes; here only the canonical one passes.
func parseCiphertext(ciphertext []byte) (version int, err error) {
	m := ciphertextHead.FindSubmatch(ciphertext)
	if m == nil {
		return 0, fmt.Errorf("%w: it is not a Transit ciphertext", orgkey.ErrSealBroken)
	}
	sealed := ciphertext[len(m[0]):]
	// The decoder itself skips line breaks.
	if _, err := base64.StdEncoding.Strict().AppendDecode(nil, sealed); err != nil || len(sealed) == 0 || bytes.ContainsAny(sealed, "\r\n") {
		return 0, fmt.Errorf("%w: it is not base64", orgkey.ErrSealBroken)
	}
	return strconv.Atoi(string(m[1]))
}

// Sealer encrypts under keys that Transit derives from its key "seal", one for
// each binding. It implements orgkey.Sealer.
type Sealer struct{ c *Client }

// Sealer returns the sealer.
func (c *Client) Sealer() *Sealer { return &Sealer{c} }

// Seal implements orgkey.Sealer.
func (s *Sealer) Seal(ctx context.Context, b orgkey.Binding, plaintext []byte) ([]byte, error) {
	sealed, err := s.SealAll(ctx, []orgkey.Unsealed{{Binding: b, Plaintext: plaintext}})
	if err != nil {
		return nil, err
	}
	return sealed[0], nil
}

// SealAll implements orgkey.Sealer, in one call: the values are few and small.
func (s *Sealer) SealAll(ctx context.Context, values []orgkey.Unsealed) ([][]byte, error) {
	if len(values) == 0 {
		return nil, nil
	}
	body := encryptBody(values)
	answer, err := s.c.do(correlated(ctx, values[0].Binding.ID), request{method: http.MethodPut, path: sealMount + "/encrypt/seal", body: body})
	if err != nil {
		// Not cleared: the transport may still be sending it.
		return nil, fmt.Errorf("sealing: %w", notSealing(err))
	}
	clear(body)
	output, err := data[struct {
		Results []sealResult `json:"batch_results"`
	}](answer.body)
	if err != nil {
		return nil, fmt.Errorf("sealing: %w", err)
	}
	if len(output.Results) != len(values) {
		return nil, fmt.Errorf("sealing: %w: Transit answered %d values with %d results", orgkey.ErrUnavailable, len(values), len(output.Results))
	}
	sealed := make([][]byte, len(values))
	for i, r := range output.Results {
		if r.Error != "" {
			return nil, fmt.Errorf("sealing: %w", notSealing(errors.New(r.Error)))
		}
		if _, err := parseCiphertext([]byte(r.Ciphertext)); err != nil {
			return nil, errors.New("sealing: Vault's answer is not a ciphertext")
		}
		sealed[i] = []byte(r.Ciphertext)
	}
	return sealed, nil
}

// encryptBody never grows the buffer that it returns, so that no copy of a plaintext is
// left behind.
func encryptBody(values []orgkey.Unsealed) []byte {
	const head, context, plaintext, end, tail = `{"batch_input":[`, `{"context":"`, `","plaintext":"`, `"},`, `]}`
	size := len(head) + len(tail)
	for _, v := range values {
		size += len(context) + base64.StdEncoding.EncodedLen(len(v.Binding.Context())) + len(plaintext) + base64.StdEncoding.EncodedLen(len(v.Plaintext)) + len(end)
	}
	body := append(make([]byte, 0, size), head...)
	for _, v := range values {
		body = base64.StdEncoding.AppendEncode(append(body, context...), v.Binding.Context())
		body = base64.StdEncoding.AppendEncode(append(body, plaintext...), v.Plaintext)
		body = append(body, end...)
	}
	return append(body[:len(body)-1], tail...)
}

// Open implements orgkey.Sealer.
func (s *Sealer) Open(ctx context.Context, items []orgkey.Sealed) ([][]byte, error) {
	results, err := s.batches(ctx, "decrypt", items)
	if err != nil {
		return nil, fmt.Errorf("opening: %w", err)
	}
	opened := make([][]byte, len(results))
	for i, r := range results {
		opened[i] = r.Plaintext
	}
	return opened, nil
}

// Rewrap seals again under the newest version of the sealing key, inside
// Vault: no plaintext comes out. It rewraps all items or none. Rewrapping what
// is of the newest version already is harmless.
func (s *Sealer) Rewrap(ctx context.Context, items []orgkey.Sealed) ([][]byte, error) {
	results, err := s.batches(ctx, "rewrap", items)
	if err != nil {
		return nil, fmt.Errorf("rewrapping: %w", err)
	}
	wrapped := make([][]byte, len(results))
	for i, r := range results {
		if _, err := parseCiphertext([]byte(r.Ciphertext)); err != nil {
			return nil, errors.New("rewrapping: Vault's answer is not a ciphertext")
		}
		wrapped[i] = []byte(r.Ciphertext)
	}
	return wrapped, nil
}

// SealingKey is the state of the key in Transit that records are sealed under.
type SealingKey struct {
	Latest        int           // the version that Seal and Rewrap use
	Age           time.Duration // of that version, by Vault's clock; it is no younger
	MinDecryption int           // the oldest version that opens anything
}

// Key reads the state of the sealing key.
func (s *Sealer) Key(ctx context.Context) (SealingKey, error) {
	answer, err := s.c.do(ctx, request{method: http.MethodGet, path: sealKey})
	if err != nil {
		return SealingKey{}, fmt.Errorf("reading the sealing key's versions: %w", err)
	}
	k, err := data[struct {
		Latest        int              `json:"latest_version"`
		MinDecryption int              `json:"min_decryption_version"`
		Created       map[string]int64 `json:"keys"` // in Unix seconds
	}](answer.body)
	if err != nil {
		return SealingKey{}, fmt.Errorf("reading the sealing key's versions: %w", err)
	}
	created := time.Unix(k.Created[strconv.Itoa(k.Latest)], 0)
	return SealingKey{Latest: k.Latest, Age: answer.date.Sub(created) - clockGrain, MinDecryption: k.MinDecryption}, nil
}

// Version is the version of the sealing key that a ciphertext was sealed
// under, or an error that wraps orgkey.ErrSealBroken.
func (s *Sealer) Version(ciphertext []byte) (int, error) { return parseCiphertext(ciphertext) }

type sealItem struct {
	Ciphertext string `json:"ciphertext"`
	Context    []byte `json:"context"` // base64 in JSON
}

type sealResult struct {
	Ciphertext string `json:"ciphertext"`
	Plaintext  []byte `json:"plaintext"` // base64 in JSON
	Error      string `json:"error"`
}

func (s *Sealer) batches(ctx context.Context, operation string, items []orgkey.Sealed) ([]sealResult, error) {
	results := make([]sealResult, 0, len(items))
	for len(items) > 0 {
		n, size := 0, 0
		for n < len(items) && n < sealBatch && (n == 0 || size+len(items[n].Ciphertext) <= sealBytes) {
			size += len(items[n].Ciphertext)
			n++
		}
		part, err := s.batch(ctx, operation, items[:n])
		if err != nil {
			return nil, err
		}
		results = append(results, part...)
		items = items[n:]
	}
	return results, nil
}

// batch answers for every item or not at all. Transit reports a failed item
// inside a 200 or a 400, by what the others did.
func (s *Sealer) batch(ctx context.Context, operation string, items []orgkey.Sealed) ([]sealResult, error) {
	input := make([]sealItem, len(items))
	for i, item := range items {
		if _, err := parseCiphertext(item.Ciphertext); err != nil {
			return nil, fmt.Errorf("%s of %s: %w", named(item.Binding), item.Binding.Org, err)
		}
		input[i] = sealItem{string(item.Ciphertext), item.Binding.Context()}
	}
	body, err := json.Marshal(map[string]any{"batch_input": input})
	if err != nil {
		return nil, fmt.Errorf("encoding the batch: %w", err)
	}
	answer, err := s.c.do(ctx, request{method: http.MethodPut, path: sealMount + "/" + operation + "/seal", body: body})
	defer clear(answer.body)
	if err != nil && !badRequest(err) {
		return nil, notSealing(err)
	}
	output, decodeErr := data[struct {
		Results []sealResult `json:"batch_results"`
	}](answer.body)
	results := output.Results
	if decodeErr != nil || len(results) != len(items) {
		return nil, errors.Join(fmt.Errorf("%w: Transit answered %d items with %d results", orgkey.ErrUnavailable, len(items), len(results)), err, decodeErr)
	}
	for i, r := range results {
		if r.Error != "" {
			clearAll(results)
			return nil, fmt.Errorf("%w: %s of %s: %s", orgkey.ErrSealBroken, named(items[i].Binding), items[i].Binding.Org, r.Error)
		}
	}
	return results, err
}

// named identifies the sealed value for an operator.
func named(b orgkey.Binding) string { return cmp.Or(b.ID, b.Purpose) }

// notSealing is the error of a call to the sealing key. It counts as unavailable also
// while the key, its mount or the policy is missing.
func notSealing(err error) error {
	if errors.Is(err, orgkey.ErrUnavailable) {
		return err
	}
	return fmt.Errorf("%w: %w", orgkey.ErrUnavailable, err)
}

func clearAll(results []sealResult) {
	for _, r := range results {
		clear(r.Plaintext)
	}
}
