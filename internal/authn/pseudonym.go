package authn

import (
	"cmp"
	"context"
	"fmt"
	"regexp"
	"strings"
	"time"

	"github.com/hashicorp/golang-lru/v2/expirable"

	"github.com/orgkeys/orgkeys/internal/authz"
	"github.com/orgkeys/orgkeys/internal/config"
)

// Pseudonyms gives persons IDs that say nothing about them, and that can be
// forgotten. Its implementation is sqlstore.DB.
type Pseudonyms interface {
	// Pseudonym returns the ID of subject, the same each time, on every replica, until
	// it is erased.
	Pseudonym(ctx context.Context, subject string) (string, error)
}

// How many pseudonyms are remembered, and for how long: after an erasure, the
// former pseudonym may be in use that long.
const (
	rememberedPseudonyms = 10_000
	pseudonymLife        = time.Minute
)

// persons replaces subjects that are personal by pseudonyms, since a subject
// stays in the audit log for ever.
type persons struct {
	which string // config.PseudonymAddresses, …
	store Pseudonyms
	known *expirable.LRU[string, string]
}

// UsePseudonyms makes the verifier's callers appear under pseudonyms: all of them, or
// those whose subject is an address, as config.PseudonymAlways or PseudonymAddresses
// says. It comes before the verifier is used.
func (v *Verifier) UsePseudonyms(which string, store Pseudonyms) {
	v.persons = &persons{which, store, expirable.NewLRU[string, string](rememberedPseudonyms, nil, pseudonymLife)}
}

// hide puts pseudonyms in the place of the caller's subject and of who acts for
// it. The subject itself becomes the caller's address or name, if the token has no other:
// those are kept where they can be erased.
func (p *persons) hide(ctx context.Context, c *authz.Caller) error {
	if p == nil {
		return nil
	}
	subject := c.Subject
	for _, id := range []*string{&c.Subject, &c.ActedBy} {
		if *id == "" || !IsPersonal(p.which, *id) {
			continue
		}
		pseudonym, err := p.pseudonym(ctx, *id)
		if err != nil {
			return fmt.Errorf("looking up a person's pseudonym: %w", err)
		}
		*id = pseudonym
	}
	switch {
	case subject == c.Subject:
	case strings.Contains(subject, "@"):
		c.Email = cmp.Or(c.Email, subject)
	default:
		c.Name = cmp.Or(c.Name, subject)
	}
	return nil
}

func (p *persons) pseudonym(ctx context.Context, subject string) (string, error) {
	if known, ok := p.known.Get(subject); ok {
		return known, nil
	}
	pseudonym, err := p.store.Pseudonym(ctx, subject)
	if err == nil {
		p.known.Add(subject, pseudonym)
	}
	return pseudonym, err
}

// address is a mail address, alone or at the end of something, or a telephone
// number in international form, alone or behind a scheme, the issuer's subject prefix or
// a provider's own (sms|+49…). IDs of repositories and the like may hold an @, but go on after it.
var address = regexp.MustCompile(`(?i)(@|%40)[^@/:]+$|(^|[:|])(\+|%2b)[0-9]`)

// IsPersonal reports whether the setting which has subject replaced by a pseudonym.
func IsPersonal(which, subject string) bool {
	switch which {
	case config.PseudonymAlways:
		return true
	case config.PseudonymNever:
		return false
	}
	return address.MatchString(subject)
}
