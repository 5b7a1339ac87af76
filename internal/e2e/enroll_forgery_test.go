package e2e

import (
	"bytes"
	"crypto/rand"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	mathrand "math/rand/v2"
	"net"
	"net/http"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"

	"github.com/orgkeys/orgkeys/internal/e2e/harness"
	"github.com/orgkeys/orgkeys/internal/envelope"
)

// addresses are loopback addresses of their own: failures are limited by address.
type addresses struct{ n int }

func (a *addresses) next() *http.Client {
	a.n++
	return from(net.IPv4(127, 13, byte(a.n>>8), byte(1+a.n%250)))
}

// claimRaw sends a claim and returns status and body.
func claimRaw(t *testing.T, by *http.Client, s *harness.Server, id string, body []byte) (int, string) {
	t.Helper()
	defer by.CloseIdleConnections()
	resp, err := by.Post(s.API+"/enroll/"+id, "application/json", bytes.NewReader(body))
	must(t, err)
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	must(t, err)
	return resp.StatusCode, string(text)
}

// TestPromise13_WhatWasCapturedInsideTLSIsWorthNothing: whoever reads and writes
// between node and server has a whole request, and neither another recipient nor
// another enrollment gets anything with it, nor does any other bit of it.
func TestPromise13_WhatWasCapturedInsideTLSIsWorthNothing(t *testing.T) {
	t.Parallel()
	s := harness.Start(t)
	org := harness.Org()
	m, other := mint(t, s, org, `{}`), mint(t, s, org, `{"uses":3}`)
	node, attacker := newRecipient(t), newRecipient(t)
	captured := claimRequest(t, m, node)
	var fields struct {
		Recipient string `json:"recipient"`
		MAC       []byte `json:"mac"`
	}
	mustUnmarshal(t, captured, &fields)
	body := func(recipient string, mac []byte) []byte {
		text, err := json.Marshal(map[string]any{"recipient": recipient, "mac": mac})
		must(t, err)
		return text
	}
	flips, bits := 24, mathrand.New(mathrand.NewPCG(*seed, 13))
	if long() {
		flips = 1000
	}
	from := &addresses{}
	refused := func(what, id string, request []byte, statuses ...int) {
		t.Helper()
		status, answer := claimRaw(t, from.next(), s, id, request)
		if !slices.Contains(statuses, status) || strings.Contains(answer, "sealed") || strings.Contains(answer, "keyId") {
			t.Errorf("%s: %d %s", what, status, answer)
		}
	}
	refused("another recipient with the captured MAC", m.ID, body(publicPEM(t, attacker), fields.MAC), 401)
	refused("the captured request for another enrollment", other.ID, captured, 401)
	refused("a MAC without K", m.ID, body(publicPEM(t, attacker), envelope.ClaimMAC(nil, m.ID, "")), 401)
	refused("an empty MAC", m.ID, body(publicPEM(t, attacker), nil), 400)
	refused("a MAC cut short", m.ID, body(fields.Recipient, fields.MAC[:31]), 401)
	refused("a MAC with more behind it", m.ID, body(fields.Recipient, append(slices.Clone(fields.MAC), 0)), 401)
	for range flips {
		mac := slices.Clone(fields.MAC)
		bit := bits.IntN(8 * len(mac))
		mac[bit/8] ^= 1 << (bit % 8)
		refused(fmt.Sprintf("bit %d of the MAC", bit), m.ID, body(fields.Recipient, mac), 401)

		der := publicDER(t, node)
		bit = bits.IntN(8 * len(der))
		der[bit/8] ^= 1 << (bit % 8)
		text := "-----BEGIN PUBLIC KEY-----\n" + base64.StdEncoding.EncodeToString(der) + "\n-----END PUBLIC KEY-----\n"
		refused(fmt.Sprintf("bit %d of the recipient", bit), m.ID, body(text, fields.MAC), 400, 401)

		id := []byte(m.ID)
		at := bits.IntN(len(id))
		id[at] ^= 1 << bits.IntN(3) // another digit, or no UUID
		if regexp.MustCompile(`^[0-9a-z-]+$`).Match(id) {
			refused(fmt.Sprintf("character %d of the enrollment's ID", at), string(id), captured, 401)
		}
	}
	for _, id := range []string{m.ID, other.ID} {
		if e := show(t, s, org, id); len(e.Claims) != 0 || e.Conflicts != 0 {
			t.Errorf("%d claims and %d conflicts by whoever has no K", len(e.Claims), e.Conflicts)
		}
	}
	// The captured request itself serves nobody but the node: it gets what only the
	// node can open.
	status, answer := claimRaw(t, from.next(), s, m.ID, captured)
	if status != http.StatusOK {
		t.Fatalf("the request as it was captured: %d %s", status, answer)
	}
	again := s.Do(t, asks(m, captured))
	var one, two struct{ SHA256 string }
	mustUnmarshal(t, []byte(answer), &one)
	mustUnmarshal(t, again.Body, &two)
	if one.SHA256 == "" || one != two {
		t.Errorf("replayed, the request got other bytes")
	}
	// A receipt without the delivered key is none.
	refusedReceipt := from.next()
	receipt := fmt.Sprintf(`{"recipient":"%s","signature":"%s"}`, recipientID(t, captured), base64.StdEncoding.EncodeToString(make([]byte, 256)))
	if status, answer := claimRaw(t, refusedReceipt, s, m.ID+"/receipt", []byte(receipt)); status != 400 || !strings.Contains(answer, "bad_signature") {
		t.Errorf("a forged receipt: %d %s", status, answer)
	}
	fetch(t, enrollment(t, s.API, m.Token, node, 20*time.Second))
}

func recipientID(t *testing.T, request []byte) string {
	t.Helper()
	var fields struct{ Recipient string }
	mustUnmarshal(t, request, &fields)
	return envelope.Digest(pemDER(t, fields.Recipient))
}

// TestPromise13_AnUnknownEnrollmentAnswersLikeAWrongMAC: byte for byte but for
// the request's ID, and as late.
func TestPromise13_AnUnknownEnrollmentAnswersLikeAWrongMAC(t *testing.T) {
	s := harness.Start(t)
	m := mint(t, s, harness.Org(), `{}`)
	request := claimRequest(t, m, newRecipient(t))
	wrong := make([]byte, 32)
	rand.Read(wrong)
	var fields map[string]any
	mustUnmarshal(t, request, &fields)
	fields["mac"] = wrong
	request, err := json.Marshal(fields)
	must(t, err)
	tries := 25
	if long() {
		tries = 500
	}
	from := &addresses{}
	ids := regexp.MustCompile(`"requestId":"[^"]*"`)
	answers := map[string]bool{}
	var took [2][]time.Duration
	for range tries {
		for i, id := range []string{m.ID, uuid.NewString()} {
			by := from.next()
			begun := time.Now()
			status, body := claimRaw(t, by, s, id, request)
			took[i] = append(took[i], time.Since(begun))
			answers[fmt.Sprint(status, ids.ReplaceAllString(body, ""))] = true
		}
	}
	if len(answers) != 1 {
		t.Errorf("the answers differ: %v", answers)
	}
	for i := range took {
		slices.Sort(took[i])
	}
	known, unknown := took[0][tries/2], took[1][tries/2]
	t.Logf("medians of %d: wrong MAC %s, unknown enrollment %s", tries, known, unknown)
	if d := (known - unknown).Abs(); d > unknown/10 {
		t.Errorf("a wrong MAC takes %s and an unknown enrollment %s", known, unknown)
	}
}

func pemDER(t *testing.T, text string) []byte {
	t.Helper()
	block, _ := pem.Decode([]byte(text))
	if block == nil {
		t.Fatalf("not PEM: %q", text)
	}
	return block.Bytes
}
