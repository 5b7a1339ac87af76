// Package org is the identity of organizations.
package org

import (
	"errors"
	"regexp"
)

// ID names an organization. IDs are compared byte for byte. One that came from
// outside was made by Parse, once, at the edge, before it reached any header,
// log or label. The zero ID is no organization.
type ID string

// ErrForm: the text is not an organization ID.
var ErrForm = errors.New("organization ID is not well-formed: a letter or digit, then up to 127 letters, digits, _ or -")

var form = regexp.MustCompile(`\A[A-Za-z0-9][A-Za-z0-9_-]{0,127}\z`)

// Parse returns the ID that text is, or ErrForm.
func Parse(text string) (ID, error) {
	if !form.MatchString(text) {
		return "", ErrForm
	}
	return ID(text), nil
}

// String returns the ID as text. What takes a fmt.Stringer and no other type of
// kind string, as pgx does where it is told nothing of a statement, needs it.
func (id ID) String() string { return string(id) }
