package sqlstore

import (
	"context"
	"database/sql"
	"strconv"
	"strings"

	"github.com/orgkeys/orgkeys/internal/audit"
	"github.com/orgkeys/orgkeys/internal/systemevent"
)

var _ systemevent.Store = (*DB)(nil)

// changes is the condition of the index events_changes, word for word: with it
// in a statement SQLite knows that the index suffices.
const changes = `type IN ('orgkey.created', 'orgkey.delivered', 'orgkey.withdrawn', 'orgkey.deleted', 'node.registered', 'node.unregistered', 'node.deleted')`

// SystemEvents implements systemevent.Store. One statement, so that page and
// total are of the same moment; it reads beyond the index only the events that
// it returns.
func (d *DB) SystemEvents(ctx context.Context, f systemevent.Filter) ([]systemevent.Stored, int, error) {
	var total int
	var found []systemevent.Stored
	statement, args := systemEvents(f)
	err := each(ctx, d.read, func(scan func(...any) error) error {
		var s systemevent.Stored
		var seq sql.NullInt64
		if err := scan(&total, &seq, &s.Unread, &s.Leaf, &s.Personal); err != nil {
			return err
		}
		if seq.Valid {
			s.Number = seq.Int64
			found = append(found, s)
		}
		return nil
	}, statement, args...)
	return found, total, err
}

// systemEvents returns the statement for f. It has a row, with nothing but the
// total, also if the page is empty.
func systemEvents(f systemevent.Filter) (string, []any) {
	var c conditions
	c.add("org_id = ?", f.Org)
	c.add("occurred_at >= ?", f.From.UnixMicro())
	if !f.Before.IsZero() {
		c.add("occurred_at < ?", f.Before.UnixMicro())
	}
	c.terms = append(c.terms, changes, notRefused, c.anyKind(f.Kinds))
	if f.Object != "" {
		c.add("object = ?", f.Object)
	}
	if f.Actor != "" {
		c.add("actor = ?", f.Actor)
	}
	if f.Person != "" {
		c.add("actor_kind = 'user' AND actor = ?", f.Person)
	}
	marked := "EXISTS (SELECT 1 FROM event_reads r WHERE r.org_id = " + c.arg(f.Org) + " AND r.reader = " + c.arg(f.Reader) + " AND r.seq = "
	if f.Unread {
		c.terms = append(c.terms, "NOT "+marked+"events.seq)")
	}
	matching := "FROM events WHERE " + strings.Join(c.terms, " AND ")
	page := "SELECT occurred_at, seq " + matching + " ORDER BY occurred_at DESC, seq DESC LIMIT " + c.arg(f.Take) + " OFFSET " + c.arg(f.Skip)
	return `SELECT n.total, page.seq, NOT ` + marked + `page.seq), e.leaf, p.personal
		FROM (SELECT count(*) AS total FROM (SELECT 1 ` + matching + ` LIMIT ` + c.arg(f.Count) + `) counted) n
		LEFT JOIN (` + page + `) page ON TRUE
		LEFT JOIN events e ON e.seq = page.seq
		LEFT JOIN event_persons p ON p.event_id = e.id
		ORDER BY page.occurred_at DESC, page.seq DESC`, c.args
}

// MarkSystemEvents implements systemevent.Store.
func (d *DB) MarkSystemEvents(ctx context.Context, m systemevent.Marks, kinds []systemevent.Kind, event func(int64) audit.Event) error {
	return d.write(ctx, func(ctx context.Context, tx *txn) error {
		var changed int64
		if len(m.Numbers) > 0 {
			numbers, err := list(m.Numbers)
			if err != nil {
				return err
			}
			statement, args := d.unmark(m, numbers)
			if m.Read {
				statement, args = d.markRead(m, numbers, kinds)
			}
			if changed, err = exec(ctx, tx, statement, args...); err != nil {
				return err
			}
		}
		return d.record(ctx, tx, event(changed))
	})
}

// markRead marks those of m's events that the reader may see.
func (d *DB) markRead(m systemevent.Marks, numbers string, kinds []systemevent.Kind) (string, []any) {
	var c conditions
	c.add("org_id = ?", m.Org)
	into := "INSERT INTO event_reads (org_id, reader, seq) SELECT org_id, CAST(" + c.arg(m.Reader) + " AS TEXT), seq FROM events WHERE "
	c.terms = append(c.terms, changes, notRefused, c.anyKind(kinds), "seq IN "+d.integers(c.arg(numbers)))
	if m.Person != "" {
		c.add("actor_kind = 'user' AND actor = ?", m.Person)
	}
	return into + strings.Join(c.terms, " AND ") + " ON CONFLICT DO NOTHING", c.args
}

func (d *DB) unmark(m systemevent.Marks, numbers string) (string, []any) {
	var c conditions
	c.add("org_id = ?", m.Org)
	c.add("reader = ?", m.Reader)
	c.terms = append(c.terms, "seq IN "+d.integers(c.arg(numbers)))
	return "DELETE FROM event_reads WHERE " + strings.Join(c.terms, " AND "), c.args
}

// conditions collects the terms of a WHERE clause and their parameters.
type conditions struct {
	terms []string
	args  []any
}

// add adds a term; its ? stands for value.
func (c *conditions) add(term string, value any) {
	c.terms = append(c.terms, strings.Replace(term, "?", c.arg(value), 1))
}

// arg adds a parameter and returns its name.
func (c *conditions) arg(value any) string {
	c.args = append(c.args, value)
	return "$" + strconv.Itoa(len(c.args))
}

func (c *conditions) anyKind(kinds []systemevent.Kind) string {
	terms := []string{"FALSE"}
	for _, k := range kinds {
		term := "type = " + c.arg(string(k.Type))
		if k.Reason != "" {
			term += " AND reason = " + c.arg(k.Reason)
		}
		terms = append(terms, term)
	}
	return "(" + strings.Join(terms, " OR ") + ")"
}
