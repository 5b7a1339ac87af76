package vault_test

import (
	"context"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/hashicorp/vault/api"

	"github.com/orgkeys/orgkeys/internal/orgkey"
)

// direct is what generating a key costs without orgkeys: the same four calls,
// the same client settings, and no check of anything.
func direct(ctx context.Context, client *api.Client) error {
	path, l := "orgkeys/keys/"+uuid.NewString(), client.Logical()
	if _, err := l.WriteWithContext(ctx, path, map[string]any{"type": "rsa-2048", "exportable": true}); err != nil {
		return err
	}
	if _, err := l.WriteWithContext(ctx, path+"/config", map[string]any{"deletion_allowed": true}); err != nil {
		return err
	}
	if _, err := l.ReadWithContext(ctx, "orgkeys/export/encryption-key/"+path[len("orgkeys/keys/"):]+"/1"); err != nil {
		return err
	}
	_, err := l.DeleteWithContext(ctx, path)
	return err
}

// BenchmarkKeys has every client do one after the other, so that whatever else
// the machine does slows both alike. Checking that the key is gone and that
// both halves fit is what the keystore does more.
func BenchmarkKeys(b *testing.B) {
	c := open(b)
	for _, clients := range []int{1, 2, 8} {
		b.Run(fmt.Sprintf("clients=%d", clients), func(b *testing.B) {
			var directly, keystore atomic.Int64
			concurrently(b, clients, func() error {
				start := time.Now()
				if err := direct(b.Context(), c.API()); err != nil {
					return err
				}
				middle := time.Now()
				der, err := generate(b.Context(), c)
				clear(der)
				directly.Add(int64(middle.Sub(start)))
				keystore.Add(int64(time.Since(middle)))
				return err
			})
			done := float64(b.N*clients) * float64(time.Second)
			b.ReportMetric(done/float64(directly.Load()), "direct-keys/s")
			b.ReportMetric(done/float64(keystore.Load()), "keystore-keys/s")
			b.ReportMetric(100*float64(directly.Load())/float64(keystore.Load()), "%")
		})
	}
}

// concurrently runs once b.N times altogether.
func concurrently(b *testing.B, clients int, once func() error) {
	var begun atomic.Int64
	var wg sync.WaitGroup
	for range clients {
		wg.Go(func() {
			for begun.Add(1) <= int64(b.N) {
				if err := once(); err != nil {
					b.Error(err)
					return
				}
			}
		})
	}
	wg.Wait()
}

func BenchmarkReceipts(b *testing.B) {
	c := open(b)
	origin := freshLog(b)
	for _, n := range []int{1, 10, 100} {
		b.Run(fmt.Sprintf("batch=%d", n), func(b *testing.B) {
			list := entries(b, 0, n)
			sink := c.Sink()
			size := int64(0)
			for b.Loop() {
				size += int64(n)
				if _, err := sink.Append(b.Context(), list, checkpointAt(origin, size)); err != nil {
					b.Fatal(err)
				}
			}
			b.ReportMetric(float64(b.N*n)/b.Elapsed().Seconds(), "events/s")
		})
	}
}

func BenchmarkOpen(b *testing.B) {
	c := open(b)
	s := c.Sealer()
	for _, n := range []int{1, 5, 100} {
		b.Run(fmt.Sprintf("items=%d", n), func(b *testing.B) {
			items := make([]orgkey.Sealed, n)
			for i := range items {
				binding := orgkey.Binding{Org: "acme", ID: uuid.NewString()}
				ciphertext, err := s.Seal(b.Context(), binding, make([]byte, 294))
				if err != nil {
					b.Fatal(err)
				}
				items[i] = orgkey.Sealed{Binding: binding, Ciphertext: ciphertext}
			}
			for b.Loop() {
				if _, err := s.Open(b.Context(), items); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
