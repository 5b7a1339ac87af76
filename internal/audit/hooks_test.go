package audit

import "time"

// SetSinkDeadline shortens, for tests, how long one call to a sink may take.
func (l *Log) SetSinkDeadline(d time.Duration) { l.deadline = d }
