package jsonbody_test

import (
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/go-json-experiment/json/jsontext"

	"github.com/orgkeys/orgkeys/internal/jsonbody"
)

func TestWhatABodyMayBe(t *testing.T) {
	for body, want := range map[string]jsonbody.Error{
		`{}`:                              {},
		" \t\r\n{ } ":                     {},
		`{"unknown":[{"a":1}]}`:           {},
		`{"number":null}`:                 {},
		`{"NUMBER":"in capitals"}`:        {},
		``:                                {"", notObject},
		`null`:                            {"", notObject},
		`[]`:                              {"", notObject},
		`"{}"`:                            {"", notObject},
		`{} {}`:                           {"", notObject},
		`{"number":1}x`:                   {"", notObject},
		`{"number":1,}`:                   {"", notObject},
		`{"number":01}`:                   {"", notObject},
		`{"text":"` + "\xff" + `"}`:       {"", notObject},
		`{"text":"\ud800"}`:               {"", notObject},
		"\xef\xbb\xbf{}":                  {"", notObject},
		`{"number":1,"number":1}`:         {"", "the body has a name twice"},
		`{"x":{"y":1,"y":2}}`:             {"", "the body has a name twice"},
		`{"number":"1"}`:                  {"number", wrongType},
		`{"number":1.5}`:                  {"number", wrongType},
		`{"number":1e0}`:                  {"number", wrongType},
		`{"number":99999999999999999999}`: {"number", wrongType},
		`{"text":1}`:                      {"text", wrongType},
	} {
		var fields struct {
			Number *int64  `json:"number"`
			Text   *string `json:"text"`
		}
		wantError(t, body, jsonbody.Decode([]byte(body), &fields), want)
		if body == `{"unknown":[{"a":1}]}` || body == `{"NUMBER":"in capitals"}` || strings.HasPrefix(body, `{"x"`) {
			want = jsonbody.Error{Problem: "the body has a field that is not known"}
		}
		wantError(t, body, jsonbody.DecodeStrict([]byte(body), &fields), want)
	}
}

const (
	notObject = "the body is not one JSON object in UTF-8"
	wrongType = "is of the wrong type"
	stampForm = "is none of: seconds since 1970 in 10 digits, milliseconds in 13, RFC 3339 with an offset"
)

// wantError wants no error for the zero value.
func wantError(t *testing.T, what string, err error, want jsonbody.Error) {
	t.Helper()
	var got jsonbody.Error
	if refusal, ok := errors.AsType[*jsonbody.Error](err); ok {
		got = *refusal
	} else if err != nil {
		t.Errorf("%q: %v", what, err)
	}
	if got != want {
		t.Errorf("%q: %+v, want %+v", what, got, want)
	}
}

func TestTexts(t *testing.T) {
	for text, problem := range map[string]string{
		"":                       "",
		"Zoë 名 🔑":                "",
		strings.Repeat("a", 256): "",
		strings.Repeat("a", 257): "is longer than 256 bytes",
		"a\nb":                   "has a control character in it",
		"a\x00b":                 "has a control character in it",
		"a\u0085b":               "has a control character in it",
		"a\u202eb":               "has a control character in it",
		"a\u2066b":               "has a control character in it",
	} {
		want := jsonbody.Error{}
		if problem != "" {
			want = jsonbody.Error{Field: "name", Problem: problem}
		}
		_, err := jsonbody.Text("name", &text)
		wantError(t, text, err, want)
	}
	if got, err := jsonbody.Text("name", nil); got != "" || err != nil {
		t.Errorf("a text that was not sent: %q, %v", got, err)
	}
	_, err := jsonbody.RequiredText("name", nil)
	wantError(t, "nothing", err, jsonbody.Error{Field: "name", Problem: "is required"})
}

func TestTimestamps(t *testing.T) {
	at := time.UnixMilli(1700000000123)
	for value, want := range map[string]time.Time{
		``: {}, `null`: {},
		`1700000000`: at.Truncate(time.Second), `"1700000000"`: at.Truncate(time.Second),
		`1700000000123`: at, `"1700000000123"`: at,
		`"2023-11-14T22:13:20.123Z"`: at, `"2023-11-15t00:13:20.123+02:00"`: at,
	} {
		text, got, err := jsonbody.Timestamp("at", jsontext.Value(value))
		if err != nil || !got.Equal(want) || text != strings.Trim(strings.TrimPrefix(value, "null"), `"`) {
			t.Errorf("%s: %q, %s, %v", value, text, got, err)
		}
	}
	for value, problem := range map[string]string{
		`true`: wrongType, `{}`: wrongType, `[]`: wrongType,
		`0`: stampForm, `-1700000000`: stampForm, `1.7e9`: stampForm, `1700000000.0`: stampForm, `17000000000`: stampForm,
		`""`: stampForm, `" 1700000000"`: stampForm, `"2023-11-14"`: stampForm, `"2023-11-14T22:13:20"`: stampForm, `"2023-02-30T00:00:00Z"`: stampForm,
	} {
		_, _, err := jsonbody.Timestamp("at", jsontext.Value(value))
		wantError(t, value, err, jsonbody.Error{Field: "at", Problem: problem})
	}
}
