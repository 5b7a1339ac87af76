package e2e

import (
	"encoding/json"
	"net/http"
	"strings"
	"testing"

	"github.com/orgkeys/orgkeys/internal/e2e/harness"
)

const (
	asPEM  = "application/x-pem-file"
	asJSON = "application/json"
)

// TestFormOfThePrivateKey is the contract on the form of the private key, by the clients
// that send such headers.
func TestFormOfThePrivateKey(t *testing.T) {
	t.Parallel()
	s := harness.Start(t, harness.Set("ORGKEYS_MAX", "20"))
	org := harness.Org()
	for _, c := range []struct {
		name   string
		accept []string
		fetch  string // Sec-Fetch-Mode
		form   string
	}{
		{"the documented samples", []string{asPEM}, "", asPEM},
		{"curl", []string{"*/*"}, "", asPEM},
		{"no Accept at all", nil, "", asPEM},
		{"a JSON client", []string{asJSON}, "", asJSON},
		{"fetch that set no Accept", []string{"*/*"}, "cors", asJSON},
		{"fetch of Node.js", []string{"*/*"}, "cors", asJSON},
		{"the JavaScript sample, a fetch that asks for PEM", []string{asPEM}, "cors", asPEM},
		{"PEM preferred by q", []string{"application/json;q=0.4, application/x-pem-file;q=0.5"}, "", asPEM},
		{"JSON preferred by q", []string{"application/json, application/x-pem-file;q=0.5"}, "", asJSON},
		{"JSON named beside a wildcard of lower weight", []string{"application/json, */*;q=0.1"}, "", asJSON},
		{"PEM refused, anything else welcome", []string{"application/x-pem-file;q=0, */*"}, "", asJSON},
		{"media types are not case-sensitive", []string{"Application/X-PEM-File"}, "", asPEM},
		{"JSON with a parameter", []string{"application/json; charset=utf-8"}, "", asJSON},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			h := http.Header{"Accept": c.accept}
			if c.accept == nil {
				h = http.Header{}
			}
			if c.fetch != "" {
				h.Set("Sec-Fetch-Mode", c.fetch)
			}
			resp := s.Do(t, harness.Request{Method: "POST", Path: harness.KeyPath(org), Token: s.Token(t, org, "OWNER"), Header: h})
			if resp.Status != 200 {
				t.Fatalf("status %d, body %.300q", resp.Status, resp.Body)
			}
			if got := mediaType(resp); got != c.form {
				t.Fatalf("Content-Type is %q, want %q", got, c.form)
			}
			text := resp.Body
			if c.form == asJSON {
				var pem string
				if err := json.Unmarshal(resp.Body, &pem); err != nil {
					t.Fatalf("not one JSON string: %v", err)
				}
				text = []byte(pem)
			}
			key := harness.ParsePrivate(t, text)
			for name, want := range map[string]string{
				"Cache-Control": "no-store", "X-Key-Fingerprint": thumbprint(&key.PublicKey),
				"Location": harness.KeyPath(org) + "/" + resp.Header.Get("X-Key-Id"),
			} {
				if got := resp.Header.Get(name); got != want {
					t.Errorf("%s is %q, want %q", name, got, want)
				}
			}
		})
	}
}

func TestUnacceptableFormsAreRefusedBeforeAnythingIsGenerated(t *testing.T) {
	t.Parallel()
	s := harness.Start(t, harness.Set("ORGKEYS_MAX", "1"))
	org := harness.Org()
	for _, accept := range []string{
		"text/html", "application/pem", "image/*", "*/*;q=0", "application/json;q=0, application/x-pem-file;q=0",
		"application/xml;q=0.9, text/*",
	} {
		resp := s.Do(t, harness.Request{Method: "POST", Path: harness.KeyPath(org), Token: s.Token(t, org, "OWNER"), Header: http.Header{"Accept": {accept}}})
		if resp.Status != http.StatusNotAcceptable {
			t.Errorf("Accept %q: status %d", accept, resp.Status)
		}
	}
	if keys := s.List(t, org); len(keys) != 0 {
		t.Errorf("%d keys after 406", len(keys))
	}
	// The policy comes first: whoever may not ask is not told about forms.
	s.Do(t, harness.Request{Method: "POST", Path: harness.KeyPath(org), Token: s.Token(t, org, "BILLING"), Header: http.Header{"Accept": {"text/html"}}}).Want(t, 403, roleMessage)
	// And hostile ones never break anything.
	for _, accept := range []string{",,,,", ";;;", "a/b;q=abc", "*/*;q=9e999", "application/json;q=-1", "\x80\xff", "x/" + strings.Repeat("a", 8000)} {
		resp := s.Do(t, harness.Request{Method: "POST", Path: harness.KeyPath(org), Token: s.Token(t, org, "USER"), Header: http.Header{"Accept": {accept}}})
		if resp.Status >= 500 || resp.Status == 200 {
			t.Errorf("Accept %.40q: status %d", accept, resp.Status)
		}
	}
	s.Generate(t, org)
}

func mediaType(resp harness.Response) string {
	value, _, _ := strings.Cut(resp.Header.Get("Content-Type"), ";")
	return value
}
