package archive

import (
	"encoding/base64"
	"fmt"
	"strconv"

	"github.com/orgkeys/orgkeys/internal/audit"
	"github.com/orgkeys/orgkeys/internal/audit/verify"
	"github.com/orgkeys/orgkeys/internal/envelope"
	"github.com/orgkeys/orgkeys/internal/org"
	"github.com/orgkeys/orgkeys/internal/orgkey"
)

// Enrolled is how a sealed key came to who asked for it, as the log tells it,
// and what became of its receipt.
type Enrolled struct {
	Key        string     `json:"key"`
	Org        org.ID     `json:"org"`
	Scope      string     `json:"scope"`
	Enrollment string     `json:"enrollment,omitempty"` // empty: an administrator's own
	Nodes      []LifeNode `json:"nodes,omitempty"`      // that registered with the key
	Permitted  *Moment    `json:"permitted"`            // who let it be made
	Approved   *Moment    `json:"approved,omitempty"`
	Claimed    *Moment    `json:"claimed,omitempty"`
	From       string     `json:"from,omitempty"` // the address that claimed it
	Recipient  string     `json:"recipient"`
	SHA256     string     `json:"sha256"` // of the bytes that went out
	Sealed     *Moment    `json:"sealed"`
	Delivered  *Moment    `json:"delivered,omitempty"` // the first time
	Answers    int        `json:"answers,omitzero"`    // how often they went out, as of the receipt
	Received   *Moment    `json:"received,omitempty"`
	Receipt    Receipt    `json:"receipt"`
	Unchecked  string     `json:"unchecked,omitempty"` // why the signature was not checked

	signature []byte
}

// Receipt is what is known of a sealed key's arrival.
type Receipt string

// What can be known of it.
const (
	None      Receipt = "none"      // nobody has signed for it
	Used      Receipt = "used"      // nobody has signed for it, but requests with it, says the server
	Signed    Receipt = "signed"    // the holder of the private key signed for it: checked
	Unchecked Receipt = "unchecked" // a signature is there, and its public key is not
)

// Why a signature was not checked.
const (
	noPublicKeys  = "the export was made without public keys"
	keyWasDeleted = "the key was deleted before the export was made, and its public key with it"
)

// deliveries builds what is known of all sealed keys from the events, in their
// order.
type deliveries struct {
	all       []*Enrolled
	byKey     map[string]*Enrolled
	permitted map[string]*permission // by enrollment
	claims    map[string]*claimed    // by key
	approvals map[string]*Moment     // by enrollment and recipient
	own       map[string]ownKey      // by key
	proven    int64                  // of own
}

// ownKey is a key that its holder made, with their proof.
type ownKey struct {
	index      int64
	org        org.ID
	enrollment string // empty: an administrator added it
	recipient  string
	signature  []byte
}

// text is what the holder signed.
func (k ownKey) text() []byte {
	if k.enrollment == "" {
		return envelope.OwnKeyText(string(k.org), k.recipient)
	}
	return envelope.ClaimText(k.enrollment, k.recipient)
}

// claimed is a claim whose key may come to nothing.
type claimed struct {
	at              *Moment
	from, recipient string
	enrollment, ek  string
}

func newDeliveries() deliveries {
	return deliveries{byKey: map[string]*Enrolled{}, permitted: map[string]*permission{}, claims: map[string]*claimed{}, approvals: map[string]*Moment{}, own: map[string]ownKey{}}
}

// add takes the next event into account, after the inventory has. It reports
// what cannot be.
func (d *deliveries) add(index int64, e *audit.Event, lives *inventory) error {
	switch e.Type {
	case audit.KeyCreated:
		if e.Detail["backend"] != nodeMade && e.Detail["enrollment"] == "" {
			return nil
		}
		fallthrough
	case audit.EnrollmentCreated, audit.EnrollmentApproved, audit.EnrollmentClaimed, audit.EnrollmentRevoked, audit.EnrollmentExpired, audit.KeySealed, audit.KeyDelivered, audit.KeyReceived:
		if e.Outcome == audit.Success {
			return d.note(index, e, lives)
		}
	}
	return nil
}

func (d *deliveries) note(index int64, told *audit.Event, lives *inventory) error {
	if told.Type == audit.KeyDelivered && d.byKey[told.Object] == nil {
		return nil
	}
	e := told.Clone() // what is kept must not keep the text that it was read from
	switch e.Type {
	case audit.KeyCreated:
		return d.made(index, e, lives)
	case audit.KeySealed:
		return d.seal(index, e, lives, lives.find(e.Object))
	case audit.KeyDelivered:
		d.byKey[e.Object].Delivered = momentOf(index, e)
	case audit.KeyReceived:
		return d.receive(index, e)
	default:
		return d.permit(index, e)
	}
	return nil
}

// nodeMade is the back end, in the log, of a key that its holder made.
const nodeMade = "node"

// made takes a key into account that came by an enrollment, or that its holder made.
func (d *deliveries) made(index int64, e audit.Event, lives *inventory) error {
	if err := d.keeps(e, lives); err != nil || e.Detail["backend"] != nodeMade {
		return err
	}
	k := ownKey{index: index, org: e.Org, enrollment: e.Detail["enrollment"], recipient: e.Detail["recipient"]}
	var err error
	if k.signature, err = base64.StdEncoding.Strict().DecodeString(e.Detail["signature"]); err != nil {
		return fmt.Errorf("the proof of key %s is no signature: %w", e.Object, err)
	}
	if k.enrollment != "" && d.claims[e.Object].recipient != k.recipient {
		return fmt.Errorf("key %s is another than claimed enrollment %s", e.Object, k.enrollment)
	}
	delete(d.claims, e.Object)
	d.own[e.Object] = k
	return nil
}

func (d *deliveries) seal(index int64, e audit.Event, lives *inventory, life *life) error {
	if life == nil || lives.org(life) != e.Org {
		return fmt.Errorf("key %s of %s is sealed, and was never created", e.Object, e.Org)
	}
	if d.byKey[e.Object] != nil {
		return fmt.Errorf("key %s is sealed a second time", e.Object)
	}
	known := &Enrolled{
		Key: e.Object, Org: e.Org, Scope: lives.scope(life), Enrollment: e.Detail["enrollment"], Permitted: lives.created(life),
		Recipient: e.Detail["recipient"], SHA256: e.Detail["sealed"], Sealed: momentOf(index, e), Receipt: None,
	}
	if known.Enrollment != "" {
		claim := d.claims[e.Object]
		if claim == nil || claim.enrollment != known.Enrollment || claim.recipient != known.Recipient {
			return fmt.Errorf("key %s is sealed to a recipient that did not claim it by enrollment %s", e.Object, known.Enrollment)
		}
		if err := d.keeps(e, lives); err != nil {
			return err
		}
		known.Permitted, known.Claimed, known.From = d.permitted[known.Enrollment].at, claim.at, claim.from
		known.Approved = d.approvals[known.Enrollment+"/"+known.Recipient]
		delete(d.claims, e.Object)
	}
	d.byKey[e.Object] = known
	d.all = append(d.all, known)
	return nil
}

func (d *deliveries) receive(index int64, e audit.Event) error {
	known := d.byKey[e.Object]
	text, signed := e.Detail["signature"]
	switch {
	case known == nil || known.Org != e.Org:
		return fmt.Errorf("key %s is received, and was never sealed", e.Object)
	case known.Received != nil && !(known.Receipt == Used && signed): // who used it may sign later
		return fmt.Errorf("key %s is received a second time", e.Object)
	}
	known.Received = momentOf(index, e)
	if !signed {
		known.Receipt = Used
		return nil
	}
	if e.Detail["recipient"] != known.Recipient || e.Detail["sealed"] != known.SHA256 {
		return fmt.Errorf("the receipt of key %s is for other bytes than were sealed", e.Object)
	}
	var err error
	if known.signature, err = base64.StdEncoding.Strict().DecodeString(text); err != nil {
		return fmt.Errorf("the receipt of key %s is no signature: %w", e.Object, err)
	}
	if known.Answers, err = strconv.Atoi(e.Detail["answers"]); err != nil {
		return fmt.Errorf("the receipt of key %s does not say how often it went out: %w", e.Object, err)
	}
	known.Receipt, known.Unchecked = Unchecked, noPublicKeys
	return nil
}

// check checks that the holder of key's private half signed its receipt, and if
// they made the key their proof, where there is one.
func (d *deliveries) check(origin, key string, public orgkey.Public) error {
	if k, made := d.own[key]; made {
		if !public.Verifies(k.text(), k.signature) {
			return verify.Problemf(k.index, "the proof of key %s was not signed by that key", key)
		}
		d.proven++
	}
	known := d.byKey[key]
	if known == nil || known.Receipt != Unchecked {
		return nil
	}
	text := envelope.Delivery{Org: string(known.Org), Origin: origin, KeyID: key, Recipient: known.Recipient, SHA256: known.SHA256}.ReceiptText()
	if !public.Verifies(text, known.signature) {
		return verify.Problemf(known.Received.Index, "the receipt of key %s was not signed by that key", key)
	}
	known.Receipt, known.Unchecked = Signed, ""
	return nil
}

// withoutKey notes that the export has no public key for a key that ended.
func (d *deliveries) withoutKey(key string) {
	if known := d.byKey[key]; known != nil && known.Receipt == Unchecked {
		known.Unchecked = keyWasDeleted
	}
}

// told are all of them, with the nodes that registered.
func (d *deliveries) told(lives *inventory) []Enrolled {
	all := make([]Enrolled, len(d.all))
	for i, e := range d.all {
		e.Nodes = lives.nodes(lives.find(e.Key))
		all[i] = *e
	}
	return all
}

// publicKeyLine is a key in publicKeysName: its public half as PKIX DER in base64, or
// that it was gone when the export was made.
type publicKeyLine struct {
	Key       string `json:"key"`
	PublicKey []byte `json:"publicKey,omitempty"`
	Deleted   bool   `json:"deleted,omitzero"`
}

// vouched returns the public key of a line, if it has that fingerprint.
func (l publicKeyLine) vouched(fingerprint string) (orgkey.Public, error) {
	public, err := orgkey.ParsePublic(l.PublicKey)
	if err != nil {
		return orgkey.Public{}, fmt.Errorf("the public key of key %s cannot be read: %w", l.Key, err)
	}
	if public.Fingerprint() != fingerprint {
		return orgkey.Public{}, fmt.Errorf("the public key of key %s is not the one that was created", l.Key)
	}
	return public, nil
}
