package api

import (
	"net/http"
	"strings"
	"testing"
)

func TestNegotiate(t *testing.T) {
	const none = form(-1)
	for _, c := range []struct {
		name   string
		accept []string
		fetch  bool
		want   form
	}{
		{"no header", nil, false, pemFile},
		{"an empty header", []string{""}, false, pemFile},
		{"an empty list", []string{" , ,"}, false, pemFile},
		{"the PEM", []string{"application/x-pem-file"}, false, pemFile},
		{"the PEM, by a fetch", []string{"application/x-pem-file"}, true, pemFile},
		{"JSON", []string{"application/json"}, false, jsonString},
		{"case does not matter", []string{"Application/JSON"}, false, jsonString},
		{"anything, as curl says it", []string{"*/*"}, false, pemFile},
		{"anything, as a fetch says it", []string{"*/*"}, true, jsonString},
		{"nothing said by a fetch", nil, true, jsonString},
		{"any application type", []string{"application/*"}, false, pemFile},
		{"any application type, by a fetch", []string{"application/*"}, true, pemFile},
		{"axios's default", []string{"application/json, text/plain, */*"}, false, jsonString},
		{"the PEM or anything, by a fetch", []string{"application/x-pem-file, */*"}, true, pemFile},
		{"a browser's navigation", []string{"text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"}, false, pemFile},
		{"older Java's default", []string{"text/html, image/gif, image/jpeg, *; q=.2, */*; q=.2"}, false, pemFile},
		{"weights without a zero", []string{"application/x-pem-file;q=.5, application/json;q=.51"}, false, jsonString},
		{"JSON preferred", []string{"application/x-pem-file;q=0.5, application/json"}, false, jsonString},
		{"PEM preferred", []string{"application/x-pem-file, application/json;q=0.9"}, true, pemFile},
		{"both alike", []string{"application/json, application/x-pem-file"}, false, pemFile},
		{"thousandths count", []string{"application/x-pem-file;q=0.001, application/json;q=0.002"}, false, jsonString},
		{"JSON least, anything else", []string{"application/json;q=0.1, */*;q=0.2"}, true, pemFile},
		{"the PEM excluded", []string{"application/x-pem-file;q=0, */*"}, false, jsonString},
		{"JSON excluded, by a fetch", []string{"application/json;q=0, */*"}, true, pemFile},
		{"both excluded", []string{"application/x-pem-file;q=0, application/json;q=0.000, */*"}, false, none},
		{"anything excluded", []string{"*/*;q=0"}, false, none},
		{"any application type excluded, anything else", []string{"application/*;q=0, */*"}, false, none},
		{"the same range twice", []string{"application/json, application/json;q=0.1, application/x-pem-file;q=0.5"}, false, jsonString},
		{"two headers", []string{"text/html", "application/json"}, false, jsonString},
		{"parameters", []string{"application/json;charset=utf-8"}, false, jsonString},
		{"parameters and weight", []string{`application/json;profile="a,b;q=0";q=0.2, application/x-pem-file;q=0.1`}, false, jsonString},
		{"something else", []string{"text/html"}, false, none},
		{"something else, by a fetch", []string{"text/html"}, true, none},
		{"another application type", []string{"application/xml"}, false, none},
		{"a weight above one", []string{"application/json;q=2"}, false, none},
		{"a weight with four digits", []string{"application/json;q=0.1234"}, false, none},
		{"a negative weight", []string{"application/json;q=-1"}, false, none},
		{"weight is not a number", []string{"application/json;q=NaN"}, false, none},
		{"two weights", []string{"application/json;q=1;q=0"}, false, none},
		{"garbage", []string{"%%%"}, false, none},
		{"garbage beside JSON", []string{"@@@, application/json, ;;;"}, false, jsonString},
		{"a wildcard type", []string{"*/json"}, false, none},
		{"a lone star", []string{"*"}, false, none},
		{"an unclosed quote", []string{`application/json;x="`}, false, none},
		{"100 kB", []string{strings.Repeat("application/json,", 6000)}, false, none},
	} {
		t.Run(c.name, func(t *testing.T) {
			h := http.Header{}
			if c.accept != nil {
				h["Accept"] = c.accept
			}
			if c.fetch {
				h.Set("Sec-Fetch-Mode", "cors")
			}
			got, ok := negotiate(h)
			if !ok {
				got = none
			}
			if got != c.want {
				t.Errorf("got %d, want %d", got, c.want)
			}
		})
	}
}

func FuzzNegotiate(f *testing.F) {
	for _, seed := range []string{"", "*/*", "application/json;q=0.5, */*;q=0", `a/b;c="d,e\"";q=1.000`, "application/x-pem-file;q=0", ",,;=\"\\"} {
		f.Add(seed, true)
		f.Add(seed, false)
	}
	f.Fuzz(func(t *testing.T, accept string, fetch bool) {
		h := http.Header{"Accept": {accept}}
		if fetch {
			h.Set("Sec-Fetch-Mode", "cors")
		}
		got, ok := negotiate(h)
		if !ok && got != 0 {
			t.Error("a form although none is acceptable")
		}
		// Naming both forms with full weight in front of anything leaves a choice.
		h.Set("Accept", "application/x-pem-file,application/json,"+strings.ReplaceAll(accept, `"`, ""))
		if _, ok := negotiate(h); !ok && len(h.Get("Accept")) <= maxAccept {
			t.Errorf("406 for %q", h.Get("Accept"))
		}
	})
}
