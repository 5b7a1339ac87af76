package sqlstore_test

import (
	"bytes"
	"context"
	"fmt"
	"sync"
	"testing"

	"github.com/orgkeys/orgkeys/internal/orgkey"
	"github.com/orgkeys/orgkeys/internal/sqlstore"
)

// Of many that ask at once, one is chosen, and all hear which.
func TestOneTokenKeyIsChosen(t *testing.T) {
	onBoth(t, func(t *testing.T, db *sqlstore.DB, _ string) {
		ctx := t.Context()
		if id, err := db.ChosenKey(ctx, "seal"); id != nil || err != nil {
			t.Fatalf("before any: %x, %v", id, err)
		}
		var wg sync.WaitGroup
		heard := make([][]byte, 8)
		for i := range heard {
			wg.Go(func() {
				id := fmt.Appendf(nil, "key %d", i)
				must(t, db.AnnounceKey(ctx, "seal", id))
				chosen, err := db.ChooseKey(ctx, "seal", id)
				must(t, err)
				heard[i] = chosen
			})
		}
		wg.Wait()
		chosen, err := db.ChosenKey(ctx, "seal")
		must(t, err)
		for _, h := range heard {
			if !bytes.Equal(h, chosen) || len(h) == 0 {
				t.Errorf("heard %q, chosen is %q", h, chosen)
			}
		}
		if announced, err := db.AnnouncedKeys(ctx, "seal"); len(announced) != len(heard) || err != nil {
			t.Errorf("%d announced, %v", len(announced), err)
		}
		if other, err := db.ChosenKey(ctx, "checkpoint"); other != nil || err != nil {
			t.Errorf("another purpose: %x, %v", other, err)
		}
	})
}

// Two replicas make a sealed checkpoint key at once: one stays.
func TestOneSealedCheckpointKeyStays(t *testing.T) {
	onBoth(t, func(t *testing.T, db *sqlstore.DB, _ string) {
		var wg sync.WaitGroup
		for i := range 8 {
			wg.Go(func() {
				must(t, db.KeepCheckpointKey(t.Context(), fmt.Sprint("vkey ", i), fmt.Appendf(nil, "sealed %d", i)))
			})
		}
		wg.Wait()
		keys, err := db.CheckpointKeys(t.Context())
		if err != nil || len(keys) != 1 {
			t.Errorf("kept: %v, %v", keys, err)
		}
	})
}

func TestASealedSampleIsFound(t *testing.T) {
	onBoth(t, func(t *testing.T, db *sqlstore.DB, _ string) {
		ctx := context.Background()
		if _, found, err := db.SealedSample(ctx); found || err != nil {
			t.Fatalf("in an empty database: %v, %v", found, err)
		}
		head, err := db.Head(ctx)
		must(t, err)
		must(t, db.KeepEventKey(ctx, head.Origin, []byte("sealed")))
		sample, found, err := db.SealedSample(ctx)
		want := orgkey.Binding{Purpose: orgkey.EventKey, Org: head.Origin}
		if !found || err != nil || sample.Binding != want || string(sample.Ciphertext) != "sealed" {
			t.Errorf("%+v, %v, %v", sample, found, err)
		}
	})
}
