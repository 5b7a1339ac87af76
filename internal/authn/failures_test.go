package authn

import (
	"maps"
	"sync"
	"testing"
)

func TestFailuresAreCountedByReasonUntilFlushed(t *testing.T) {
	var f Failures
	if counts := f.Flush(); len(counts) != 0 {
		t.Errorf("none counted, flushed %v", counts)
	}
	var group sync.WaitGroup
	for range 100 {
		group.Go(func() {
			f.Count(ReasonExpired)
			f.Count(ReasonTooMany)
		})
	}
	group.Wait()
	if counts, want := f.Flush(), map[string]int64{ReasonExpired: 100, ReasonTooMany: 100}; !maps.Equal(counts, want) {
		t.Errorf("flushed %v, want %v", counts, want)
	}
	if counts := f.Flush(); len(counts) != 0 {
		t.Errorf("flushed again: %v", counts)
	}
}

func TestReasonsAreAClosedSet(t *testing.T) {
	var f Failures
	for _, reason := range []string{"", "Expired", "expired ", "eyJhbGciOi", "\n"} {
		f.Count(reason)
	}
	if counts, want := f.Flush(), map[string]int64{ReasonOther: 5}; !maps.Equal(counts, want) {
		t.Errorf("flushed %v, want %v", counts, want)
	}
}
