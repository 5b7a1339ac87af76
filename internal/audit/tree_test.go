package audit_test

import (
	"encoding/base64"
	"testing"

	"golang.org/x/mod/sumdb/tlog"

	"github.com/orgkeys/orgkeys/internal/audit"
)

func TestCheckpointTextRoundTrips(t *testing.T) {
	c := audit.Checkpoint{Origin: "orgkeys/x", Size: 7, Root: tlog.RecordHash([]byte("x"))}
	if want := "orgkeys/x\n7\n" + base64.StdEncoding.EncodeToString(c.Root[:]) + "\n"; c.Text() != want {
		t.Errorf("text %q, want %q", c.Text(), want)
	}
	if back, err := audit.ParseCheckpoint(c.Text()); err != nil || back != c {
		t.Errorf("read back %+v, %v", back, err)
	}
	for _, bad := range []string{"", "o\n1\nAA==\n", "o\n-1\n" + c.Root.String() + "\n", "o\n01\n" + c.Root.String() + "\n", "\n1\n" + c.Root.String() + "\n"} {
		if _, err := audit.ParseCheckpoint(bad); err == nil {
			t.Errorf("%q was accepted", bad)
		}
	}
}
