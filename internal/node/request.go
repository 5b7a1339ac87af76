package node

import (
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"net/netip"
	"regexp"
	"strings"
	"time"

	"github.com/go-json-experiment/json/jsontext"

	"github.com/orgkeys/orgkeys/internal/jsonbody"
	"github.com/orgkeys/orgkeys/internal/org"
)

const (
	maxSignature = 1368 // base64 of an 8192-bit signature
	maxServices  = 1<<53 - 1
	maxProvider  = 64 // bytes of free text: whatever an operator called it
)

// keyForm is the one form in which key IDs are issued. PostgreSQL takes no text
// with U+0000 in it.
var keyForm = regexp.MustCompile(`^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$`)

type endpoint string

const (
	register   endpoint = "register"
	unregister endpoint = "unregister"
	fetch      endpoint = "secrets"
)

// request is a signed request, checked but not verified.
type request struct {
	endpoint  endpoint
	org       org.ID
	ip        string // as sent
	addr      netip.Addr
	region    string
	timestamp string // as sent
	time      time.Time
	signature []byte
	named     string // the ID of the key that signed, as the sender says; it only selects; empty: none that can be
	node      Node   // of register
}

type signedFields struct {
	IP        *string        `json:"ip"`
	Region    *string        `json:"region"`
	Timestamp jsontext.Value `json:"timestamp"`
	Signature *string        `json:"signature"`
	IDOrg     *string        `json:"id_org"`
	OrgID     *string        `json:"org_id"`
	KeyID     *string        `json:"key_id"`
}

type registerFields struct {
	signedFields
	Version      *string `json:"version"`
	Status       *string `json:"status"`
	Provider     *string `json:"provider"`
	URL          *string `json:"url"`
	NodeServices *int64  `json:"nodeServices"`
}

// parse reads a body. What it refuses is an *InputError.
func parse(e endpoint, body []byte) (request, error) {
	var f registerFields
	if e == register {
		if err := jsonbody.Decode(body, &f); err != nil {
			return request{}, err
		}
	} else if err := jsonbody.Decode(body, &f.signedFields); err != nil {
		return request{}, err
	}
	r, err := f.signedFields.check(e)
	if err != nil || e != register {
		return r, err
	}
	r.node, err = f.node(r)
	return r, err
}

func (f signedFields) check(e endpoint) (request, error) {
	r := request{endpoint: e}
	var err error
	if r.org, err = f.organization(); err != nil {
		return r, err
	}
	if r.ip, err = jsonbody.RequiredText("ip", f.IP); err != nil {
		return r, err
	}
	if r.addr, err = parseIP(r.ip); err != nil {
		return r, err
	}
	if r.region, err = f.region(e); err != nil {
		return r, err
	}
	if r.timestamp, r.time, err = timestampField(f.Timestamp); err != nil {
		return r, err
	}
	if f.KeyID != nil && keyForm.MatchString(*f.KeyID) { // another one is no key's
		r.named = *f.KeyID
	}
	r.signature, err = signatureField(f.Signature)
	return r, err
}

func (f signedFields) organization() (org.ID, error) {
	if f.IDOrg == nil && f.OrgID == nil {
		return "", &InputError{Field: "id_org", Problem: "is required"}
	}
	if f.IDOrg != nil && f.OrgID != nil && *f.IDOrg != *f.OrgID {
		return "", &InputError{Field: "id_org", Problem: "and org_id differ"}
	}
	text := f.IDOrg
	if text == nil {
		text = f.OrgID
	}
	id, err := org.Parse(*text)
	if err != nil {
		return "", &InputError{Field: "id_org", Problem: "is not an organization ID"}
	}
	return id, nil
}

// parseIP returns the address that identifies a node: one for all the ways to
// write it, IPv4 for an IPv4-mapped one.
func parseIP(text string) (netip.Addr, error) {
	addr, err := netip.ParseAddr(text)
	if err != nil {
		return netip.Addr{}, &InputError{Field: "ip", Problem: "is not an IP address"}
	}
	if addr.Zone() != "" {
		return netip.Addr{}, &InputError{Field: "ip", Problem: "has a zone"}
	}
	return addr.Unmap(), nil
}

func (f signedFields) region(e endpoint) (string, error) {
	if e == unregister && (f.Region == nil || *f.Region == "") {
		return "", nil
	}
	region, err := jsonbody.RequiredText("region", f.Region)
	if err == nil && strings.Contains(region, "|") {
		return "", &InputError{Field: "region", Problem: "has a | in it"}
	}
	return region, err
}

// timestampField returns the text that the signature covers, and its time.
func timestampField(v jsontext.Value) (string, time.Time, error) {
	text, t, err := jsonbody.Timestamp("timestamp", v)
	if err == nil && text == "" {
		err = &InputError{Field: "timestamp", Problem: "is required"}
	}
	return text, t, err
}

func signatureField(s *string) ([]byte, error) {
	if s == nil || *s == "" {
		return nil, &InputError{Field: "signature", Problem: "is required"}
	}
	if len(*s) > maxSignature {
		return nil, &InputError{Field: "signature", Problem: "is too long"}
	}
	// The decoder would skip over line breaks.
	if strings.ContainsAny(*s, "\r\n") {
		return nil, &InputError{Field: "signature", Problem: "has a line break in it"}
	}
	decoded, err := base64.StdEncoding.Strict().DecodeString(*s)
	if err != nil {
		return nil, &InputError{Field: "signature", Problem: "is not base64 with padding"}
	}
	return decoded, nil
}

func (f registerFields) node(r request) (Node, error) {
	n := Node{Org: r.org, IP: r.addr, Region: r.region}
	var err error
	if n.Version, err = jsonbody.RequiredText("version", f.Version); err != nil {
		return Node{}, err
	}
	if n.Status, err = jsonbody.RequiredText("status", f.Status); err != nil {
		return Node{}, err
	}
	if n.URL, err = jsonbody.Text("url", f.URL); err != nil {
		return Node{}, err
	}
	if f.Provider != nil && len(*f.Provider) > maxProvider {
		return Node{}, &InputError{Field: "provider", Problem: "is longer than 64 bytes"}
	}
	if n.Provider, err = jsonbody.Text("provider", f.Provider); err != nil {
		return Node{}, err
	}
	if f.NodeServices != nil {
		n.Services = *f.NodeServices
		if n.Services < -maxServices || n.Services > maxServices {
			return Node{}, &InputError{Field: "nodeServices", Problem: "is out of range"}
		}
	}
	return n, nil
}

// messages returns every line that the request's signature may be over.
func (r request) messages() []string {
	lines := []string{r.ip + "|" + r.region + "|" + r.timestamp}
	if r.endpoint == unregister && r.region == "" {
		lines = append(lines, r.ip+"|"+r.timestamp)
	}
	for _, line := range lines {
		lines = append(lines, line+"|"+string(r.org))
	}
	return lines
}

// presentable returns until when line, which was signed for r, could be
// presented as fresh, before any tolerance. That is r's timestamp, but
// "ip|x|y" is read in two ways, x and y as region and timestamp, or, by
// unregister, as timestamp and organization, if y is the organization's ID and
// happens to be a number that reads as a timestamp.
func (r request) presentable(line string) time.Time {
	latest := r.time
	fields := strings.Split(line, "|")
	if len(fields) != 3 || fields[2] != string(r.org) {
		return latest
	}
	for _, text := range fields[1:] {
		if t, ok := jsonbody.ParseTimestamp(text); ok && t.After(latest) {
			latest = t
		}
	}
	return latest
}

// digest identifies the request by its endpoint and decoded fields. Each text
// goes in with its length, so that no two requests have the same bytes.
func (r request) digest() [32]byte {
	h := sha256.New()
	write := func(text string) {
		h.Write(binary.BigEndian.AppendUint64(nil, uint64(len(text))))
		h.Write([]byte(text))
	}
	n := r.node
	for _, text := range []string{
		string(r.endpoint), string(r.org), r.ip, r.region, r.timestamp, string(r.signature),
		n.Version, n.Status, n.Provider, n.URL,
	} {
		write(text)
	}
	h.Write(binary.BigEndian.AppendUint64(nil, uint64(n.Services)))
	return [32]byte(h.Sum(nil))
}
