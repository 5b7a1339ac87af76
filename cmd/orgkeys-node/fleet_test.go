package main

import (
	"bytes"
	"flag"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
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
	filesFor(t, *fleet)
	s := harness.Start(t)
	// Nodes have disks of their own. Here they would all share the server's, and
	// wait for each other's fsync.
	dir, err := os.MkdirTemp("/dev/shm", "orgkeys-fleet-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	org := harness.Org()
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
	atRest, served := resident(t, s.PID()), make(chan struct{})
	most := make(chan int64)
	go func() { most <- mostResident(t, s.PID(), served) }()
	begun := time.Now()
	close(start)
	all.Wait()
	elapsed := time.Since(begun)
	close(served)
	memory := <-most

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
	t.Logf("%d nodes in %s, %.0f a second; a boot took %s at the median, %s at most; the server had %d MiB resident before and %d MiB at most",
		*fleet, elapsed.Round(time.Millisecond), float64(*fleet)/elapsed.Seconds(), took[len(took)/2].Round(time.Millisecond), took[len(took)-1].Round(time.Millisecond), atRest>>10, memory>>10)
}

// filesFor checks that so many nodes can have open what they need, all in this
// process: a directory, a lock and a connection each, and a file for a moment.
func filesFor(t *testing.T, nodes int) {
	var limit syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &limit); err != nil {
		t.Fatal(err)
	}
	if need := uint64(3*nodes + 1000); limit.Cur < need {
		t.Fatalf("%d nodes need %d open files, and %d are allowed (ulimit -n)", nodes, need, limit.Cur)
	}
}

// mostResident is the most that a process has resident until done, in KiB.
func mostResident(t *testing.T, pid int, done <-chan struct{}) (most int64) {
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for {
		most = max(most, resident(t, pid))
		select {
		case <-done:
			return most
		case <-tick.C:
		}
	}
}

// resident is a process's resident memory in KiB.
func resident(t *testing.T, pid int) int64 {
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		t.Error(err)
		return 0
	}
	_, rest, _ := strings.Cut(string(status), "VmRSS:")
	kib, err := strconv.ParseInt(strings.Fields(rest)[0], 10, 64)
	if err != nil {
		t.Error(err)
	}
	return kib
}

func fleetAddress(i int) string { return fmt.Sprintf("10.1.%d.%d", i>>8, i&255) }
