package verify_test

import (
	"encoding/json"
	"fmt"
	"strings"
	"testing"

	"github.com/orgkeys/orgkeys/internal/audit"
	"github.com/orgkeys/orgkeys/internal/audit/verify"
)

// A checkpoint is taken in every form in which a sink has it.
func TestTheNewestCheckpointIsFoundInEveryForm(t *testing.T) {
	at := func(size int64) string { return audit.Checkpoint{Origin: "orgkeys/x", Size: size}.Text() }
	signed := at(7) + "\n\u2014 orgkeys/x AAAA\n"
	quote := func(s string) string {
		b, err := json.Marshal(s)
		if err != nil {
			t.Fatal(err)
		}
		return string(b)
	}
	line := func(s string) string { return fmt.Sprintf(`{"checkpoint":%s}`, quote(s)) }
	event := `{"index":6,"event":{"v":1,"type":"orgkey.listed","detail":{"event":"x"}}}`
	for name, c := range map[string]struct{ text, want string }{
		"a checkpoint":                   {at(7), at(7)},
		"without its last line's end":    {strings.TrimSuffix(at(7), "\n"), at(7)},
		"a signed note":                  {signed, signed},
		"a signed note from a shell":     {strings.TrimSuffix(signed, "\n"), signed},
		"the file sink's line":           {line(signed), signed},
		"the same with its end":          {line(signed) + "\n", signed},
		"the whole sink":                 {event + "\n" + line(at(3)) + "\n" + line(signed) + "\n" + event + "\n", signed},
		"the whole sink, cut off":        {event + "\n" + line(signed) + "\n" + event[:20], signed},
		"the entry in Vault":             {"{\n \"request_id\": \"x\",\n \"data\": {\"data\": {\"checkpoint\": " + quote(at(7)) + "}, \"metadata\": {\"version\": 3}}}\n", at(7)},
		"an entry of Vault's audit file": {`{"time":"2026-01-01T00:00:00Z","type":"response","request":{"data":{"batch_input":[{"event":` + quote(signed) + `,"input":"hmac-sha256:0"}]}}}`, signed},
	} {
		if got, err := verify.NewestIn(c.text, false); err != nil || got != c.want {
			t.Errorf("%s: %q, %v", name, got, err)
		}
	}
	sink := line(at(3)) + line(signed) + line(at(9))
	for want, only := range map[string]bool{at(9): false, signed: true} {
		if got, err := verify.NewestIn(sink, only); err != nil || got != want {
			t.Errorf("signed only: %t: %q, %v", only, got, err)
		}
	}
	if got, err := verify.NewestIn(line(at(3)), true); err == nil {
		t.Errorf("none is signed: %q", got)
	}
	for name, text := range map[string]string{"nothing": "", "no checkpoint": event, "another object": `{"checkpoint":7}`, "half an object": `{"checkpoint":"`, "words": "hello\n"} {
		if got, err := verify.NewestIn(text, false); err == nil {
			t.Errorf("%s: %q", name, got)
		}
	}
}
