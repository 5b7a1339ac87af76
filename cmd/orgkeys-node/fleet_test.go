package main

import (
	"bytes"
	"flag"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/orgkeys/orgkeys/internal/e2e/harness"
)

var fleet = flag.Int("nodes", 200, "how many nodes boot at once")

// TestAFleetBootsAtOnce: every node of a fleet boots at the same moment, as
// after a power cut. Whatever the server turns away comes again by itself:
// each node ends with all its secrets and is listed, and the log has an event
// of each registration.
func TestAFleetBootsAtOnce(t *testing.T) {
	s := harness.Start(t)
	org, dir := harness.Org(), t.TempDir()
	keyFile := filepath.Join(dir, "key.pem")
	if err := os.WriteFile(keyFile, s.Generate(t, org).PEM, 0o600); err != nil {
		t.Fatal(err)
	}
	owner := s.Token(t, org, "OWNER")
	secrets := map[string]string{"env_s3": "S3_BUCKET=b\n", "env_gcs": "GCS_BUCKET=g\n"}
	for name, value := range secrets {
		s.Do(t, harness.Request{
			Method: "PUT", Path: "/organization/" + org + "/secret/" + name, Token: owner, Body: []byte(value),
			Header: http.Header{"Content-Type": {"application/octet-stream"}},
		}).Want(t, 200, "Secret stored successfully")
	}

	took, start := make([]time.Duration, *fleet), make(chan struct{})
	var all sync.WaitGroup
	for i := range *fleet {
		all.Go(func() {
			<-start
			begun := time.Now()
			var out, errs bytes.Buffer
			code := run(t.Context(), []string{"boot", "--server", s.API, "--org", org, "--ip", fleetAddress(i), "--region", "eu",
				"--key-file", keyFile, "--dir", filepath.Join(dir, fleetAddress(i)), "--wait", "5m"}, &out, &errs)
			if code != 0 {
				t.Errorf("node %d: exit code %d: %s", i, code, errs.Bytes())
			}
			took[i] = time.Since(begun)
		})
	}
	begun := time.Now()
	close(start)
	all.Wait()
	elapsed := time.Since(begun)

	for i := range *fleet {
		for name, value := range secrets {
			if got, err := os.ReadFile(filepath.Join(dir, fleetAddress(i), name)); err != nil || string(got) != value {
				t.Errorf("node %d: %s holds %q, %v", i, name, got, err)
			}
		}
	}
	listed := string(s.Do(t, harness.Request{Method: "GET", Path: "/organization/" + org + "/nodes", Token: owner}).Body)
	if want := fmt.Sprintf(`"total":%d`, *fleet); !strings.Contains(listed, want) {
		t.Errorf("the list of nodes does not say %s", want)
	}
	for i := range *fleet {
		if !strings.Contains(listed, `"ip":"`+fleetAddress(i)+`"`) {
			t.Errorf("node %d is not listed", i)
		}
	}
	if n := harness.Number(t, s.Database(t), `SELECT count(DISTINCT object) FROM events WHERE type = 'node.registered'`); n != int64(*fleet) {
		t.Errorf("%d nodes have an event of their registration, want %d", n, *fleet)
	}
	slices.Sort(took)
	t.Logf("%d nodes in %s, %.0f a second; a boot took %s at the median, %s at most",
		*fleet, elapsed.Round(time.Millisecond), float64(*fleet)/elapsed.Seconds(), took[len(took)/2].Round(time.Millisecond), took[len(took)-1].Round(time.Millisecond))
}

func fleetAddress(i int) string { return fmt.Sprintf("10.1.%d.%d", i>>8, i&255) }
