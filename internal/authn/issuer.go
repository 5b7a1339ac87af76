package authn

import (
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strings"

	"github.com/orgkeys/orgkeys/internal/org"
)

// Issuer is one issuer of tokens, and what is believed of them.
type Issuer struct {
	Name      string   // iss must be exactly this
	Audiences []string // aud must be or contain exactly one of these
	Keys      *KeySet
	Mapping   Mapping

	// Organizations that the issuer may speak for. nil: any.
	Organizations []org.ID

	// SubjectPrefix goes before the subject of every caller, so that two issuers'
	// subjects are never taken for one another: lower-case letters, digits and -,
	// then a colon; or nothing, for one issuer.
	SubjectPrefix string

	described IssuerConfig // by what it was opened
}

var subjectPrefix = regexp.MustCompile(`\A([a-z0-9][a-z0-9-]{0,31}:)?\z`)

func checkIssuers(issuers []Issuer) error {
	if len(issuers) == 0 {
		return errors.New("there is no token issuer")
	}
	for n, i := range issuers {
		if err := i.check(); err != nil {
			return err
		}
		for _, other := range issuers[:n] {
			if i.Name == other.Name {
				return fmt.Errorf("issuer %s is given twice: put its audiences into one entry; claims.rego can tell them apart", i.Name)
			}
			if i.SubjectPrefix == other.SubjectPrefix {
				return fmt.Errorf("issuers %s and %s have the same subject prefix %q: two people with the same subject would count as one", other.Name, i.Name, i.SubjectPrefix)
			}
		}
	}
	return nil
}

func (i Issuer) check() error {
	if i.Name == "" {
		return errors.New("the token issuer is empty")
	}
	if len(i.Audiences) == 0 || slices.Contains(i.Audiences, "") {
		return errors.New("the token audience is empty")
	}
	if i.Keys == nil {
		return errors.New("there is no key set for the token issuer")
	}
	if !subjectPrefix.MatchString(i.SubjectPrefix) {
		return fmt.Errorf("the subject prefix %q is not 1 to 32 lower-case letters, digits and -, followed by a colon", i.SubjectPrefix)
	}
	return i.Mapping.check()
}

// maySpeakFor reports whether an organization that the issuer names is believed.
func (i *Issuer) maySpeakFor(id org.ID) bool {
	return i.Organizations == nil || slices.Contains(i.Organizations, id)
}

// named returns a subject of the issuer's as it is called here.
func (x *examination) named(subject string) (string, bool) {
	i := x.issuer
	if i.SubjectPrefix == "" && slices.ContainsFunc(x.issuers, func(o Issuer) bool {
		return o.SubjectPrefix != "" && strings.HasPrefix(subject, o.SubjectPrefix)
	}) {
		return "", false // it would pass for another issuer's
	}
	subject = i.SubjectPrefix + subject
	return subject, isPlain(subject)
}
