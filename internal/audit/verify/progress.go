package verify

import "time"

// Progress is told now and then how many of all events are done.
type Progress func(done, all int64)

const progressInterval = 2 * time.Second

// Ticking returns a function that calls p at most once an interval.
func (p Progress) Ticking() func(done, all int64) {
	last := time.Now()
	return func(done, all int64) {
		if p != nil && time.Since(last) >= progressInterval {
			last = time.Now()
			p(done, all)
		}
	}
}
