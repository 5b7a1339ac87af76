package server

import (
	"strings"
	"testing"

	"github.com/orgkeys/orgkeys/internal/audit"
	"github.com/orgkeys/orgkeys/internal/config"
)

// vaultSink is a back end's sink.
type vaultSink struct{ audit.Sink }

func (vaultSink) Name() string { return config.SinkVault }

// A sink that the settings require and nobody has is not left out, nor is
// another one taken for it.
func TestASinkThatTheKeystoreLacksIsRefused(t *testing.T) {
	vault, hsm := backend{name: "vault", sink: vaultSink{}}, backend{name: "pkcs11"}
	for _, c := range []struct {
		backend backend
		sinks   string
		want    string // their names; empty: refused
	}{
		{vault, "vault,file", "vault,file"},
		{vault, "file", "file"},
		{vault, "file,syslog", ""},
		{vault, "syslog", ""},
		{vault, "", ""},
		{hsm, "file", "file"},
		{hsm, "vault", ""},
		{hsm, "file,vault", ""},
	} {
		sinks, err := c.backend.sinks(config.Config{AuditSinks: strings.Split(c.sinks, ","), AuditFile: "audit.jsonl"})
		var names []string
		for _, s := range sinks {
			names = append(names, s.Name())
		}
		if got := strings.Join(names, ","); (err != nil) != (c.want == "") || err == nil && got != c.want {
			t.Errorf("%s with %q: %q, %v; want %q", c.backend.name, c.sinks, got, err, c.want)
		}
	}
}
