package main_test

import (
	"bytes"
	"context"
	"crypto"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	mathrand "math/rand/v2"
	"net"
	"net/http"
	"strings"
	"testing"

	"github.com/google/go-tpm/tpm2"

	"github.com/orgkeys/orgkeys/client"
	"github.com/orgkeys/orgkeys/internal/e2e/harness"
	"github.com/orgkeys/orgkeys/internal/envelope"
)

// Whoever has a token gets nothing but a clear refusal for what is no TPM's.
func TestPromise9_HostileClaimsOfTPMs(t *testing.T) {
	t.Parallel()
	s := harness.Start(t)
	org := harness.Org()
	m := mint(t, s, org, `{"origin":"node","bind":{"tpm":true}}`)
	token, err := envelope.ParseToken([]byte(m.Token))
	if err != nil {
		t.Fatal(err)
	}
	key, err := client.NewOwnKey()
	if err != nil {
		t.Fatal(err)
	}
	recipient, err := client.RecipientID(&key.PublicKey)
	if err != nil {
		t.Fatal(err)
	}
	digest := sha256.Sum256(envelope.ClaimText(token.ID, recipient))
	signature, err := rsa.SignPKCS1v15(nil, key, crypto.SHA256, digest[:])
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.MarshalPKIXPublicKey(&key.PublicKey)
	if err != nil {
		t.Fatal(err)
	}
	b64 := base64.StdEncoding.EncodeToString
	text, area := string(pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der})), areaOf(&key.PublicKey, 0, func(*tpm2.TPMTPublic) {})
	// Refusals are limited by address, and each of these is to be looked at.
	var sent int
	s.HTTP = &http.Client{Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, network, address string) (net.Conn, error) {
		sent++
		from := &net.TCPAddr{IP: net.IPv4(127, 19, byte(sent>>8), byte(sent))}
		return (&net.Dialer{LocalAddr: from}).DialContext(ctx, network, address)
	}}}
	claim := func(what string, change func(map[string]any)) {
		t.Helper()
		body := map[string]any{
			"publicKey": text, "signature": b64(signature),
			"mac": b64(envelope.ClaimMAC(token.K, token.ID, recipient)), "tpm": map[string]any{"ek": text, "public": b64(area)},
		}
		change(body)
		encoded, err := json.Marshal(body)
		if err != nil {
			t.Fatal(err)
		}
		resp := s.Do(t, harness.Request{Method: "POST", Path: "/enroll/" + m.ID, Header: inJSON, Body: encoded})
		if resp.Status != 400 && resp.Status != 403 && resp.Status != 409 {
			t.Errorf("%s: %d %s", what, resp.Status, resp.Body)
		}
	}
	for range 3 {
		claim("a TPM that nobody allows", func(map[string]any) {})
	}
	// As often as a thief asks, one event says so.
	for kind, want := range map[string]int{"enrollment.conflict": 1, "request.failed": 0} {
		page := s.Do(t, harness.Request{Method: "GET", Path: "/organization/" + org + "/event?type=" + kind, Token: s.Token(t, org, "OWNER")})
		var list struct{ Data []json.RawMessage }
		if err := json.Unmarshal(page.Body, &list); err != nil || len(list.Data) != want {
			t.Errorf("%d events %s, want %d: %s %v", len(list.Data), kind, want, page.Body, err)
		}
	}
	for what, value := range map[string]any{
		"nothing": nil, "a list": []int{1}, "a text": "x", "an empty object": map[string]any{}, "a number for an EK": map[string]any{"ek": 1, "public": b64(area)},
		"no EK": map[string]any{"ek": "", "public": b64(area)}, "a long EK": map[string]any{"ek": strings.Repeat("x", 40<<10), "public": b64(area)},
		"no area": map[string]any{"ek": text}, "an empty area": map[string]any{"ek": text, "public": ""}, "no base64": map[string]any{"ek": text, "public": "!"},
		"a long area": map[string]any{"ek": text, "public": b64(make([]byte, 1020))}, "bytes behind": map[string]any{"ek": text, "public": b64(append(bytes.Clone(area), 0))},
	} {
		claim(what, func(body map[string]any) { body["tpm"] = value })
	}
	for what, value := range map[string]any{"a number": 1, "nothing in it": "", "no base64": "!", "too long": strings.Repeat("A", 4096), "a guess": b64(make([]byte, 32))} {
		claim("as a proof "+what, func(body map[string]any) { body["proof"] = value })
	}
	claim("both forms", func(body map[string]any) { body["recipient"] = text })
	claim("a recipient", func(body map[string]any) { body["recipient"] = text; delete(body, "publicKey") })
	random := mathrand.New(mathrand.NewPCG(1, 2))
	for range 200 {
		changed := bytes.Clone(area)
		for range 1 + random.IntN(4) {
			changed[random.IntN(len(changed))] = byte(random.IntN(256))
		}
		changed = changed[:len(changed)-random.IntN(2)*random.IntN(len(changed))]
		claim("a changed area", func(body map[string]any) { body["tpm"] = map[string]any{"ek": text, "public": b64(changed)} })
	}
	for _, ek := range []string{"%00", "sha256-" + strings.Repeat("A", 64), strings.Repeat("x", 4000), "..%2f..", "sha256-"} {
		for _, method := range []string{"PUT", "GET", "DELETE"} {
			resp := s.Do(t, harness.Request{Method: method, Path: "/organization/" + org + "/device/" + ek, Token: s.Token(t, org, "OWNER")})
			if resp.Status != 400 && resp.Status != 404 {
				t.Errorf("%s %.40s: %d %s", method, ek, resp.Status, resp.Body)
			}
		}
	}
}
