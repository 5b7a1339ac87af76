package archive

import (
	"cmp"
	"fmt"
	"io"
	"slices"

	"github.com/go-json-experiment/json"

	"github.com/orgkeys/orgkeys/internal/audit"
	"github.com/orgkeys/orgkeys/internal/authz"
	"github.com/orgkeys/orgkeys/internal/org"
)

// Life is one key's life, as the log tells it. docs/audit.md says what each
// part means for SP 800-57.
type Life struct {
	Key         string     `json:"key"`
	Org         org.ID     `json:"org"`
	Algorithm   string     `json:"algorithm,omitempty"`
	Fingerprint string     `json:"fingerprint,omitempty"`
	GeneratedIn string     `json:"generatedIn,omitempty"` // the back end
	Created     *Moment    `json:"created"`
	Delivered   *Moment    `json:"delivered,omitempty"` // absent: never released, or not known to have arrived
	Nodes       []LifeNode `json:"nodes,omitempty"`     // that registered with it, in that order
	LastUse     *Moment    `json:"lastUse,omitempty"`   // the newest request that a node signed with it
	Ended       *Moment    `json:"ended,omitempty"`     // deleted, or withdrawn

	scope string
}

// Moment is an event in a key's life: what the log holds at index.
type Moment struct {
	Index  int64        `json:"index"`
	Time   string       `json:"time"`
	Type   audit.Type   `json:"type"`
	Reason string       `json:"reason,omitempty"`
	Kind   authz.Kind   `json:"actorKind,omitempty"`
	Actor  string       `json:"actor,omitempty"`
	Action authz.Action `json:"action,omitempty"`
	Policy string       `json:"policy,omitempty"`
	ID     string       `json:"request,omitempty"`
}

// LifeNode is a node that registered with a key.
type LifeNode struct {
	Node  string `json:"node"`
	IP    string `json:"ip,omitempty"`
	Index int64  `json:"index"` // of the event that says so first
}

// inventory builds the lives of all keys from the events, in their order. It
// needs memory for every key, not for every event.
type inventory struct {
	lives []*Life
	byKey map[string]*Life
}

func moment(index int64, e audit.Event) *Moment {
	return &Moment{
		Index: index, Time: e.Time.UTC().Format(audit.TimeFormat), Type: e.Type, Reason: e.Reason,
		Kind: e.Actor.Kind, Actor: e.Actor.ID, Action: e.Action, Policy: e.Policy, ID: e.Request,
	}
}

// add takes the next event into account. It reports what cannot be, such as a
// key that is deleted before it was created.
func (v *inventory) add(index int64, e audit.Event) error {
	switch e.Type {
	case audit.KeyCreated:
		return v.create(index, e)
	case audit.KeyDelivered, audit.KeyDeleted, audit.KeyWithdrawn:
		return v.advance(index, e)
	}
	if life := v.byKey[e.Actor.ID]; life != nil && e.Actor.Kind == authz.Node && e.Outcome == audit.Success && life.Org == e.Org {
		v.use(life, index, e)
	}
	return nil
}

func (v *inventory) create(index int64, e audit.Event) error {
	if v.byKey[e.Object] != nil {
		return fmt.Errorf("key %s is created a second time", e.Object)
	}
	life := &Life{
		Key: e.Object, Org: e.Org, Algorithm: e.Detail["algorithm"], Fingerprint: e.Detail["fingerprint"],
		GeneratedIn: e.Detail["backend"], Created: moment(index, e), scope: cmp.Or(e.Detail["scope"], "organization"),
	}
	if v.byKey == nil {
		v.byKey = map[string]*Life{}
	}
	v.byKey[e.Object] = life
	v.lives = append(v.lives, life)
	return nil
}

func (v *inventory) advance(index int64, e audit.Event) error {
	life := v.byKey[e.Object]
	switch {
	case life == nil || life.Org != e.Org:
		return fmt.Errorf("key %s of %s was never created", e.Object, e.Org)
	case e.Type == audit.KeyDelivered && e.Outcome == audit.Success:
		life.Delivered = moment(index, e)
	case e.Type != audit.KeyDelivered && life.Ended != nil:
		return fmt.Errorf("key %s has ended already", e.Object)
	case e.Type != audit.KeyDelivered:
		life.Ended = moment(index, e)
	}
	return nil
}

func (v *inventory) use(life *Life, index int64, e audit.Event) {
	life.LastUse = moment(index, e)
	if e.Type != audit.NodeRegistered {
		return
	}
	for _, n := range life.Nodes {
		if n.Node == e.Object {
			return
		}
	}
	life.Nodes = append(life.Nodes, LifeNode{e.Object, e.Detail["ip"], index})
}

// line is a life as the export holds it, without the line's end.
func (l *Life) line() ([]byte, error) {
	b, err := json.Marshal(l, json.Deterministic(true))
	if err != nil {
		return nil, fmt.Errorf("encoding the life of key %s: %w", l.Key, err)
	}
	return b, nil
}

func (v *inventory) write(w io.Writer) error {
	for _, l := range v.lives {
		b, err := l.line()
		if err != nil {
			return err
		}
		if _, err := w.Write(append(b, '\n')); err != nil {
			return err
		}
	}
	return nil
}

// live are the keys that have not ended, in the order of creation.
func (v *inventory) live() []*Life {
	return slices.DeleteFunc(slices.Clone(v.lives), func(l *Life) bool { return l.Ended != nil })
}
