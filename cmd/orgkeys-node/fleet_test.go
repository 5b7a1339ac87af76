package main

import (
	"bytes"
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
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
		s.PutSecret(t, org, name, []byte(value))
	}

	var parts []*part
	for from := 0; from < *fleet; from += partSize {
		parts = append(parts, startPart(t, part{Server: s.API, Org: org, KeyFile: keyFile, Dir: dir, From: from, To: min(from+partSize, *fleet)}))
	}
	atRest, served := resident(t, s.PID()), make(chan struct{})
	most := make(chan int64)
	go func() { most <- mostResident(t, s.PID(), served) }()
	begun := time.Now()
	for _, p := range parts {
		p.start()
	}
	var took []time.Duration
	for _, p := range parts {
		took = append(took, p.wait(t)...)
	}
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

// partSize is how many nodes one process plays: each has a directory, a lock and
// a connection open, and a file for a moment, and a process may have 20,000.
const partSize = 4000

// part is some of the fleet, in a process of its own: this test program, which
// finds the part in FleetPart and boots it when its standard input ends.
type part struct {
	Server, Org, KeyFile, Dir string
	From, To                  int // nodes' numbers

	cmd   *exec.Cmd
	out   bytes.Buffer
	begin io.Closer
}

const FleetPart = "ORGKEYS_TEST_FLEET_PART"

// booted is how a node's boot ended.
type booted struct {
	Code int
	Says string
	Took time.Duration
}

func startPart(t *testing.T, p part) *part {
	t.Helper()
	var limit syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &limit); err != nil {
		t.Fatal(err)
	}
	if need := uint64(3*(p.To-p.From) + 1000); limit.Cur < need {
		t.Fatalf("%d nodes need %d open files, and %d are allowed (ulimit -n)", p.To-p.From, need, limit.Cur)
	}
	text, err := json.Marshal(p)
	if err != nil {
		t.Fatal(err)
	}
	p.cmd = exec.Command(os.Args[0])
	p.cmd.Env = append(os.Environ(), FleetPart+"="+string(text))
	p.cmd.Stdout, p.cmd.Stderr = &p.out, os.Stderr
	if p.begin, err = p.cmd.StdinPipe(); err == nil {
		err = p.cmd.Start()
	}
	if err != nil {
		t.Fatal(err)
	}
	return &p
}

func (p *part) start() { p.begin.Close() }

// wait returns how long each boot took, and fails the test for each that failed.
func (p *part) wait(t *testing.T) (took []time.Duration) {
	t.Helper()
	if err := p.cmd.Wait(); err != nil {
		t.Fatal(err)
	}
	var all []booted
	if err := json.Unmarshal(p.out.Bytes(), &all); err != nil {
		t.Fatal(err)
	}
	for i, b := range all {
		if b.Code != 0 {
			t.Errorf("node %d: exit code %d: %s", p.From+i, b.Code, b.Says)
		}
		took = append(took, b.Took)
	}
	return took
}

// BootPart is what a part's process does, with what FleetPart holds.
func BootPart(text string) error {
	var p part
	if err := json.Unmarshal([]byte(text), &p); err != nil {
		return err
	}
	if _, err := io.Copy(io.Discard, os.Stdin); err != nil {
		return err
	}
	all := make([]booted, p.To-p.From)
	var running sync.WaitGroup
	for i := range all {
		running.Go(func() {
			address, begun := fleetAddress(p.From+i), time.Now()
			var out, errs bytes.Buffer
			code := run(context.Background(), []string{"boot", "--server", p.Server, "--org", p.Org, "--ip", address, "--region", "eu",
				"--key-file", p.KeyFile, "--dir", filepath.Join(p.Dir, address), "--wait", "5m"}, &out, &errs)
			all[i] = booted{code, errs.String(), time.Since(begun)}
		})
	}
	running.Wait()
	return json.NewEncoder(os.Stdout).Encode(all)
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
