package verdict

import (
	"strings"
	"testing"
	"time"

	"github.com/orgkeys/orgkeys/internal/audit"
	"github.com/orgkeys/orgkeys/internal/audit/verify"
)

// judged is the exit code of what was judged, and all that was said.
func judged(out *strings.Builder, err error) (int, string) {
	if err != nil {
		out.WriteString(err.Error())
	}
	return Code(err), out.String()
}

// A copy that is behind by what is on its way is whole; one that is behind by more is not.
func TestHowFarACopyVouches(t *testing.T) {
	for _, c := range []struct {
		name    string
		covered int64
		age     time.Duration // of the first event behind them
		forged  int64
		code    int
		says    string
	}{
		{"all", 31, 0, 0, 0, "truncation excluded: the copy covers 31 of 31 events\n"},
		{"all but what is on its way", 29, time.Second, 0, 0, "the copy covers 29 of 31 events; the 2 newest"},
		{"all but what came since yesterday", 29, 24 * time.Hour, 0, 3, "the copy covers 29 of 31 events; the 2 newer events are not in it"},
		{"all, with rows that orgkeys did not record", 31, 0, 2, 3, "the 2 rows of the table events"},
		{"nothing", 0, time.Second, 0, 3, "holds no event of this log"},
	} {
		var out strings.Builder
		r := verify.Report{Log: audit.Checkpoint{Size: 31}, Covered: c.covered, Unauthenticated: c.forged}
		if c.covered < 31 {
			r.Uncovered = time.Now().Add(-c.age)
		}
		code, said := judged(&out, vouched(&out, r))
		if code != c.code || !strings.Contains(said, c.says) || (code == 3) != strings.Contains(said, "truncation not excluded") {
			t.Errorf("%s: exit code %d, said %q", c.name, code, said)
		}
	}
}
