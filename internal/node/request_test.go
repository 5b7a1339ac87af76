package node

import (
	"encoding/base64"
	"encoding/json"
	"errors"
	"strings"
	"testing"

	"github.com/orgkeys/orgkeys/internal/jsonbody"
)

var someSignature = base64.StdEncoding.EncodeToString(make([]byte, 256))

// body returns a valid registration with the named fields changed; a nil removes one.
func body(t testing.TB, changes map[string]any) []byte {
	t.Helper()
	fields := map[string]any{
		"ip": "192.0.2.7", "region": "eu-west-1", "timestamp": "1700000000", "signature": someSignature,
		"id_org": "acme", "version": "1.4.0", "status": "active",
	}
	for name, value := range changes {
		if value == nil {
			delete(fields, name)
		} else {
			fields[name] = value
		}
	}
	text, err := json.Marshal(fields)
	if err != nil {
		t.Fatal(err)
	}
	return text
}

// raw is JSON that goes into a body as it is.
func raw(text string) json.RawMessage { return json.RawMessage(text) }

func TestAcceptedRegistrations(t *testing.T) {
	for name, changes := range map[string]map[string]any{
		"as deployed scripts send it":    {"provider": "AWS", "status": "running"},
		"GCP":                            {"provider": "GCP"},
		"a provider in lower case":       {"provider": "aws"},
		"a provider that is a company":   {"provider": "OVHcloud (Gravelines 3), Größe M"},
		"a provider of 64 bytes":         {"provider": strings.Repeat("a", 64)},
		"a provider that is not named":   {"provider": ""},
		"every field":                    {"provider": "S3", "url": "https://n.example", "nodeServices": 7},
		"org_id":                         {"id_org": nil, "org_id": "acme"},
		"both organizations, the same":   {"org_id": "acme"},
		"both, one null":                 {"org_id": raw("null")},
		"unknown fields":                 {"x": []int{1}, "ID_ORG": 5},
		"seconds as a number":            {"timestamp": raw("1700000000")},
		"milliseconds as a number":       {"timestamp": raw("1700000000123")},
		"milliseconds as a string":       {"timestamp": "1700000000123"},
		"RFC 3339":                       {"timestamp": "2023-11-14T22:13:20Z"},
		"RFC 3339, offset and fractions": {"timestamp": "2023-11-14T23:13:20.123456+01:00"},
		"status in capitals":             {"status": "ONLINE"},
		"text of other scripts":          {"region": "Zürich 東京"},
		"256 bytes":                      {"region": strings.Repeat("r", 256)},
		"optional fields null":           {"provider": raw("null"), "url": raw("null"), "nodeServices": raw("null")},
	} {
		if _, err := parse(register, body(t, changes)); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestRefusedRegistrations(t *testing.T) {
	const (
		required  = "is required"
		wrongType = "is of the wrong type"
		control   = "has a control character in it"
		long      = "is longer than 256 bytes"
		stampForm = "is none of: seconds since 1970 in 10 digits, milliseconds in 13, RFC 3339 with an offset"
		noIP      = "is not an IP address"
	)
	type refusal struct {
		name    string
		changes map[string]any
		want    InputError
	}
	cases := []refusal{
		{"no organization", map[string]any{"id_org": nil}, InputError{Field: "id_org", Problem: required}},
		{"organizations differ", map[string]any{"org_id": "other"}, InputError{Field: "id_org", Problem: "and org_id differ"}},
		{"organizations differ, one empty", map[string]any{"org_id": ""}, InputError{Field: "id_org", Problem: "and org_id differ"}},
		{"malformed organization", map[string]any{"id_org": "a b"}, InputError{Field: "id_org", Problem: "is not an organization ID"}},
		{"long provider", map[string]any{"provider": strings.Repeat("a", 65)}, InputError{Field: "provider", Problem: "is longer than 64 bytes"}},
		{"longer provider", map[string]any{"provider": strings.Repeat("a", 300)}, InputError{Field: "provider", Problem: "is longer than 64 bytes"}},
		{"hidden text in provider", map[string]any{"provider": "AW\u202eS"}, InputError{Field: "provider", Problem: "has a control character in it"}},
		{"nodeServices as text", map[string]any{"nodeServices": "1"}, InputError{Field: "nodeServices", Problem: wrongType}},
		{"nodeServices with a fraction", map[string]any{"nodeServices": 1.5}, InputError{Field: "nodeServices", Problem: wrongType}},
		{"nodeServices beyond JavaScript", map[string]any{"nodeServices": raw("9007199254740992")}, InputError{Field: "nodeServices", Problem: "is out of range"}},
		{"url too long", map[string]any{"url": strings.Repeat("u", 257)}, InputError{Field: "url", Problem: long}},

		{"ip with a port", map[string]any{"ip": "192.0.2.7:80"}, InputError{Field: "ip", Problem: noIP}},
		{"ip with leading zeros", map[string]any{"ip": "192.0.02.7"}, InputError{Field: "ip", Problem: noIP}},
		{"ip with a separator", map[string]any{"ip": "192.0.2.7|x"}, InputError{Field: "ip", Problem: noIP}},
		{"host name", map[string]any{"ip": "node.example"}, InputError{Field: "ip", Problem: noIP}},
		{"zone", map[string]any{"ip": "fe80::1%eth0"}, InputError{Field: "ip", Problem: "has a zone"}},
		{"region with a separator", map[string]any{"region": "eu|1"}, InputError{Field: "region", Problem: "has a | in it"}},

		{"9 digits", map[string]any{"timestamp": "170000000"}, InputError{Field: "timestamp", Problem: stampForm}},
		{"11 digits", map[string]any{"timestamp": "17000000000"}, InputError{Field: "timestamp", Problem: stampForm}},
		{"exponent", map[string]any{"timestamp": raw("1.7e9")}, InputError{Field: "timestamp", Problem: stampForm}},
		{"fraction", map[string]any{"timestamp": raw("1700000000.0")}, InputError{Field: "timestamp", Problem: stampForm}},
		{"minus", map[string]any{"timestamp": raw("-1700000000")}, InputError{Field: "timestamp", Problem: stampForm}},
		{"RFC 3339 without an offset", map[string]any{"timestamp": "2023-11-14T22:13:20"}, InputError{Field: "timestamp", Problem: stampForm}},
		{"timestamp null", map[string]any{"timestamp": raw("null")}, InputError{Field: "timestamp", Problem: required}},
		{"timestamp true", map[string]any{"timestamp": true}, InputError{Field: "timestamp", Problem: wrongType}},

		{"signature without padding", map[string]any{"signature": strings.TrimRight(someSignature, "=")}, InputError{Field: "signature", Problem: "is not base64 with padding"}},
		{"signature in url-safe base64", map[string]any{"signature": "_-" + someSignature[2:]}, InputError{Field: "signature", Problem: "is not base64 with padding"}},
		{"signature with loose bits", map[string]any{"signature": "AB=="}, InputError{Field: "signature", Problem: "is not base64 with padding"}},
		{"signature with a line break", map[string]any{"signature": someSignature + "\n"}, InputError{Field: "signature", Problem: "has a line break in it"}},
		{"signature of 1 MB", map[string]any{"signature": strings.Repeat("A", 1<<20)}, InputError{Field: "signature", Problem: "is too long"}},
	}
	for _, field := range []string{"ip", "region", "timestamp", "signature", "version", "status"} {
		cases = append(cases, refusal{"no " + field, map[string]any{field: nil}, InputError{Field: field, Problem: required}})
	}
	for _, field := range []string{"ip", "region", "signature", "id_org", "org_id", "version", "status", "provider", "url"} {
		for kind, value := range map[string]any{"number": 1, "array": []int{}, "object": map[string]int{}, "true": true} {
			cases = append(cases, refusal{field + " as " + kind, map[string]any{field: value}, InputError{Field: field, Problem: wrongType}})
		}
	}
	for _, field := range []string{"region", "version", "status", "url"} {
		for kind, char := range map[string]string{
			"NUL": "\x00", "line feed": "\n", "delete": "\x7f", "C1": "\u0085",
			"right-to-left override": "\u202e", "isolate": "\u2066", "mark": "\u200f",
		} {
			cases = append(cases, refusal{field + " with " + kind, map[string]any{field: "a" + char + "b"}, InputError{Field: field, Problem: control}})
		}
		cases = append(cases, refusal{field + " of 1 MB", map[string]any{field: strings.Repeat("a", 1<<20)}, InputError{Field: field, Problem: long}})
	}
	for _, c := range cases {
		refused(t, c.name, body(t, c.changes), c.want)
	}
}

func refused(t *testing.T, name string, text []byte, want InputError) {
	t.Helper()
	_, err := parse(register, text)
	got, ok := errors.AsType[*InputError](err)
	if !ok || *got != want {
		t.Errorf("%s: got %v, want %v", name, err, &want)
	}
}

func TestRefusedBodies(t *testing.T) {
	good := string(body(t, nil))
	twice := InputError{Field: "", Problem: "the body has a name twice"}
	notJSON := InputError{Field: "", Problem: "the body is not one JSON object in UTF-8"}
	for name, c := range map[string]struct {
		text string
		want InputError
	}{
		"duplicate name":           {strings.Replace(good, `{`, `{"ip":"192.0.2.8",`, 1), twice},
		"duplicate by escaping":    {strings.Replace(good, `{`, `{"\u0069p":"192.0.2.8",`, 1), twice},
		"duplicate unknown name":   {strings.Replace(good, `{`, `{"x":1,"x":1,`, 1), twice},
		"duplicate in the unknown": {strings.Replace(good, `{`, `{"x":{"y":1,"y":1},`, 1), twice},
		"names in capitals":        {strings.ReplaceAll(good, `"ip"`, `"IP"`), InputError{Field: "ip", Problem: "is required"}},
		"trailing data":            {good + "{}", notJSON},
		"invalid UTF-8":            {strings.Replace(good, "eu-west-1", "eu\xff", 1), notJSON},
		"lone surrogate":           {strings.Replace(good, "eu-west-1", `\ud800`, 1), notJSON},
		"byte order mark":          {"\ufeff" + good, notJSON},
		"empty":                    {"", notJSON},
		"array":                    {"[" + good + "]", notJSON},
		"text":                     {`"text"`, notJSON},
		"null":                     {"null", notJSON},
		"cut off":                  {good[:len(good)-1], notJSON},
		"deeply nested":            {strings.Replace(good, `{`, `{"x":`+strings.Repeat("[", 60000)+",", 1), notJSON},
		"form":                     {"ip=192.0.2.7", notJSON},
	} {
		refused(t, name, []byte(c.text), c.want)
	}
}

// What an endpoint has no use for is unknown to it.
func TestSecretsAndUnregisterIgnoreTheFieldsOfRegister(t *testing.T) {
	for _, e := range []endpoint{unregister, fetch} {
		if _, err := parse(e, body(t, map[string]any{"version": nil, "status": 5, "provider": 7})); err != nil {
			t.Errorf("%s: %v", e, err)
		}
	}
}

func TestOneNodeForAllFormsOfItsAddress(t *testing.T) {
	for want, forms := range map[string][]string{
		"192.0.2.7":   {"192.0.2.7", "::ffff:192.0.2.7", "::FFFF:c000:207", "0:0:0:0:0:ffff:192.0.2.7"},
		"2001:db8::1": {"2001:db8::1", "2001:DB8:0:0:0:0:0:1", "2001:0db8::0001", "2001:db8::0.0.0.1"},
	} {
		for _, form := range forms {
			r, err := parse(register, body(t, map[string]any{"ip": form}))
			if err != nil || r.node.IP.String() != want || r.ip != form {
				t.Errorf("%s: node %s, signed text %s, %v", form, r.node.IP, r.ip, err)
			}
		}
	}
}

func TestLinesThatASignatureMayBeOver(t *testing.T) {
	with, without := map[string]any{"timestamp": raw("1700000000")}, map[string]any{"region": nil}
	for _, c := range []struct {
		endpoint endpoint
		changes  map[string]any
		want     string
	}{
		{register, with, "192.0.2.7|eu-west-1|1700000000 192.0.2.7|eu-west-1|1700000000|acme"},
		{fetch, with, "192.0.2.7|eu-west-1|1700000000 192.0.2.7|eu-west-1|1700000000|acme"},
		{unregister, with, "192.0.2.7|eu-west-1|1700000000 192.0.2.7|eu-west-1|1700000000|acme"},
		{unregister, without, "192.0.2.7||1700000000 192.0.2.7|1700000000 192.0.2.7||1700000000|acme 192.0.2.7|1700000000|acme"},
	} {
		r, err := parse(c.endpoint, body(t, c.changes))
		if got := strings.Join(r.messages(), " "); err != nil || got != c.want {
			t.Errorf("%s %v: %q, %v", c.endpoint, c.changes, got, err)
		}
	}
	for _, e := range []endpoint{register, fetch} {
		if _, err := parse(e, body(t, without)); err == nil {
			t.Errorf("%s without a region", e)
		}
	}
}

// The same bytes could be read as region and timestamp by register and as
// timestamp and organization by unregister, at a later time. Lines that have
// one reading only are kept no longer, whatever the organization is called.
func TestUseIsKeptForEveryReadingOfTheLine(t *testing.T) {
	const later, far = "1700000290", "9999999999999"
	for name, c := range map[string]struct {
		endpoint endpoint
		change   map[string]any
		line     int // of the request's messages
		until    int64
	}{
		"organization that reads as a timestamp":     {unregister, map[string]any{"id_org": later, "region": nil}, 3, 1700000290},
		"organization that reads as one far away":    {unregister, map[string]any{"id_org": far, "region": nil}, 3, 9999999999},
		"region that reads as a timestamp":           {register, map[string]any{"id_org": "1700000000", "region": later}, 0, 1700000290},
		"region alone":                               {register, map[string]any{"region": later}, 0, 1700000000},
		"such an organization, registering":          {register, map[string]any{"id_org": far}, 0, 1700000000},
		"such an organization, in the line":          {register, map[string]any{"id_org": far}, 1, 1700000000},
		"such an organization, without a region":     {unregister, map[string]any{"id_org": far, "region": nil}, 1, 1700000000},
		"such an organization, with an empty region": {unregister, map[string]any{"id_org": far, "region": nil}, 2, 1700000000},
		"organization and region alike":              {register, map[string]any{"id_org": far, "region": far}, 0, 1700000000},
	} {
		r, err := parse(c.endpoint, body(t, c.change))
		if err != nil {
			t.Fatal(name, err)
		}
		line := r.messages()[c.line]
		if until := r.presentable(line); until.Unix() != c.until {
			t.Errorf("%s: %q is kept until %d, want %d", name, line, until.Unix(), c.until)
		}
	}
}

func TestEveryDecodedFieldMakesAnotherRequest(t *testing.T) {
	digest := func(e endpoint, changes map[string]any) [32]byte {
		r, err := parse(e, body(t, changes))
		if err != nil {
			t.Fatal(err)
		}
		return r.digest()
	}
	first := digest(register, nil)
	if digest(register, map[string]any{"unknown": 1, "org_id": "acme"}) != first {
		t.Error("what is ignored makes another request")
	}
	seen := map[[32]byte]string{first: "the first"}
	for name, changes := range map[string]map[string]any{
		"ip form": {"ip": "::ffff:192.0.2.7"}, "region": {"region": "x"}, "timestamp": {"timestamp": "1700000001"},
		"version": {"version": "x"}, "status": {"status": "x"}, "url": {"url": "x"}, "provider": {"provider": "S3"},
		"services": {"nodeServices": 1}, "organization": {"id_org": "x"}, "boundary": {"version": "1.4.0a", "status": "ctive"},
	} {
		d := digest(register, changes)
		if other, ok := seen[d]; ok {
			t.Errorf("%s is the same request as %s", name, other)
		}
		seen[d] = name
	}
	if digest(unregister, nil) == digest(fetch, nil) {
		t.Error("two endpoints, one request")
	}
}

func FuzzParse(f *testing.F) {
	f.Add(body(f, nil))
	f.Add(body(f, map[string]any{"timestamp": raw("1700000000123"), "nodeServices": 3, "provider": "AWS", "url": "u"}))
	f.Add([]byte(`{"ip":"::1","timestamp":"2023-11-14T22:13:20Z","signature":"AA==","org_id":"a"}`))
	f.Fuzz(func(t *testing.T, text []byte) {
		for _, e := range []endpoint{register, unregister, fetch} {
			r, err := parse(e, text)
			if err != nil {
				if _, ok := errors.AsType[*InputError](err); !ok {
					t.Errorf("%s: not for the sender: %v", e, err)
				}
				continue
			}
			if r.addr.Zone() != "" || r.addr.Is4In6() || !r.addr.IsValid() {
				t.Errorf("address %s", r.addr)
			}
			if strings.ContainsAny(r.ip+r.region, "|") {
				t.Errorf("line of %q, %q", r.ip, r.region)
			}
			for _, text := range []string{r.ip, r.region, r.timestamp} {
				if _, err := jsonbody.Text("", &text); err != nil {
					t.Errorf("%q in the line: %v", text, err)
				}
			}
		}
	})
}
