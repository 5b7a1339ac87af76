package sqlstore

import "time"

// SystemEventsStatement is what SystemEvents asks the database.
var SystemEventsStatement = systemEvents

// LimitWrites sets how long SQLite's writer begins further changes of a batch.
// It must be called while nothing writes.
func (d *DB) LimitWrites(limit time.Duration) { d.writer.limit = limit }

// Waiting is how many changes wait for SQLite's writer.
func (d *DB) Waiting() int { return len(d.writer.queue) }
