package api

import (
	"strings"
	"testing"
)

// The contract's Ruby sample, as rest-client puts it on the wire.
const rubyForm = "params&headers[Accept]=application%2Fx-pem-file&headers[Authorization]=Bearer+" + token

const formType = "application/x-www-form-urlencoded"

func TestTheRubySamplesFormIsAnAuthorization(t *testing.T) {
	b := newBench(t, nil)
	a := b.send("POST", b.url+"/organization/acme/key", []byte(rubyForm), "Authorization", "", "Content-Type", formType, "Accept", "*/*")
	if a.StatusCode != 200 || !strings.HasPrefix(string(a.body), "-----BEGIN RSA PRIVATE KEY-----") {
		t.Errorf("%d %.80s", a.StatusCode, a.body)
	}
}

func TestAFormIsNoAuthorizationAnywhereElse(t *testing.T) {
	b := newBench(t, nil)
	for name, c := range map[string]struct {
		method, path, form string
		headers            []string
		status             int
	}{
		"another method":                   {"DELETE", "/organization/acme/key", rubyForm, []string{"Authorization", "", "Content-Type", formType}, 401},
		"another route":                    {"PUT", "/organization/acme/secret/env_s3", rubyForm, []string{"Authorization", "", "Content-Type", formType}, 401},
		"not a form":                       {"POST", "/organization/acme/key", rubyForm, []string{"Authorization", "", "Content-Type", "text/plain"}, 401},
		"no type":                          {"POST", "/organization/acme/key", rubyForm, []string{"Authorization", "", "Content-Type", ""}, 401},
		"a header that is wrong":           {"POST", "/organization/acme/key", rubyForm, []string{"Authorization", "Bearer other", "Content-Type", formType}, 401},
		"two of them":                      {"POST", "/organization/acme/key", rubyForm + "&headers[Authorization]=Bearer+x", []string{"Authorization", "", "Content-Type", formType}, 401},
		"a wrong token":                    {"POST", "/organization/acme/key", "headers[Authorization]=Bearer+x", []string{"Authorization", "", "Content-Type", formType}, 401},
		"longer than any token":            {"POST", "/organization/acme/key", rubyForm + "&x=" + strings.Repeat("x", maxForm), []string{"Authorization", "", "Content-Type", formType}, 401},
		"a broken form":                    {"POST", "/organization/acme/key", "%zz&" + rubyForm, []string{"Authorization", "", "Content-Type", formType}, 401},
		"a form beside a header is a body": {"POST", "/organization/acme/key", "headers[Authorization]=Bearer+x", []string{"Content-Type", formType}, 200},
	} {
		t.Run(name, func(t *testing.T) {
			a := b.send(c.method, b.url+c.path, []byte(c.form), c.headers...)
			if a.StatusCode != c.status {
				t.Errorf("%d %.80s, want %d", a.StatusCode, a.body, c.status)
			}
		})
	}
}
