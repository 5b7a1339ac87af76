package bench_test

import (
	"context"
	"crypto/rand"
	"crypto/rsa"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
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
	besidePlain(b, harness.Start(b, harness.Set("ORGKEYS_MAX", fmt.Sprint(mostKeys))))
}

// BenchmarkEnrollVault is BenchmarkEnrollSoftHSM on Vault.
func BenchmarkEnrollVault(b *testing.B) {
	_, s := withVault(b, harness.Set("ORGKEYS_MAX", fmt.Sprint(mostKeys)))
	besidePlain(b, s)
}

// besidePlain also reports the processor time that each takes, of the program,
// the back end and the client: on a machine that has other work as well it says
// more than the rates.
func besidePlain(b *testing.B, s *harness.Server) {
	plain, enrolled := generator(b, s), enroller(b, s)
	var cost [2]time.Duration
	round := max(1, b.N/10)
	var took [2]time.Duration
	b.ResetTimer()
	for from := 0; from < b.N; from += round {
		for i, do := range []func() error{plain, enrolled} {
			before := processorTime(b)
			took[i] += phase(b, 2, from, min(from+round, b.N), func(int) error { return do() })
			cost[i] += processorTime(b) - before
		}
	}
	for i, name := range []string{"plain", "enrolled"} {
		b.ReportMetric(float64(b.N)/took[i].Seconds(), name+"/s")
		b.ReportMetric(float64(cost[i].Microseconds())/1000/float64(b.N), name+"-cpu-ms")
	}
	b.ReportMetric(100*took[0].Seconds()/took[1].Seconds(), "%")
	b.ReportMetric(100*cost[0].Seconds()/cost[1].Seconds(), "cpu-%")
}

// processorTime is what this process and its children have used.
func processorTime(b *testing.B) (sum time.Duration) {
	children, err := filepath.Glob("/proc/self/task/*/children")
	if err != nil {
		b.Fatal(err)
	}
	pids := []string{"self"}
	for _, name := range children {
		text, err := os.ReadFile(name)
		if err != nil {
			continue // a thread that has ended
		}
		pids = append(pids, strings.Fields(string(text))...)
	}
	for _, pid := range pids {
		sum += processorTimeOf(b, pid)
	}
	return sum
}

// processorTimeOf is what a process has used itself.
func processorTimeOf(b *testing.B, pid string) (sum time.Duration) {
	text, err := os.ReadFile("/proc/" + pid + "/stat")
	if err != nil {
		b.Fatal(err)
	}
	// Behind the name, which may hold anything: fields 3 and on.
	_, rest, _ := strings.Cut(string(text), ") ")
	fields := strings.Fields(rest)
	for _, ticks := range fields[11:13] { // utime and stime, in hundredths of a second
		n, err := strconv.Atoi(ticks)
		if err != nil {
			b.Fatal(err)
		}
		sum += time.Duration(n) * 10 * time.Millisecond
	}
	return sum
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
