//go:build cgo

package hsm

import (
	"os"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/miekg/pkcs11"

	"github.com/orgkeys/orgkeys/internal/orgkey"
)

const benchClients = 2

// clients runs f b.N times on benchClients goroutines and reports the rate.
func clients(b *testing.B, f func() error) {
	b.Helper()
	var next atomic.Int64
	var wg sync.WaitGroup
	b.ResetTimer()
	for range benchClients {
		wg.Go(func() {
			for next.Add(1) <= int64(b.N) {
				if err := f(); err != nil {
					b.Error(err)
					return
				}
			}
		})
	}
	wg.Wait()
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "keys/s")
}

// BenchmarkKeys compares the keystore with a loop on the library, on the same
// sessions: generate, wrap, destroy both objects. Keys take widely different
// times to generate; use -benchtime=300x or more.
func BenchmarkKeys(b *testing.B) {
	token := open(b, softHSM(b))
	b.Run("library", func(b *testing.B) {
		clients(b, func() error {
			s, err := token.life.generate.take(b.Context())
			if err != nil {
				return err
			}
			defer token.life.generate.put(s)
			p, err := generatePair(token.lib, s.handle, uuid.NewString())
			if err != nil {
				return err
			}
			mechanism := []*pkcs11.Mechanism{pkcs11.NewMechanism(token.courier.wrap.mechanism, nil)}
			if _, err := token.lib.WrapKey(s.handle, mechanism, token.life.wrappingAs, p.private); err != nil {
				return err
			}
			if err := token.lib.DestroyObject(s.handle, p.private); err != nil {
				return err
			}
			return token.lib.DestroyObject(s.handle, p.public)
		})
	})
	b.Run("keystore", func(b *testing.B) {
		clients(b, func() error { return generateOne(b.Context(), token) })
	})
}

// BenchmarkAfterGeneration is what a key costs besides its generation.
func BenchmarkAfterGeneration(b *testing.B) {
	token := open(b, softHSM(b))
	var spent time.Duration
	for range b.N {
		key, err := token.Create(b.Context(), uuid.NewString())
		if err != nil {
			b.Fatal(err)
		}
		started := time.Now()
		der, err := key.Export(b.Context())
		if err != nil {
			b.Fatal(err)
		}
		clear(der)
		if err := key.Destroy(b.Context()); err != nil {
			b.Fatal(err)
		}
		spent += time.Since(started)
	}
	b.ReportMetric(float64(spent.Microseconds())/float64(b.N), "µs/key")
}

// BenchmarkOpen is what a list of five keys costs.
func BenchmarkOpen(b *testing.B) {
	token := open(b, softHSM(b))
	items := make([]orgkey.Sealed, 5)
	for i := range items {
		items[i].Binding = orgkey.Binding{Org: "acme", ID: uuid.NewString()}
		var err error
		if items[i].Ciphertext, err = token.Seal(b.Context(), items[i].Binding, make([]byte, 294)); err != nil {
			b.Fatal(err)
		}
	}
	for b.Loop() {
		if _, err := token.Open(b.Context(), items); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkStart is everything between a start with a token and being ready.
func BenchmarkStart(b *testing.B) {
	cfg := softHSM(b)
	for b.Loop() {
		token, err := Open(b.Context(), cfg)
		if err != nil {
			b.Fatal(err)
		}
		if err := token.Close(); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkMemory makes and destroys objects as keys are, without the slow
// generation, and reports how much the process has grown by after each. The
// second run ends the life after every 1,000.
func BenchmarkMemory(b *testing.B) {
	for name, recycle := range map[string]int{"one life": 1 << 40, "recycled": 1000} {
		b.Run(name, func(b *testing.B) {
			cfg := softHSM(b)
			cfg.RecycleKeys = recycle
			token := open(b, cfg)
			before := resident(b)
			for range b.N {
				token.recycle(b.Context())
				l, s, err := token.acquire(b.Context(), func(l *life) *pool { return l.generate })
				if err != nil {
					b.Fatal(err)
				}
				err = s.do(func(h pkcs11.SessionHandle) error {
					key, err := generateWrappingKey(token.lib, h)
					if err != nil {
						return err
					}
					return token.lib.DestroyObject(h, key)
				})
				l.generate.put(s)
				if err != nil {
					b.Fatal(err)
				}
				l.made.Add(1)
			}
			b.ReportMetric(float64(resident(b)-before)/float64(b.N), "B/object")
			b.ReportMetric(float64(resident(b)-before)/(1<<20), "MiB-grown")
		})
	}
}

// resident is the process's resident memory in bytes, as Linux tells it.
func resident(b *testing.B) int {
	b.Helper()
	statm, err := os.ReadFile("/proc/self/statm")
	if err != nil {
		b.Fatal(err)
	}
	pages, err := strconv.Atoi(strings.Fields(string(statm))[1])
	if err != nil {
		b.Fatal(err)
	}
	return pages * os.Getpagesize()
}
