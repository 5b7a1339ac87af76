// Package jsonbody reads the JSON bodies of requests by one set of rules: names
// are case-sensitive, unknown fields are ignored (or refused, DecodeStrict), and duplicate names,
// trailing data, invalid UTF-8, wrong types, overlong texts and characters that
// make a text look like another one are refused.
package jsonbody

import (
	"bytes"
	"errors"
	"strings"
	"time"
	"unicode"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"
)

const maxText = 256 // bytes of a text

// Error says what is wrong with a body, in words for its sender. It repeats
// nothing that the body contained.
type Error struct {
	Field   string // empty if it is about the body as a whole
	Problem string
}

func (e *Error) Error() string {
	if e.Field == "" {
		return e.Problem
	}
	return e.Field + " " + e.Problem
}

const wrongType = "is of the wrong type"

var notObject = &Error{"", "the body is not one JSON object in UTF-8"}

// Decode reads a body into a struct. What it refuses is an *Error.
func Decode(body []byte, into any) error { return decode(body, into) }

// DecodeStrict refuses unknown fields too. It is for bodies that grant
// something: a misspelt restriction must not be taken for none.
func DecodeStrict(body []byte, into any) error {
	return decode(body, into, json.RejectUnknownMembers(true))
}

func decode(body []byte, into any, options ...json.Options) error {
	// A null would decode into any struct without an error.
	if !bytes.HasPrefix(bytes.TrimLeft(body, " \t\r\n"), []byte("{")) {
		return notObject
	}
	err := json.Unmarshal(body, into, options...)
	if err == nil {
		return nil
	}
	if errors.Is(err, json.ErrUnknownName) {
		return &Error{"", "the body has a field that is not known"}
	}
	if wrong, ok := errors.AsType[*json.SemanticError](err); ok && wrong.JSONPointer != "" {
		return &Error{strings.TrimPrefix(string(wrong.JSONPointer), "/"), wrongType}
	}
	if errors.Is(err, jsontext.ErrDuplicateName) {
		return &Error{"", "the body has a name twice"}
	}
	return notObject
}

// RequiredText is Text of a field that must be there and not be empty.
func RequiredText(field string, s *string) (string, error) {
	if s == nil || *s == "" {
		return "", &Error{field, "is required"}
	}
	return Text(field, s)
}

// Text checks a text, which is empty if it was not sent.
func Text(field string, s *string) (string, error) {
	if s == nil {
		return "", nil
	}
	if len(*s) > maxText {
		return "", &Error{field, "is longer than 256 bytes"}
	}
	if strings.ContainsFunc(*s, hidden) {
		return "", &Error{field, "has a control character in it"}
	}
	return *s, nil
}

// hidden is true of characters that make a text look like another one.
func hidden(c rune) bool {
	return unicode.IsControl(c) || unicode.Is(unicode.Bidi_Control, c)
}

// Timestamp reads a number or a string by ParseTimestamp. It returns the text
// as it was sent, which is empty if nothing or null was.
func Timestamp(field string, v jsontext.Value) (text string, t time.Time, err error) {
	switch v.Kind() {
	case 0, 'n':
		return "", time.Time{}, nil
	case '0':
		text = string(v)
	case '"':
		if err := json.Unmarshal(v, &text); err != nil {
			return "", time.Time{}, &Error{field, wrongType}
		}
	default:
		return "", time.Time{}, &Error{field, wrongType}
	}
	t, ok := ParseTimestamp(text)
	if !ok {
		return "", time.Time{}, &Error{field, "is none of: seconds since 1970 in 10 digits, milliseconds in 13, RFC 3339 with an offset"}
	}
	return text, t, nil
}
