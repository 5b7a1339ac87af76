package openapitest

import (
	"net/http"
	"slices"
	"strings"
	"testing"

	"go.yaml.in/yaml/v3"

	"github.com/orgkeys/orgkeys/internal/api"
)

const (
	id       = "5b6f0c1e-8f0e-4c55-9d6d-0f7b6f9f4f7a"
	pemText  = "-----BEGIN RSA PRIVATE KEY-----\nMIIE\n-----END RSA PRIVATE KEY-----\n"
	listPath = "/organization/acme/key"
)

// TestCheckTellsRightFromWrong keeps the checker itself honest: a checker
// that accepts everything would pass every other test.
func TestCheckTellsRightFromWrong(t *testing.T) {
	key := `{"id":"` + id + `","orgId":"acme","publicKey":"-----BEGIN PUBLIC KEY-----\nx","fingerprint":"` + strings.Repeat("a", 43) + `","createdAt":"2026-03-01T12:00:00.000Z","scope":"organization","nodeKeys":[]`
	errorBody := `{"success":false,"message":"m","errorCode":"internal","requestId":"r-1"}`
	released := map[string]string{
		"Content-Type": "application/x-pem-file", "Cache-Control": "no-store", "Vary": "Accept", "X-Key-Id": id,
		"X-Key-Fingerprint": strings.Repeat("a", 43), "Location": listPath + "/" + id,
		"Content-Disposition": `attachment; filename="private_key.pem"`,
	}
	with := func(h map[string]string, pairs ...string) map[string]string {
		all := map[string]string{}
		for k, v := range h {
			all[k] = v
		}
		for i := 0; i < len(pairs); i += 2 {
			all[pairs[i]] = pairs[i+1]
		}
		return all
	}
	jsonHeader := map[string]string{"Content-Type": "application/json", "Cache-Control": "no-store"}
	for _, c := range []struct {
		name   string
		method string
		path   string
		status int
		header map[string]string
		body   string
		fine   bool
	}{
		{"a list", "GET", listPath, 200, jsonHeader, `{"success":true,"message":"m","data":[` + key + `}]}`, true},
		{"an empty list", "GET", listPath, 200, jsonHeader, `{"success":true,"message":"m","data":[]}`, true},
		{"a list that is null", "GET", listPath, 200, jsonHeader, `{"success":true,"message":"m","data":null}`, false},
		{"a key with an undocumented field", "GET", listPath, 200, jsonHeader, `{"success":true,"message":"m","data":[` + key + `,"privateKey":"x"}]}`, false},
		{"a key with a bad date", "GET", listPath, 200, jsonHeader, strings.Replace(`{"success":true,"message":"m","data":[`+key+`}]}`, "2026-03-01T12", "2026-03-01 12", 1), false},
		{"a list that may be cached", "GET", listPath, 200, with(jsonHeader, "Cache-Control", "private"), `{"success":true,"message":"m","data":[]}`, false},
		{"an undocumented header", "GET", listPath, 200, with(jsonHeader, "X-Internal", "10.0.0.1"), `{"success":true,"message":"m","data":[]}`, false},
		{"an undocumented status", "GET", listPath, 418, jsonHeader, errorBody, false},
		{"an error", "GET", listPath, 500, jsonHeader, errorBody, true},
		{"an error code nobody documented", "GET", listPath, 500, jsonHeader, strings.Replace(errorBody, "internal", "oops", 1), false},
		{"an error without its request", "GET", listPath, 500, jsonHeader, `{"success":false,"message":"m","errorCode":"internal"}`, false},
		{"an error that claims success", "GET", listPath, 500, jsonHeader, strings.Replace(errorBody, "false", "true", 1), false},
		{"503 without Retry-After", "GET", listPath, 503, jsonHeader, errorBody, false},
		{"503 with Retry-After", "GET", listPath, 503, with(jsonHeader, "Retry-After", "5"), errorBody, true},
		{"a private key as PEM", "POST", listPath, 200, released, pemText, true},
		{"a private key as JSON", "POST", listPath, 200, with(released, "Content-Type", "application/json"), `"-----BEGIN RSA PRIVATE KEY-----\nMIIE\n-----END RSA PRIVATE KEY-----\n"`, true},
		{"a private key that is sealed", "POST", listPath, 200, with(released, "Content-Type", "application/json"), `{"org":"acme","origin":"o","keyId":"` + id + `","scope":"organization","algorithm":"rsa-2048","fingerprint":"` + strings.Repeat("a", 43) +
			`","recipient":"` + strings.Repeat("0", 64) + `","sealed":{"alg":"RSA_AES_KEY_WRAP_SHA_256","value":"eA=="},"sha256":"` + strings.Repeat("0", 64) + `","event":"{}","deliverUntil":"2026-03-01T12:00:00.000Z"}`, true},
		{"a private key that is sealed by nothing known", "POST", listPath, 200, with(released, "Content-Type", "application/json"), `{"org":"acme","sealed":{"alg":"none","value":"eA=="}}`, false},
		{"a private key as PKCS#8", "POST", listPath, 200, released, strings.ReplaceAll(pemText, "RSA PRIVATE", "PRIVATE"), false},
		{"a private key without its ID", "POST", listPath, 200, with(released, "X-Key-Id", ""), pemText, false},
		{"success for a malformed organization", "GET", "/organization/-x/key", 200, jsonHeader, `{"success":true,"message":"m","data":[]}`, false},
		{"no such path", "GET", "/nowhere", 404, jsonHeader, strings.Replace(errorBody, "internal", "not_found", 1), true},
		{"no such path, said badly", "GET", "/nowhere", 404, jsonHeader, `{"errorCode":"not_found"}`, false},
		{"success where nothing is documented", "GET", "/nowhere", 200, jsonHeader, `{}`, false},
		{"wrong method without Allow", "PUT", listPath, 405, jsonHeader, strings.Replace(errorBody, "internal", "method_not_allowed", 1), false},
		{"wrong method", "PUT", listPath, 405, with(jsonHeader, "Allow", "GET"), strings.Replace(errorBody, "internal", "method_not_allowed", 1), true},
	} {
		t.Run(c.name, func(t *testing.T) {
			req, err := http.NewRequest(c.method, "http://127.0.0.1:1"+c.path, nil)
			if err != nil {
				t.Fatal(err)
			}
			req.Header.Set("Authorization", "Bearer x")
			resp := &http.Response{StatusCode: c.status, Header: http.Header{}}
			for k, v := range c.header {
				if v != "" {
					resp.Header.Set(k, v)
				}
			}
			resp.Header.Set("X-Request-Id", "r-1")
			resp.Header.Set("X-Content-Type-Options", "nosniff")
			err = check(req, nil, resp, []byte(c.body))
			if (err == nil) != c.fine {
				t.Errorf("allowed: %t, expected %t; %v", err == nil, c.fine, err)
			}
		})
	}
}

// TestSecuritySchemesAreDefined: the document's own validation does not look.
func TestSecuritySchemesAreDefined(t *testing.T) {
	d, err := load()
	if err != nil {
		t.Fatal(err)
	}
	required := slices.Clone(d.model.Security)
	for _, item := range d.model.Paths.PathItems.FromOldest() {
		for _, operation := range item.GetOperations().FromOldest() {
			required = append(required, operation.Security...)
		}
	}
	named := 0
	for _, r := range required {
		for scheme := range r.Requirements.FromOldest() {
			named++
			if _, ok := d.model.Components.SecuritySchemes.Get(scheme); !ok {
				t.Errorf("security scheme %q is named and not defined", scheme)
			}
		}
	}
	if named == 0 {
		t.Error("no security scheme is named")
	}
}

// TestEveryComponentIsUsed: what no operation leads to says nothing to programs that
// are made from the document, and was meant for one that lacks it.
func TestEveryComponentIsUsed(t *testing.T) {
	var document map[string]any
	if err := yaml.Unmarshal(api.Document, &document); err != nil {
		t.Fatal(err)
	}
	components, _ := document["components"].(map[string]any)
	used := map[string]bool{}
	var follow func(any)
	follow = func(value any) {
		switch v := value.(type) {
		case []any:
			for _, one := range v {
				follow(one)
			}
		case map[string]any:
			for _, one := range v {
				follow(one)
			}
			name, _ := v["$ref"].(string)
			kind, name, ok := strings.Cut(strings.TrimPrefix(name, "#/components/"), "/")
			if !ok || used[kind+"/"+name] {
				return
			}
			used[kind+"/"+name] = true
			all, _ := components[kind].(map[string]any)
			follow(all[name])
		}
	}
	follow(document["paths"])
	if len(used) == 0 {
		t.Error("no operation uses a component")
	}
	for kind, all := range components {
		if kind == "securitySchemes" { // which are named without a reference
			continue
		}
		for name := range all.(map[string]any) {
			if !used[kind+"/"+name] {
				t.Errorf("no operation leads to %s/%s", kind, name)
			}
		}
	}
}
