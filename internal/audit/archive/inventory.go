package archive

import (
	"cmp"
	"encoding/base64"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"hash/maphash"
	"io"
	"iter"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/go-json-experiment/json/jsontext"

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
// needs memory for every key, not for every event, and keeps nothing of the text that
// an event was read from.
type inventory struct {
	lives    [][]life          // in the order of creation, all but the last of lifePage
	place    map[uint32]uint32 // in lives, by the hash of the key
	clashing map[string]uint32 // the same, of keys whose hash another key has
	seed     maphash.Seed      // of those hashes
	kinds    table[keyKind]    // what many keys have in common
	acts     table[act]        // what many events have in common
	texts    texts             // what is not in its usual form
	nodesOf  map[*life][]LifeNode
	many     map[*life]map[string]bool // the IDs of the nodes of those that have manyNodes or more
}

// manyNodes is from how many nodes of a key on one is looked up, and not looked for.
const manyNodes = 64

const lifePage = 1024

// life is a Life in little space.
type life struct {
	key                packed
	fingerprint        packed32
	kind               uint32
	created, delivered moment
	lastUse            *use
	ended              *moment
}

// moment is a Moment in little space.
type moment struct {
	index   int64
	time    int64  // in microseconds since 1970: what TimeFormat has
	act     uint32 // 0: there is none
	request packed
}

// use is a moment that later ones replace. A request's ID that is no UUID is in
// here, so that those of all uses do not add up.
type use struct {
	moment
	odd     bool
	request string
}

type keyKind struct {
	org                           org.ID
	algorithm, generatedIn, scope string
}

type act struct {
	kind   audit.Type
	reason string
	actor  audit.Actor
	byKey  bool // the actor's ID is the key's, as with what its nodes signed, and not in here
	action authz.Action
	policy string
}

// table numbers different values, from 1 on.
type table[T comparable] struct {
	values []T
	number map[T]uint32
}

// add returns the number of a value. keep makes a copy that may be kept.
func (t *table[T]) add(v T, keep func(T) T) uint32 {
	n, known := t.number[v]
	if !known {
		if t.number == nil {
			t.number = map[T]uint32{}
		}
		v = keep(v)
		t.values = append(t.values, v)
		n = uint32(len(t.values))
		t.number[v] = n
	}
	return n
}

func (t *table[T]) get(n uint32) T { return t.values[n-1] }

// texts keeps texts one behind the other, each with its length before it.
type texts [][]byte

const textPage = 1 << 16

// add returns where a text is, which is not 0.
func (t *texts) add(text string) uint32 {
	need := len(text) + binary.MaxVarintLen32
	if n := len(*t); n == 0 || cap((*t)[n-1])-len((*t)[n-1]) < need {
		*t = append(*t, make([]byte, 0, max(textPage, need)))
	}
	page := &(*t)[len(*t)-1]
	at := uint32(len(*t))*textPage + uint32(len(*page))
	*page = append(binary.AppendUvarint(*page, uint64(len(text))), text...)
	return at
}

func (t texts) get(at uint32) []byte {
	page := t[at/textPage-1][at%textPage:]
	size, n := binary.Uvarint(page)
	return page[n:][:size]
}

// packed is a UUID in its usual form or, where odd is not 0, a text.
type packed struct {
	uuid [16]byte
	odd  uint32
}

// packed32 is likewise base64 of 32 bytes, without padding.
type packed32 struct {
	hash [32]byte
	odd  uint32
}

// packUUID returns false for what is no UUID in its usual form.
func packUUID(text string) (p packed, ok bool) {
	if len(text) != 36 {
		return p, false
	}
	var digits [32]byte
	plain := append(append(append(append(append(digits[:0], text[:8]...), text[9:13]...), text[14:18]...), text[19:23]...), text[24:]...)
	_, err := hex.Decode(p.uuid[:], plain)
	var again [36]byte
	return p, err == nil && string(p.append(again[:0], nil)) == text
}

func (v *inventory) pack(text string) packed {
	p, ok := packUUID(text)
	if !ok {
		return packed{odd: v.texts.add(text)}
	}
	return p
}

func (p packed) append(to []byte, t texts) []byte {
	if p.odd != 0 {
		return append(to, t.get(p.odd)...)
	}
	for i, part := range [...][2]int{{0, 4}, {4, 6}, {6, 8}, {8, 10}, {10, 16}} {
		if i > 0 {
			to = append(to, '-')
		}
		to = hex.AppendEncode(to, p.uuid[part[0]:part[1]])
	}
	return to
}

func (v *inventory) pack32(text string) (p packed32) {
	if base64.RawStdEncoding.DecodedLen(len(text)) == len(p.hash) {
		var encoded [43]byte
		n, err := base64.RawStdEncoding.Strict().Decode(p.hash[:], append(encoded[:0], text...))
		if err == nil && n == len(p.hash) && base64.RawStdEncoding.EncodeToString(p.hash[:]) == text {
			return p
		}
	}
	return packed32{odd: v.texts.add(text)}
}

func (v *inventory) key(l *life) string { return string(l.key.append(nil, v.texts)) }

func (v *inventory) org(l *life) org.ID { return v.kinds.get(l.kind).org }

func (v *inventory) scope(l *life) string { return v.kinds.get(l.kind).scope }

func (v *inventory) fingerprint(l *life) string {
	if l.fingerprint.odd != 0 {
		return string(v.texts.get(l.fingerprint.odd))
	}
	return base64.RawStdEncoding.EncodeToString(l.fingerprint.hash[:])
}

func (v *inventory) nodes(l *life) []LifeNode { return v.nodesOf[l] }

func (v *inventory) len() int {
	if len(v.lives) == 0 {
		return 0
	}
	last := len(v.lives) - 1
	return last*lifePage + len(v.lives[last])
}

func (v *inventory) at(i int) *life { return &v.lives[i/lifePage][i%lifePage] }

// all are the lives in the order of creation.
func (v *inventory) all() iter.Seq[*life] {
	return func(yield func(*life) bool) {
		for i := range v.len() {
			if !yield(v.at(i)) {
				return
			}
		}
	}
}

// find returns the life of a key, or nil.
func (v *inventory) find(key string) *life {
	if v.place == nil {
		return nil
	}
	var text [64]byte
	if i, there := v.place[v.hash(key)]; there && string(v.at(int(i)).key.append(text[:0], v.texts)) == key {
		return v.at(int(i))
	}
	if i, there := v.clashing[key]; there {
		return v.at(int(i))
	}
	return nil
}

func (v *inventory) hash(key string) uint32 { return uint32(maphash.String(v.seed, key)) }

// moment is all of an event but its request.
func (v *inventory) moment(index int64, e *audit.Event, key string) moment {
	a := act{kind: e.Type, reason: e.Reason, actor: e.Actor, action: e.Action, policy: e.Policy}
	if a.actor.ID == key {
		a.actor.ID, a.byKey = "", true
	}
	return moment{index: index, time: e.Time.UnixMicro(), act: v.acts.add(a, act.clone)}
}

func (a act) clone() act {
	e := audit.Event{Type: a.kind, Reason: a.reason, Actor: a.actor, Action: a.action, Policy: a.policy}.Clone()
	return act{e.Type, e.Reason, e.Actor, a.byKey, e.Action, e.Policy}
}

// lasting is a moment with its request.
func (v *inventory) lasting(index int64, e *audit.Event, key string) moment {
	m := v.moment(index, e, key)
	m.request = v.pack(e.Request)
	return m
}

// created is when a key was, written out.
func (v *inventory) created(l *life) *Moment {
	a := v.acts.get(l.created.act)
	if a.byKey {
		a.actor.ID = v.key(l)
	}
	return &Moment{
		Index: l.created.index, Time: time.UnixMicro(l.created.time).UTC().Format(audit.TimeFormat), Type: a.kind, Reason: a.reason,
		Kind: a.actor.Kind, Actor: a.actor.ID, Action: a.action, Policy: a.policy, ID: string(l.created.request.append(nil, v.texts)),
	}
}

// momentOf is an event in the life of something else than a key.
func momentOf(index int64, e audit.Event) *Moment {
	return &Moment{
		Index: index, Time: e.Time.UTC().Format(audit.TimeFormat), Type: e.Type, Reason: e.Reason,
		Kind: e.Actor.Kind, Actor: e.Actor.ID, Action: e.Action, Policy: e.Policy, ID: e.Request,
	}
}

// add takes the next event into account. It reports what cannot be, such as a
// key that is deleted before it was created.
func (v *inventory) add(index int64, e *audit.Event) error {
	switch e.Type {
	case audit.KeyCreated:
		return v.create(index, e)
	case audit.KeyDelivered, audit.KeyDeleted, audit.KeyWithdrawn:
		return v.advance(index, e)
	}
	if e.Actor.Kind != authz.Node || e.Outcome != audit.Success {
		return nil
	}
	if life := v.find(e.Actor.ID); life != nil && v.org(life) == e.Org {
		v.use(life, index, e)
	}
	return nil
}

func (v *inventory) create(index int64, e *audit.Event) error {
	if v.find(e.Object) != nil {
		return fmt.Errorf("key %s is created a second time", e.Object)
	}
	n := v.len()
	if n%lifePage == 0 {
		v.lives = append(v.lives, make([]life, 0, lifePage))
	}
	if v.place == nil {
		v.place, v.clashing, v.seed = map[uint32]uint32{}, map[string]uint32{}, maphash.MakeSeed()
		v.nodesOf, v.many = map[*life][]LifeNode{}, map[*life]map[string]bool{}
	}
	kind := keyKind{e.Org, e.Detail["algorithm"], e.Detail["backend"], cmp.Or(e.Detail["scope"], "organization")}
	page := &v.lives[n/lifePage]
	*page = append(*page, life{
		key: v.pack(e.Object), fingerprint: v.pack32(e.Detail["fingerprint"]),
		kind: v.kinds.add(kind, keyKind.clone), created: v.lasting(index, e, e.Object),
	})
	if _, taken := v.place[v.hash(e.Object)]; taken {
		v.clashing[strings.Clone(e.Object)] = uint32(n)
	} else {
		v.place[v.hash(e.Object)] = uint32(n)
	}
	return nil
}

func (k keyKind) clone() keyKind {
	return keyKind{org.ID(strings.Clone(string(k.org))), strings.Clone(k.algorithm), strings.Clone(k.generatedIn), strings.Clone(k.scope)}
}

func (v *inventory) advance(index int64, e *audit.Event) error {
	life := v.find(e.Object)
	switch {
	case life == nil || v.org(life) != e.Org:
		return fmt.Errorf("key %s of %s was never created", e.Object, e.Org)
	case e.Type == audit.KeyDelivered && e.Outcome == audit.Success:
		life.delivered = v.lasting(index, e, e.Object)
	case e.Type != audit.KeyDelivered && life.ended != nil:
		return fmt.Errorf("key %s has ended already", e.Object)
	case e.Type != audit.KeyDelivered:
		ended := v.lasting(index, e, e.Object)
		life.ended = &ended
	}
	return nil
}

func (v *inventory) use(life *life, index int64, e *audit.Event) {
	if life.lastUse == nil {
		life.lastUse = new(use)
	}
	last := use{moment: v.moment(index, e, e.Actor.ID)}
	usual := false
	if last.moment.request, usual = packUUID(e.Request); !usual {
		last.odd, last.request = true, strings.Clone(e.Request)
	}
	*life.lastUse = last
	if e.Type != audit.NodeRegistered {
		return
	}
	if !v.registered(life, e.Object) {
		n := LifeNode{strings.Clone(e.Object), strings.Clone(e.Detail["ip"]), index}
		v.nodesOf[life] = append(v.nodes(life), n)
		if known := v.many[life]; known != nil {
			known[n.Node] = true
		}
	}
}

// registered reports whether a node has registered with a key already.
func (v *inventory) registered(l *life, node string) bool {
	nodes := v.nodes(l)
	if len(nodes) < manyNodes {
		return slices.ContainsFunc(nodes, func(n LifeNode) bool { return n.Node == node })
	}
	if v.many[l] == nil {
		v.many[l] = map[string]bool{}
		for _, n := range nodes {
			v.many[l][n.Node] = true
		}
	}
	return v.many[l][node]
}

// appendLine appends a life as the export holds it, without the line's end: what
// encoding the Life would give.
func (v *inventory) appendLine(to []byte, l *life) ([]byte, error) {
	kind := v.kinds.get(l.kind)
	w := lineWriter{to: to}
	w.text(`{"key":`, v.key(l))
	w.text(`,"org":`, string(kind.org))
	w.optional(`,"algorithm":`, kind.algorithm)
	w.optional(`,"fingerprint":`, v.fingerprint(l))
	w.optional(`,"generatedIn":`, kind.generatedIn)
	w.lasting(`,"created":`, v, l, &l.created)
	w.lasting(`,"delivered":`, v, l, &l.delivered)
	for i, n := range v.nodes(l) {
		w.literal([]string{`,"nodes":[`, `,`}[min(i, 1)])
		w.text(`{"node":`, n.Node)
		w.optional(`,"ip":`, n.IP)
		w.number(`,"index":`, n.Index)
		w.literal(`}`)
	}
	if len(v.nodes(l)) > 0 {
		w.literal(`]`)
	}
	if l.lastUse != nil && l.lastUse.odd {
		w.moment(`,"lastUse":`, v, l, &l.lastUse.moment, l.lastUse.request)
	} else if l.lastUse != nil {
		w.lasting(`,"lastUse":`, v, l, &l.lastUse.moment)
	}
	w.lasting(`,"ended":`, v, l, l.ended)
	w.literal(`}`)
	if w.err != nil {
		return to, fmt.Errorf("encoding the life of key %s: %w", v.key(l), w.err)
	}
	return w.to, nil
}

// lineWriter appends JSON.
type lineWriter struct {
	to  []byte
	err error
}

func (w *lineWriter) literal(text string) { w.to = append(w.to, text...) }

func (w *lineWriter) text(name, value string) {
	w.literal(name)
	var err error
	if w.to, err = jsontext.AppendQuote(w.to, value); err != nil && w.err == nil {
		w.err = err
	}
}

func (w *lineWriter) optional(name, value string) {
	if value != "" {
		w.text(name, value)
	}
}

func (w *lineWriter) number(name string, value int64) {
	w.literal(name)
	w.to = strconv.AppendInt(w.to, value, 10)
}

func (w *lineWriter) lasting(name string, v *inventory, l *life, m *moment) {
	if m == nil || m.act == 0 {
		return
	}
	var request [64]byte
	w.moment(name, v, l, m, string(m.request.append(request[:0], v.texts)))
}

func (w *lineWriter) moment(name string, v *inventory, l *life, m *moment, request string) {
	a := v.acts.get(m.act)
	if a.byKey {
		a.actor.ID = v.key(l)
	}
	w.literal(name)
	w.number(`{"index":`, m.index)
	w.literal(`,"time":"`)
	w.to = time.UnixMicro(m.time).UTC().AppendFormat(w.to, audit.TimeFormat)
	w.text(`","type":`, string(a.kind))
	w.optional(`,"reason":`, a.reason)
	w.optional(`,"actorKind":`, string(a.actor.Kind))
	w.optional(`,"actor":`, a.actor.ID)
	w.optional(`,"action":`, string(a.action))
	w.optional(`,"policy":`, a.policy)
	w.optional(`,"request":`, request)
	w.literal(`}`)
}

func (v *inventory) write(w io.Writer) error {
	var line []byte
	for l := range v.all() {
		var err error
		if line, err = v.appendLine(line[:0], l); err != nil {
			return err
		}
		if _, err := w.Write(append(line, '\n')); err != nil {
			return err
		}
	}
	return nil
}

// live are the keys that have not ended, in the order of creation.
func (v *inventory) live() []*life {
	var live []*life
	for l := range v.all() {
		if l.ended == nil {
			live = append(live, l)
		}
	}
	return live
}
