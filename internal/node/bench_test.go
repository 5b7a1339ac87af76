package node_test

import (
	"fmt"
	"path/filepath"
	"sync/atomic"
	"testing"

	"github.com/orgkeys/orgkeys/internal/authz"
	"github.com/orgkeys/orgkeys/internal/node"
)

// Durable registrations a second over SQLite, file sink included, for an
// organization with five keys whose oldest signs: signing is the client's.
func BenchmarkRegister(b *testing.B) {
	w := newWorld(b, filepath.Join(b.TempDir(), "orgkeys.db"))
	k := w.release("acme")
	for range 4 {
		w.release("acme")
	}
	bodies := make([][]byte, b.N)
	now := w.now()
	for i := range bodies {
		bodies[i] = k.signedAt(fmt.Sprintf("10.%d.%d.%d", i>>16&255, i>>8&255, i&255), now).body()
	}
	var next atomic.Int64
	b.SetParallelism(32)
	b.ResetTimer()
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			if err := w.service.Register(b.Context(), here, bodies[next.Add(1)-1]); err != nil {
				b.Error(err)
			}
		}
	})
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "registrations/s")
}

func BenchmarkSecrets(b *testing.B) {
	w := newWorld(b, filepath.Join(b.TempDir(), "orgkeys.db"))
	k := w.release("acme")
	w.must(w.service.PutSecret(b.Context(), by("acme", authz.Owner), "acme", "env_s3", make([]byte, 1000)))
	body := k.signedAt("10.0.0.1", w.now()).body()
	b.SetParallelism(32)
	b.ResetTimer()
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			if err := w.service.Secrets(b.Context(), here, body, func([]node.Envelope) error { return nil }); err != nil {
				b.Error(err)
			}
		}
	})
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "fetches/s")
}
