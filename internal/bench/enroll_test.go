package bench_test

import (
	"context"
	"crypto/rand"
	"crypto/rsa"
	"fmt"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/go-json-experiment/json"

	"github.com/orgkeys/orgkeys/client"
	"github.com/orgkeys/orgkeys/internal/e2e/harness"
)

// mostNodeKeys is how many node keys an organization has by default.
const mostNodeKeys = 1000

// BenchmarkEnrollSoftHSM: enrollments a second through the running program, from
// the request to the receipt, beside plain generation on the same, in turns.
// Tokens and recipient keys are made before.
func BenchmarkEnrollSoftHSM(b *testing.B) {
	s := harness.Start(b, harness.Set("ORGKEYS_MAX", fmt.Sprint(mostKeys)))
	inTurns(b, 2, "plain", generator(b, s), "enrolled", enroller(b, s))
}

// BenchmarkEnrollVault is BenchmarkEnrollSoftHSM on Vault.
func BenchmarkEnrollVault(b *testing.B) {
	_, s := withVault(b, harness.Set("ORGKEYS_MAX", fmt.Sprint(mostKeys)))
	plain, enrolled := generator(b, s), enroller(b, s)
	inPhases(b, 2, "plain", func(int) error { return plain() }, "enrolled", func(int) error { return enrolled() })
}

// enroller returns a function by which a node fetches its key and signs for it.
func enroller(b *testing.B, s *harness.Server) func() error {
	c, err := client.New(client.Config{Server: s.API, Retry: client.Retry{For: time.Minute}})
	if err != nil {
		b.Fatal(err)
	}
	recipients := make([]*rsa.PrivateKey, 8)
	for i := range recipients {
		if recipients[i], err = rsa.GenerateKey(rand.Reader, 3072); err != nil {
			b.Fatal(err)
		}
	}
	enrollments := make([]*client.Enrollment, b.N)
	for i := range enrollments {
		org := fmt.Sprintf("fleet-%d", i/mostNodeKeys)
		if enrollments[i], err = client.NewEnrollment(c, mint(b, s, org), recipients[i%len(recipients)]); err != nil {
			b.Fatal(err)
		}
	}
	var next atomic.Int64
	return func() error {
		e := enrollments[next.Add(1)-1]
		key, err := e.Fetch(context.Background())
		if err != nil {
			return err
		}
		private, err := client.ParsePrivateKey(key.PEM)
		if err != nil {
			return err
		}
		return c.Receipt(context.Background(), key.Delivery, private)
	}
}

// mint returns a new enrollment's token.
func mint(b *testing.B, s *harness.Server, org string) []byte {
	req, err := http.NewRequest(http.MethodPost, s.API+"/organization/"+org+"/enrollment", strings.NewReader("{}"))
	if err != nil {
		b.Fatal(err)
	}
	req.Header.Set("Authorization", "Bearer "+s.Token(b, org, "OWNER"))
	resp, err := s.HTTP.Do(req)
	if err != nil {
		b.Fatal(err)
	}
	defer resp.Body.Close()
	var answer struct {
		Data struct {
			Token string `json:"token"`
		} `json:"data"`
	}
	if err := json.UnmarshalRead(resp.Body, &answer); err != nil || answer.Data.Token == "" {
		b.Fatalf("minting: status %d, %v", resp.StatusCode, err)
	}
	return []byte(answer.Data.Token)
}
