package api

import (
	"testing"
	"time"

	"github.com/orgkeys/orgkeys/internal/enroll"
)

// What an enrollment's state says of its uses: received only if each brought a key.
func TestTheStateOfAnEnrollment(t *testing.T) {
	revoked := time.Unix(1, 0)
	for want, all := range map[string][]enroll.Enrollment{
		"open":     {{Uses: 1}, {Uses: 2, Claimed: 1, Lost: 1}},
		"waiting":  {{Uses: 2, Claimed: 2, Waiting: 1, Lost: 1}, {Uses: 1, Claimed: 1, Waiting: 1, Over: true}},
		"sealed":   {{Uses: 2, Claimed: 2, Unreceived: 1, Lost: 1}},
		"received": {{Uses: 1, Claimed: 1}, {Uses: 1, Claimed: 1, Over: true}},
		"expired":  {{Uses: 1, Over: true}, {Uses: 1, Claimed: 1, Lost: 1}, {Uses: 2, Claimed: 2, Lost: 1, Over: true}},
		"revoked":  {{Uses: 1, Revoked: revoked}, {Uses: 1, Claimed: 1, Lost: 1, Revoked: revoked}},
	} {
		for _, e := range all {
			if got := enrollmentState(e); got != want {
				t.Errorf("%+v is %s, want %s", e, got, want)
			}
		}
	}
}
