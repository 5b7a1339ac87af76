package enroll

import (
	"bytes"
	"encoding/base64"
	"fmt"
	"net/netip"
	"regexp"
	"strconv"
	"time"

	"github.com/orgkeys/orgkeys/internal/jsonbody"
	"github.com/orgkeys/orgkeys/internal/tpm"
)

// recipientForm is R, see envelope.Recipient.
var recipientForm = regexp.MustCompile(`^[0-9a-f]{64}$`)

type termsFields struct {
	Scope      *string `json:"scope"`
	Origin     *string `json:"origin"`
	Uses       *int    `json:"uses"`
	TTLSeconds *int64  `json:"ttlSeconds"`
	Bind       *struct {
		Recipient *string `json:"recipient"`
		EK        *string `json:"ek"`
		TPM       *bool   `json:"tpm"`
	} `json:"bind"`
	Approval *bool   `json:"approval"`
	IP       *string `json:"ip"`
	Note     *string `json:"note"`
}

// parseTerms reads the body of an enrollment's creation, of which everything is
// optional. What it refuses is an *InputError.
func parseTerms(body []byte) (terms, error) {
	var f termsFields
	if len(bytes.TrimSpace(body)) > 0 {
		if err := jsonbody.DecodeStrict(body, &f); err != nil {
			return terms{}, err
		}
	}
	t := terms{scope: ForNode, uses: 1, life: usualLife, origin: FromBackend, approval: f.Approval != nil && *f.Approval}
	for _, read := range []func(*terms) error{f.scope, f.origin, f.uses, f.life, f.bind, f.address, f.note} {
		if err := read(&t); err != nil {
			return terms{}, err
		}
	}
	return t, nil
}

func (f termsFields) scope(t *terms) error {
	if f.Scope == nil {
		return nil
	}
	t.scope = Scope(*f.Scope)
	if t.scope != ForNode && t.scope != ForOrganization {
		return &InputError{Field: "scope", Problem: `is neither "node" nor "organization"`}
	}
	return nil
}

func (f termsFields) origin(t *terms) error {
	if f.Origin == nil {
		return nil
	}
	t.origin = KeyOrigin(*f.Origin)
	if t.origin != FromBackend && t.origin != FromNode {
		return &InputError{Field: "origin", Problem: `is neither "backend" nor "node"`}
	}
	return nil
}

func (f termsFields) uses(t *terms) error {
	if f.Uses == nil {
		return nil
	}
	t.uses = *f.Uses
	switch {
	case t.uses < 1 || t.uses > MaxUses:
		return &InputError{Field: "uses", Problem: fmt.Sprintf("is not a number from 1 to %d", MaxUses)}
	case t.uses > 1 && t.scope == ForOrganization:
		return &InputError{Field: "uses", Problem: "is more than 1, which only node keys can have"}
	}
	return nil
}

func (f termsFields) life(t *terms) error {
	if f.TTLSeconds == nil {
		return nil
	}
	seconds := *f.TTLSeconds
	if seconds < int64(shortestLife/time.Second) || seconds > int64(longestLife/time.Second) {
		return &InputError{Field: "ttlSeconds", Problem: fmt.Sprintf("is not a number from %d to %d", int64(shortestLife/time.Second), int64(longestLife/time.Second))}
	}
	t.life = time.Duration(seconds) * time.Second
	return nil
}

func (f termsFields) bind(t *terms) error {
	if f.Bind == nil {
		return nil
	}
	if f.Bind.Recipient == nil && f.Bind.EK == nil && f.Bind.TPM == nil {
		return &InputError{Field: "bind", Problem: "names neither recipient nor ek nor tpm"}
	}
	if err := f.bindTPM(t); err != nil || f.Bind.Recipient == nil {
		return err
	}
	if t.tpm != "" {
		return &InputError{Field: "bind", Problem: "names both a recipient and a TPM"}
	}
	t.recipient = *f.Bind.Recipient
	switch {
	case !recipientForm.MatchString(t.recipient):
		return &InputError{Field: "bind.recipient", Problem: "is not 64 lower-case hex digits"}
	case t.uses > 1:
		return &InputError{Field: "uses", Problem: "is more than 1, and one recipient uses it once"}
	}
	return nil
}

// bindTPM reads the TPM that an enrollment is bound to.
func (f termsFields) bindTPM(t *terms) error {
	if f.Bind.TPM != nil {
		if !*f.Bind.TPM {
			return &InputError{Field: "bind.tpm", Problem: "is not true; leave it out if no TPM is needed"}
		}
		t.tpm = AnyAllowedTPM
	}
	if f.Bind.EK == nil {
		return nil
	}
	t.tpm = *f.Bind.EK
	switch {
	case !tpm.IsEK(t.tpm):
		return &InputError{Field: "bind.ek", Problem: `is not "sha256-" and 64 lower-case hex digits`}
	case t.uses > 1:
		return &InputError{Field: "uses", Problem: "is more than 1, and one TPM uses it once"}
	}
	return nil
}

func (f termsFields) address(t *terms) error {
	if f.IP == nil {
		return nil
	}
	address, err := netip.ParseAddr(*f.IP)
	switch {
	case err != nil || address.Zone() != "":
		return &InputError{Field: "ip", Problem: "is not an IP address without a zone"}
	case t.scope == ForOrganization || t.uses > 1:
		return &InputError{Field: "ip", Problem: "is for the one node of a node key"}
	}
	t.address = address.Unmap()
	return nil
}

func (f termsFields) note(t *terms) (err error) {
	t.note, err = jsonbody.Text("note", f.Note)
	return err
}

// detail is what the event of an enrollment's creation says of its terms. The
// note stays out: it may name people.
func (t terms) detail() map[string]string {
	detail := map[string]string{
		"scope": string(t.scope), "uses": strconv.Itoa(t.uses), "seconds": strconv.FormatInt(int64(t.life/time.Second), 10),
		"approval": strconv.FormatBool(t.approval),
	}
	if t.origin != FromBackend {
		detail["origin"] = string(t.origin)
	}
	if t.tpm != "" {
		detail["tpm"] = t.tpm
	}
	if t.recipient != "" {
		detail["recipient"] = t.recipient
	}
	if t.address.IsValid() {
		detail["ip"] = t.address.String()
	}
	return detail
}

// claim is a node's request, checked but not verified.
type claim struct {
	recipient Recipient // or the node's own key
	mac       []byte
	signature []byte // by the node's own key; nil where the back end makes it
	tpm       *tpmClaim
}

// tpmClaim is what a node says of the TPM that its key is in.
type tpmClaim struct {
	ek     tpm.EK
	public []byte // TPMT_PUBLIC
	proof  []byte // nil: it asks for a challenge
}

type tpmFields struct {
	EK     *string `json:"ek"`
	Public *string `json:"public"`
}

func parseClaim(body []byte) (claim, error) {
	var f struct {
		Recipient *string    `json:"recipient"`
		PublicKey *string    `json:"publicKey"`
		Signature *string    `json:"signature"`
		MAC       *string    `json:"mac"`
		TPM       *tpmFields `json:"tpm"`
		Proof     *string    `json:"proof"`
	}
	if err := jsonbody.Decode(body, &f); err != nil {
		return claim{}, err
	}
	c, err := parseClaimed(f.Recipient, f.PublicKey, f.TPM != nil)
	if err != nil {
		return claim{}, err
	}
	if c.mac, err = decode("mac", f.MAC); err != nil {
		return claim{}, err
	}
	if c.recipient.Origin == FromNode {
		if c.signature, err = decode("signature", f.Signature); err != nil {
			return claim{}, err
		}
	}
	if f.TPM == nil {
		return c, nil
	}
	c.tpm, err = parseTPM(*f.TPM, f.Proof)
	return c, err
}

// parseClaimed reads the key that a claim is about.
func parseClaimed(recipient, publicKey *string, inTPM bool) (c claim, err error) {
	switch {
	case recipient != nil && publicKey != nil:
		err = &InputError{Field: "publicKey", Problem: "and recipient exclude each other"}
	case publicKey != nil:
		c.recipient, err = parseOwnKey(*publicKey)
	case recipient == nil:
		err = &InputError{Field: "recipient", Problem: "is required"}
	case inTPM:
		c.recipient, err = parseInTPM(*recipient)
	default:
		c.recipient, err = ParseRecipient(*recipient)
	}
	return c, err
}

// parseTPM reads what a claim says of a TPM. Its public area is judged later,
// when the asker is known.
func parseTPM(f tpmFields, proof *string) (*tpmClaim, error) {
	if f.EK == nil {
		return nil, &InputError{Field: "tpm.ek", Problem: "is required"}
	}
	ek, err := tpm.ReadEK(*f.EK)
	if err != nil {
		return nil, &InputError{Field: "tpm.ek", Problem: err.Error()}
	}
	c := &tpmClaim{ek: ek}
	if c.public, err = decode("tpm.public", f.Public); err != nil {
		return nil, err
	}
	if proof != nil {
		c.proof, err = decode("proof", proof)
	}
	return c, err
}

// receipt is what the holder of a delivered key sends, checked but not verified.
type receipt struct {
	recipient string
	signature []byte
}

func parseReceipt(body []byte) (receipt, error) {
	var f struct {
		Recipient *string `json:"recipient"`
		Signature *string `json:"signature"`
	}
	if err := jsonbody.Decode(body, &f); err != nil {
		return receipt{}, err
	}
	if f.Recipient == nil || !recipientForm.MatchString(*f.Recipient) {
		return receipt{}, &InputError{Field: "recipient", Problem: "is not 64 lower-case hex digits"}
	}
	signature, err := decode("signature", f.Signature)
	return receipt{*f.Recipient, signature}, err
}

func parseApproval(body []byte) (string, error) {
	var f struct {
		Recipient *string `json:"recipient"`
	}
	if err := jsonbody.Decode(body, &f); err != nil {
		return "", err
	}
	if f.Recipient == nil || !recipientForm.MatchString(*f.Recipient) {
		return "", &InputError{Field: "recipient", Problem: "is not 64 lower-case hex digits"}
	}
	return *f.Recipient, nil
}

// maxBase64 is the longest MAC or signature, in characters: RSA-8192's.
const maxBase64 = 1368

// decode reads base64 with padding (RFC 4648, section 4).
func decode(field string, text *string) ([]byte, error) {
	if text == nil || *text == "" {
		return nil, &InputError{Field: field, Problem: "is required"}
	}
	if len(*text) > maxBase64 {
		return nil, &InputError{Field: field, Problem: "is too long"}
	}
	// The decoder would skip over line breaks.
	if bytes.ContainsAny([]byte(*text), "\r\n") {
		return nil, &InputError{Field: field, Problem: "has a line break in it"}
	}
	decoded, err := base64.StdEncoding.Strict().DecodeString(*text)
	if err != nil {
		return nil, &InputError{Field: field, Problem: "is not base64 with padding"}
	}
	return decoded, nil
}

// parseOwn reads an administrator's request for a sealed key.
func parseOwn(body []byte) (Recipient, error) {
	var f struct {
		Recipient *string `json:"recipient"`
	}
	if err := jsonbody.Decode(body, &f); err != nil {
		return Recipient{}, err
	}
	if f.Recipient == nil {
		return Recipient{}, &InputError{Field: "recipient", Problem: "is required"}
	}
	return ParseRecipient(*f.Recipient)
}

// parseAdded reads an administrator's request to add a key that they made.
func parseAdded(body []byte) (Recipient, []byte, error) {
	var f struct {
		PublicKey *string `json:"publicKey"`
		Signature *string `json:"signature"`
	}
	if err := jsonbody.Decode(body, &f); err != nil {
		return Recipient{}, nil, err
	}
	if f.PublicKey == nil {
		return Recipient{}, nil, &InputError{Field: "publicKey", Problem: "is required"}
	}
	key, err := parseOwnKey(*f.PublicKey)
	if err != nil {
		return Recipient{}, nil, err
	}
	signature, err := decode("signature", f.Signature)
	return key, signature, err
}

// parseNote reads the body of a device's permission, of which everything is optional.
func parseNote(body []byte) (string, error) {
	var f struct {
		Note *string `json:"note"`
	}
	if len(bytes.TrimSpace(body)) > 0 {
		if err := jsonbody.DecodeStrict(body, &f); err != nil {
			return "", err
		}
	}
	return jsonbody.Text("note", f.Note)
}
