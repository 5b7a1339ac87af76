package bench_test

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/rsa"
	"fmt"
	"maps"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/go-json-experiment/json"

	"github.com/orgkeys/orgkeys/client"
	"github.com/orgkeys/orgkeys/internal/e2e/harness"
	"github.com/orgkeys/orgkeys/internal/vault/vaulttest"
)

// mostNodeKeys is how many node keys an organization has by default.
const mostNodeKeys = 1000

// BenchmarkEnrollSoftHSM: enrollments a second through the running program, from
// the request to the receipt, beside plain generation on the same, in turns.
// Tokens and recipient keys are made before.
func BenchmarkEnrollSoftHSM(b *testing.B) {
	besidePlain(b, harness.Start(b, harness.Set("ORGKEYS_MAX", fmt.Sprint(mostKeys))), func() map[string]int { return nil })
}

// BenchmarkEnrollVault is BenchmarkEnrollSoftHSM on Vault. It also reports how many
// calls to Vault a key of each kind takes, by Vault's audit file, and lists them.
func BenchmarkEnrollVault(b *testing.B) {
	v, s := withVault(b, harness.Set("ORGKEYS_MAX", fmt.Sprint(mostKeys)))
	besidePlain(b, s, func() map[string]int { return vaultCalls(b, v) })
}

var keyName = regexp.MustCompile(`[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}`)

// vaultCalls are the calls that Vault has answered, by operation and path.
func vaultCalls(b *testing.B, v *vaulttest.Server) map[string]int {
	text, err := os.ReadFile(v.AuditFile)
	if err != nil {
		b.Fatal(err)
	}
	calls := map[string]int{}
	for line := range bytes.Lines(text) {
		var e struct {
			Type    string `json:"type"`
			Request struct {
				Operation string `json:"operation"`
				Path      string `json:"path"`
			} `json:"request"`
		}
		if err := json.Unmarshal(line, &e); err != nil {
			b.Fatalf("Vault's audit file: %v: %.200q", err, line)
		}
		if e.Type == "response" {
			calls[e.Request.Operation+" "+keyName.ReplaceAllString(e.Request.Path, "KEY")]++
		}
	}
	return calls
}

// besidePlain also reports the processor time that each takes, of the program,
// the back end and the client: on a machine that has other work as well it says
// more than the rates.
func besidePlain(b *testing.B, s *harness.Server, calls func() map[string]int) {
	plain, enrolled := generator(b, s), enroller(b, s)
	var cost [2]byProcess
	made := [2]map[string]int{{}, {}}
	round := max(1, b.N/10)
	var took [2]time.Duration
	b.ResetTimer()
	for from := 0; from < b.N; from += round {
		for i, do := range []func() error{plain, enrolled} {
			asked, before := calls(), processorTime(b, s)
			took[i] += phase(b, 2, from, min(from+round, b.N), func(int) error { return do() })
			cost[i] = cost[i].plus(processorTime(b, s).minus(before))
			for name, n := range calls() {
				made[i][name] += n - asked[name]
			}
		}
	}
	for i, name := range []string{"plain", "enrolled"} {
		b.ReportMetric(float64(b.N)/took[i].Seconds(), name+"/s")
		each := func(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 / float64(b.N) }
		b.ReportMetric(each(cost[i].all()), name+"-cpu-ms")
		b.ReportMetric(each(cost[i].client), name+"-client-cpu-ms")
		b.ReportMetric(each(cost[i].program), name+"-program-cpu-ms")
		all := 0
		var listed []string
		for _, call := range slices.Sorted(maps.Keys(made[i])) {
			if n := made[i][call]; n > 0 {
				all += n
				listed = append(listed, fmt.Sprintf("%.2f %s", float64(n)/float64(b.N), call))
			}
		}
		if b.N > 1 { // a benchmark's output is cut after ten lines
			b.Logf("%s: %s", name, strings.Join(listed, "; "))
		}
		if all > 0 {
			b.ReportMetric(float64(all)/float64(b.N), name+"-vault-calls")
		}
	}
	b.ReportMetric(100*took[0].Seconds()/took[1].Seconds(), "%")
	b.ReportMetric(100*cost[0].all().Seconds()/cost[1].all().Seconds(), "cpu-%")
}

// byProcess is processor time by who used it.
type byProcess struct{ client, program, others time.Duration }

func (a byProcess) all() time.Duration { return a.client + a.program + a.others }

func (a byProcess) plus(b byProcess) byProcess {
	return byProcess{a.client + b.client, a.program + b.program, a.others + b.others}
}

func (a byProcess) minus(b byProcess) byProcess {
	return byProcess{a.client - b.client, a.program - b.program, a.others - b.others}
}

// processorTime is what this process, the program and this process's other children have used.
func processorTime(b *testing.B, s *harness.Server) (sum byProcess) {
	children, err := filepath.Glob("/proc/self/task/*/children")
	if err != nil {
		b.Fatal(err)
	}
	sum.client = processorTimeOf(b, "self")
	for _, name := range children {
		text, err := os.ReadFile(name)
		if err != nil {
			continue // a thread that has ended
		}
		for _, pid := range strings.Fields(string(text)) {
			if pid == strconv.Itoa(s.PID()) {
				sum.program += processorTimeOf(b, pid)
			} else {
				sum.others += processorTimeOf(b, pid)
			}
		}
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
