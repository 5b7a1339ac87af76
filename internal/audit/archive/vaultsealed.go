package archive

import (
	"fmt"
	"slices"
	"strings"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"

	"github.com/orgkeys/orgkeys/internal/audit"
)

// sealedMount is where keys are made that leave Vault wrapped, and where their
// recipients are imported.
const sealedMount = "orgkeys-sealed/"

// sealings is what Vault's audit files say of keys that left Vault wrapped. The
// service imports a recipient under a fresh name for each key, and exports each
// key to that name alone. Who stole the service's token can import a recipient
// of their own and have a live key exported to it, or put it in the place of the
// right one; either way a name shows more than the service does with it.
type sealings struct {
	seen      map[string]bool // requests, by ID: two devices write the same entries
	imports   map[string]imported
	exports   map[string][]sealing // by the key's name in Vault
	delivered map[string]delivery  // by the key's name in Vault, which the log's event gives
}

// imported is how often a recipient was under one name, and the last time.
type imported struct {
	times int
	last  vaultMark
}

type sealing struct {
	to string // the recipient's name in Vault
	vaultMark
}

type delivery struct {
	index int64 // of the event
	key   string
}

// VaultSealed is what Vault's audit files say of keys that left Vault wrapped.
type VaultSealed struct {
	Imports   int // of recipients
	Exports   int
	Delivered int      // keys of the log that left Vault to one recipient
	Unknown   []string // where keys left that no event of the log names: attempts that failed or were cut off, or came after the export
}

// sealedEntry is an entry about a sealed key or its recipient.
type sealedEntry struct {
	Type    string `json:"type"`
	Error   string `json:"error"`
	Request struct {
		ID        string `json:"id"`
		Operation string `json:"operation"`
		Path      string `json:"path"`
	} `json:"request"`
	Response struct {
		Data struct {
			Keys jsontext.Value `json:"keys"` // of an export; absent if there was nothing to export
		} `json:"data"`
	} `json:"response"`
}

// entry takes an entry that Vault wrote after it had done what was asked.
func (s *sealings) entry(raw []byte, mark vaultMark) error {
	var e sealedEntry
	if err := json.Unmarshal(raw, &e); err != nil {
		return err
	}
	rest, ours := strings.CutPrefix(e.Request.Path, sealedMount)
	if !ours || e.Type != "response" || e.Error != "" || s.seen[e.Request.ID] {
		return nil
	}
	if s.seen == nil {
		s.seen, s.imports, s.exports = map[string]bool{}, map[string]imported{}, map[string][]sealing{}
	}
	s.seen[e.Request.ID] = true
	parts := strings.Split(rest, "/")
	switch {
	case len(parts) == 3 && parts[0] == "keys" && parts[2] == "import" && e.Request.Operation == "update":
		i := s.imports[parts[1]]
		if i.times++; i.times == 1 || i.last.before(mark) {
			i.last = mark
		}
		s.imports[parts[1]] = i
	case len(parts) >= 3 && parts[0] == "byok-export" && e.Response.Data.Keys != nil:
		s.exports[parts[2]] = append(s.exports[parts[2]], sealing{parts[1], mark})
	}
	return nil
}

// event notes which key in Vault an event of the log is about.
func (s *sealings) event(index int64, e *audit.Event) {
	if e.Type != audit.KeySealed {
		return
	}
	if name := strings.Clone(e.Detail["attempt"]); name != "" {
		if s.delivered == nil {
			s.delivered = map[string]delivery{}
		}
		s.delivered[name] = delivery{index, strings.Clone(e.Object)}
	}
}

// surplus is a key that somebody else than its recipient can have.
type surplus struct {
	vaultMark
	index int64 // of the log's event of the key; -1: none
	text  string
}

const maxSurplus = 20 // that are named; the rest are counted

// judge finds keys that somebody else than their recipients can have. One that
// left twice to one recipient is none: when a connection breaks, HTTP asks again.
func (s *sealings) judge(f *VaultFile) (r VaultSealed) {
	for _, i := range s.imports {
		r.Imports += i.times
	}
	var more []surplus
	for name, exports := range s.exports {
		r.Exports += len(exports)
		slices.SortFunc(exports, func(a, b sealing) int { return order(a.vaultMark, b.vaultMark) })
		d, known := s.delivered[name]
		switch why := s.shared(f, exports); {
		case why != "" && known:
			more = append(more, surplus{exports[0].vaultMark, d.index, fmt.Sprintf("key %s (%s in Vault) %s", d.key, name, why)})
		case why != "":
			more = append(more, surplus{exports[0].vaultMark, -1, fmt.Sprintf("a key that the log does not hold (%s in Vault) %s", name, why)})
		case known:
			r.Delivered++
		default:
			r.Unknown = append(r.Unknown, name+" at "+f.place(exports[0].vaultMark))
		}
	}
	slices.Sort(r.Unknown)
	f.accuse(more)
	return r
}

// shared says why somebody else than the recipient can have a key, or nothing.
func (s *sealings) shared(f *VaultFile, exports []sealing) string {
	first := exports[0]
	for _, other := range exports[1:] {
		if other.to != first.to {
			return fmt.Sprintf("left Vault to two recipients, at %s and at %s", f.place(first.vaultMark), f.place(other.vaultMark))
		}
	}
	if i := s.imports[first.to]; i.times > 1 {
		return fmt.Sprintf("left Vault at %s to a name under which %d recipients were imported, at %s the last", f.place(first.vaultMark), i.times, f.place(i.last))
	}
	if out := s.exports[first.to]; len(out) > 0 {
		return fmt.Sprintf("left Vault at %s to a key that left Vault itself, at %s", f.place(first.vaultMark), f.place(out[0].vaultMark))
	}
	return ""
}

func (f *VaultFile) accuse(more []surplus) {
	if len(more) == 0 {
		return
	}
	slices.SortFunc(more, func(a, b surplus) int { return order(a.vaultMark, b.vaultMark) })
	var texts []string
	for _, m := range more[:min(len(more), maxSurplus)] {
		texts = append(texts, m.text)
	}
	if n := len(more) - maxSurplus; n > 0 {
		texts = append(texts, fmt.Sprintf("and %d more", n))
	}
	f.found(more[0].vaultMark, more[0].index, "%s: whoever used the service's Vault token for that can have it too; delete the key, and give the service new credentials", strings.Join(texts, "; "))
}

func order(a, b vaultMark) int {
	switch {
	case a.before(b):
		return -1
	case b.before(a):
		return 1
	default:
		return 0
	}
}
