package audit

import (
	"maps"
	"slices"
)

// plain writes JSON of plain ASCII, what Scan reads, without reflection: it is part of every
// registration's transaction, where others wait for it. After a text that needs more than
// quotes ok is false, and the JSON encoder has to do it.
type plain struct {
	b  []byte
	ok bool
}

func (p *plain) text(s string) {
	for i := range len(s) {
		if c := s[i]; c < ' ' || c > '~' || c == '"' || c == '\\' {
			p.ok = false
			return
		}
	}
	p.b = append(append(append(p.b, '"'), s...), '"')
}

// member adds a member, and a comma if it is not the object's first; optional does
// so unless the value is empty.
func (p *plain) member(name, value string) {
	if p.b[len(p.b)-1] != '{' {
		p.b = append(p.b, ',')
	}
	p.text(name)
	p.b = append(p.b, ':')
	p.text(value)
}

func (p *plain) optional(name, value string) {
	if value != "" {
		p.member(name, value)
	}
}

// plain is the leaf as the JSON encoder writes it, or false if it is not plain.
func (l Leaf) plain() ([]byte, bool) {
	p := plain{append(make([]byte, 0, 768), `{"v":1`...), l.Version == 1}
	p.member("id", l.ID)
	p.member("time", l.Time)
	p.member("type", string(l.Type))
	p.member("outcome", string(l.Outcome))
	p.optional("reason", l.Reason)
	p.optional("org", string(l.Org))
	p.optional("actorKind", string(l.Kind))
	p.optional("actor", l.Actor)
	p.optional("actorOrg", string(l.ActorOrg))
	for i, role := range l.Roles {
		if i == 0 {
			p.b = append(p.b, `,"roles":[`...)
		} else {
			p.b = append(p.b, ',')
		}
		p.text(string(role))
	}
	if len(l.Roles) > 0 {
		p.b = append(p.b, ']')
	}
	p.optional("action", string(l.Action))
	p.optional("object", l.Object)
	p.optional("request", l.Request)
	p.optional("policy", l.Policy)
	p.optional("scope", string(l.Scope))
	if len(l.Detail) > 0 {
		p.b = append(p.b, `,"detail":{`...)
		for _, name := range slices.Sorted(maps.Keys(l.Detail)) {
			p.member(name, l.Detail[name])
		}
		p.b = append(p.b, '}')
	}
	p.optional("personal", l.Personal)
	return append(p.b, '}'), p.ok
}

// plain is the personal part with its salt, likewise.
func (s salted) plain() ([]byte, bool) {
	p := plain{append(make([]byte, 0, 256), '{'), true}
	p.member("salt", s.Salt)
	p.optional("name", s.Name)
	p.optional("email", s.Email)
	p.optional("address", s.Address)
	p.optional("note", s.Note)
	return append(p.b, '}'), p.ok
}
