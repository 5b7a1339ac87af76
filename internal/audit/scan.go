package audit

import (
	"strings"
	"time"

	"github.com/orgkeys/orgkeys/internal/authz"
	"github.com/orgkeys/orgkeys/internal/org"
)

// Scan reads the leaf at the beginning of text into e, and returns how long it is.
// It reads only what Encode writes of plain ASCII: members in their order, nothing
// escaped, no white space. For all else it returns false, and Decode decides: what
// Scan reads, Decode reads to the same event. e refers to text, and e.Detail is detail,
// emptied before, unless the event has none; a nil detail is made anew.
func Scan(text string, e *Event, detail map[string]string) (int, bool) {
	s := scanner{text: text, ok: true}
	roles := e.Roles[:0]
	*e = Event{}
	s.expect(`{"v":1,"id":"`)
	e.ID = s.rest()
	s.expect(`,"time":"`)
	e.Time = s.time()
	s.expect(`,"type":"`)
	e.Type = Type(s.rest())
	s.expect(`,"outcome":"`)
	e.Outcome = Outcome(s.rest())
	e.Reason = s.optional(`,"reason":"`)
	e.Org = org.ID(s.optional(`,"org":"`))
	e.Actor.Kind = authz.Kind(s.optional(`,"actorKind":"`))
	e.Actor.ID = s.optional(`,"actor":"`)
	e.ActorOrg = org.ID(s.optional(`,"actorOrg":"`))
	if s.skip(`,"roles":["`) {
		e.Roles = append(roles, authz.Role(s.rest()))
		for s.skip(`,"`) {
			e.Roles = append(e.Roles, authz.Role(s.rest()))
		}
		s.expect(`]`)
	}
	e.Action = authz.Action(s.optional(`,"action":"`))
	e.Object = s.optional(`,"object":"`)
	e.Request = s.optional(`,"request":"`)
	e.Policy = s.optional(`,"policy":"`)
	e.Scope = authz.Scope(s.optional(`,"scope":"`))
	if s.skip(`,"detail":{"`) {
		e.Detail = s.detail(detail)
	}
	s.optional(`,"personal":"`)
	s.expect(`}`)
	return s.at, s.ok
}

// ScanReceipts reads the receipts behind an event in an export, likewise: at most
// one of a sink, in the order of their names.
func ScanReceipts(text string) (receipts map[string]string, n int, ok bool) {
	s := scanner{text: text, ok: true}
	s.expect(`{"`)
	receipts = s.detail(nil)
	return receipts, s.at, s.ok
}

// scanner reads text from at on. After something unexpected ok is false for good.
type scanner struct {
	text string
	at   int
	ok   bool
}

func (s *scanner) skip(literal string) bool {
	if !s.ok || !strings.HasPrefix(s.text[s.at:], literal) {
		return false
	}
	s.at += len(literal)
	return true
}

func (s *scanner) expect(literal string) { s.ok = s.skip(literal) }

func (s *scanner) optional(literal string) string {
	if !s.skip(literal) {
		return ""
	}
	return s.rest()
}

// rest reads a string whose quote is read already.
func (s *scanner) rest() string {
	if !s.ok {
		return ""
	}
	from := s.at
	for i := from; i < len(s.text); i++ {
		switch c := s.text[i]; {
		case c == '"':
			s.at = i + 1
			return s.text[from:i]
		case c < ' ', c == '\\', c >= 0x80:
			s.ok = false
			return ""
		}
	}
	s.ok = false
	return ""
}

// detail reads an object of strings whose first quote is read already. Names must
// rise, so that none comes twice.
func (s *scanner) detail(into map[string]string) map[string]string {
	if into == nil {
		into = map[string]string{}
	}
	clear(into)
	last := ""
	for first := true; s.ok; first = false {
		name := s.rest()
		s.ok = s.ok && (first || name > last)
		s.expect(`:"`)
		into[name] = s.rest()
		last = name
		if !s.skip(`,"`) {
			break
		}
	}
	s.expect(`}`)
	return into
}

// time reads a time in TimeFormat and its closing quote.
func (s *scanner) time() time.Time {
	t := s.rest()
	const form = "0000-00-00T00:00:00.000000Z"
	if !s.ok || len(t) != len(form) {
		s.ok = false
		return time.Time{}
	}
	for i := range len(form) {
		if form[i] == '0' && (t[i] < '0' || t[i] > '9') || form[i] != '0' && t[i] != form[i] {
			s.ok = false
			return time.Time{}
		}
	}
	year, month, day := number(t[0:4]), time.Month(number(t[5:7])), number(t[8:10])
	hour, minute, second := number(t[11:13]), number(t[14:16]), number(t[17:19])
	at := time.Date(year, month, day, hour, minute, second, number(t[20:26])*1000, time.UTC)
	if month < 1 || month > 12 || day < 1 || day > 28 && at.Day() != day || hour > 23 || minute > 59 || second > 59 {
		s.ok = false
	}
	return at
}

// number is the value of digits.
func number(digits string) int {
	n := 0
	for _, c := range []byte(digits) {
		n = 10*n + int(c-'0')
	}
	return n
}

// Clone returns e without a reference to what it was read from.
func (e Event) Clone() Event {
	e.ID, e.Reason, e.Object, e.Request, e.Policy = strings.Clone(e.ID), strings.Clone(e.Reason), strings.Clone(e.Object), strings.Clone(e.Request), strings.Clone(e.Policy)
	e.Type, e.Outcome, e.Scope = cloned(e.Type), cloned(e.Outcome), cloned(e.Scope)
	e.Org, e.ActorOrg, e.Action = cloned(e.Org), cloned(e.ActorOrg), cloned(e.Action)
	e.Actor = Actor{cloned(e.Actor.Kind), cloned(e.Actor.ID)}
	roles := e.Roles
	e.Roles = nil
	for _, r := range roles {
		e.Roles = append(e.Roles, cloned(r))
	}
	if e.Detail != nil {
		detail := make(map[string]string, len(e.Detail))
		for name, value := range e.Detail {
			detail[cloned(name)] = cloned(value)
		}
		e.Detail = detail
	}
	return e
}

func cloned[S ~string](s S) S { return S(strings.Clone(string(s))) }
