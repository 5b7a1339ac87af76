package server

import (
	"testing"

	"github.com/orgkeys/orgkeys/internal/sqlstore"
)

// Machines from one image have one host name, and their data directories one path.
func TestReplicasOfOneImageHaveNamesOfTheirOwn(t *testing.T) {
	holder := func(path string) string {
		t.Helper()
		dir, err := OpenDataDir(path)
		if err != nil {
			t.Fatal(err)
		}
		defer dir.Close()
		own, err := dir.own()
		if err != nil {
			t.Fatal(err)
		}
		name, err := sqlstore.Holder("/var/lib/orgkeys", own)
		if err != nil {
			t.Fatal(err)
		}
		return name
	}
	one, other := t.TempDir(), t.TempDir()
	first := holder(one)
	if holder(one) != first {
		t.Error("a replica has another name after a restart")
	}
	if holder(other) == first {
		t.Error("two replicas have one name")
	}
}
