package sqlstore

import (
	"context"
	"database/sql"
	"fmt"
	"slices"

	"github.com/google/uuid"

	"github.com/orgkeys/orgkeys/internal/audit"
)

// Pseudonym implements authn.Pseudonyms.
func (d *DB) Pseudonym(ctx context.Context, subject string) (string, error) {
	pseudonym, err := pseudonymOf(ctx, d.read, subject)
	if err != nil || pseudonym != "" {
		return pseudonym, err
	}
	return outcome(ctx, d, func(ctx context.Context, tx *txn) (string, error) {
		_, err := exec(ctx, tx, "INSERT INTO persons (subject, pseudonym) VALUES ($1, $2) ON CONFLICT (subject) DO NOTHING", subject, "person-"+uuid.NewString())
		if err != nil {
			return "", err
		}
		return pseudonymOf(ctx, tx, subject)
	})
}

// pseudonymOf returns the pseudonym of subject; empty if it has none.
func pseudonymOf(ctx context.Context, q querier, subject string) (string, error) {
	found, err := query(ctx, q, scanText, "SELECT pseudonym FROM persons WHERE subject = $1", subject)
	if err != nil || len(found) == 0 {
		return "", err
	}
	return found[0], nil
}

// knownAs is what events may call a person.
type knownAs struct{ pseudonyms, subjects []string }

func (k knownAs) all() []string { return slices.Concat(k.pseudonyms, k.subjects) }

// known looks for a person by the subject, or by the pseudonym that events show.
func known(ctx context.Context, q querier, id string) (k knownAs, err error) {
	err = each(ctx, q, func(scan func(...any) error) error {
		var subject, pseudonym string
		err := scan(&subject, &pseudonym)
		k.subjects, k.pseudonyms = append(k.subjects, subject), append(k.pseudonyms, pseudonym)
		return err
	}, "SELECT subject, pseudonym FROM persons WHERE subject = $1 OR pseudonym = $1", id)
	if !slices.Contains(k.all(), id) {
		k.subjects = append(k.subjects, id)
	}
	return k, err
}

// Erasable returns how many events have a personal part that Erase would delete.
func (d *DB) Erasable(ctx context.Context, id string) (int, error) {
	var n int
	err := d.readWithin(ctx, eraseTimeout, func(ctx context.Context, tx *sql.Tx) (err error) {
		n, err = d.erasable(ctx, tx, id)
		return err
	})
	if err != nil {
		return 0, fmt.Errorf("counting what is known of a person: %w", err)
	}
	return n, nil
}

func (d *DB) erasable(ctx context.Context, tx *sql.Tx, id string) (n int, err error) {
	person, err := known(ctx, tx, id)
	if err != nil {
		return 0, err
	}
	ids, err := list(person.all())
	if err != nil {
		return 0, err
	}
	err = tx.QueryRowContext(ctx, `SELECT count(*) FROM event_persons WHERE event_id IN
		(SELECT id FROM events WHERE actor IN `+d.texts("$1")+`) OR actor <> '' AND actor IN `+d.texts("$1"), ids).Scan(&n)
	if err != nil {
		return 0, unavailable(err)
	}
	err = eachArchived(ctx, tx, func(_ int64, content []byte) error {
		actors, _, err := unpackPersons(content)
		for _, actor := range actors {
			if len(actor) > 0 && slices.Contains(person.all(), string(actor)) {
				n++
			}
		}
		return err
	})
	return n, err
}

// Erase deletes a person's data: the personal part of the events whose actor is id, or the
// subject or the pseudonym of the same person, which events that person has
// marked as read, and that pseudonym. It returns
// how many events had one. event says so in the log, of each ID that events
// have of the person, and goes with it in one transaction; of a subject that has a
// pseudonym and is in no event itself, the log is told the pseudonym alone.
func (d *DB) Erase(ctx context.Context, id string, event func(id string, count int64) audit.Event) (total int64, err error) {
	where, err := d.archivedOf(ctx, id)
	if err != nil {
		return 0, fmt.Errorf("looking for what is known of a person: %w", err)
	}
	err = d.writeWithin(ctx, eraseTimeout, func(ctx context.Context, tx *txn) error {
		total = 0 // of an attempt that was aborted
		// Nothing finds events by their actor but reading all of them.
		if err := d.limitStatements(ctx, tx.Tx, eraseTimeout); err != nil {
			return err
		}
		// What moves events, or erases somebody else, reads what it writes back.
		if err := d.lock(ctx, tx, "archive"); err != nil {
			return err
		}
		person, err := known(ctx, tx, id)
		if err != nil {
			return err
		}
		archived, err := d.eraseArchived(ctx, tx, where, person.all()...)
		if err != nil {
			return err
		}
		if _, err := exec(ctx, tx, "DELETE FROM persons WHERE subject = $1 OR pseudonym = $1", id); err != nil {
			return err
		}
		for _, id := range person.all() {
			n, err := exec(ctx, tx, "DELETE FROM event_persons WHERE event_id IN (SELECT id FROM events WHERE actor = $1)", id)
			if err != nil {
				return err
			}
			n += archived[id]
			if _, err := exec(ctx, tx, "DELETE FROM event_reads WHERE reader = $1", id); err != nil {
				return err
			}
			total += n
			if n == 0 && len(person.pseudonyms) > 0 && !slices.Contains(person.pseudonyms, id) {
				continue
			}
			if err := d.record(ctx, tx, event(id, n)); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return 0, fmt.Errorf("erasing what is known of a person: %w", err)
	}
	return total, nil
}
