package audit

import (
	"bytes"
	"testing"

	"github.com/go-json-experiment/json"

	"github.com/orgkeys/orgkeys/internal/authz"
)

// What is written without the JSON encoder is what the JSON encoder writes, or is left to it.
func TestWhatIsPlainIsAsTheJSONEncoderWritesIt(t *testing.T) {
	texts := []string{"", "a", "node.registered", "10.0.0.1", "~!#[]/<>&'", "a\"b", `a\b`, "a\nb", "\x7f", "Zoë", "\u2028", "\xff"}
	check := func(v any, got []byte, plain bool) {
		t.Helper()
		want, err := json.Marshal(v, json.Deterministic(true))
		if plain && (err != nil || !bytes.Equal(got, want)) {
			t.Errorf("%s, want %s, %v", got, want, err)
		}
	}
	written := 0
	for i, text := range texts {
		for _, other := range texts {
			for j, detail := range []map[string]string{nil, {}, {"ip": text}, {"b": text, "a": other, "B": "c"}, {text: other}} {
				l := Leaf{
					Version: 1, ID: text, Time: "2026-01-02T03:04:05.000006Z", Type: Type(other), Outcome: Success, Reason: other, Org: "acme",
					Kind: authz.Node, Actor: text, Roles: []authz.Role{authz.Owner, authz.Role(text)}[:j%3], Action: authz.RegisterNode,
					Object: other, Request: text, Policy: "p", Scope: "s", Detail: detail, Personal: other,
				}
				got, plain := l.plain()
				check(l, got, plain)
				if plain {
					written++
				}
				s := salted{"c2FsdA==", Personal{Name: text, Email: other, Address: text}}
				got, plain = s.plain()
				check(s, got, plain)
				if plain != (i < 5 && isPlain(other)) {
					t.Errorf("%q, %q: plain is %t", text, other, plain)
				}
			}
		}
	}
	if written < 5*5*4 {
		t.Errorf("only %d leaves were written", written)
	}
	if _, plain := (Leaf{Version: 2}).plain(); plain {
		t.Error("a leaf of another version is written as one of version 1")
	}
}

// The salt of every stored personal part can be cut out and joined again, however it was encoded.
func TestSaltsAreCut(t *testing.T) {
	for _, name := range []string{"", "Ada", "Ad\u00eb \"the\" \n first"} {
		stored, err := encodePersonal(Personal{Name: name})
		if err != nil {
			t.Fatal(err)
		}
		salt, rest, ok := CutSalt(stored)
		if !ok || len(salt) != SaltSize || !bytes.HasPrefix(rest, []byte{'"'}) || !bytes.Equal(JoinSalt(salt, rest), stored) {
			t.Errorf("%s is cut into %x and %q, %t", stored, salt, rest, ok)
		}
	}
}

func isPlain(text string) bool {
	return text == "" || text[0] != '\x7f' && !bytes.ContainsAny([]byte(text), "\"\\\n\u2028\u00eb\xff")
}
