package e2e

import (
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/orgkeys/orgkeys/client"
	"github.com/orgkeys/orgkeys/internal/e2e/harness"
)

// TestAFleetEnrollsAtOnce: every node of a new fleet fetches its own key at the
// same moment, signs for it, fetches its secrets and registers. What the server
// turns away comes again, and nothing is lost.
func TestAFleetEnrollsAtOnce(t *testing.T) {
	t.Parallel()
	size := 50
	if long() {
		size = 1000
	}
	s := harness.Start(t, harness.Set("ORGKEYS_MAX_NODE_KEYS", fmt.Sprint(size)))
	org := harness.Org()
	s.PutSecret(t, org, "env_s3", []byte("S3_BUCKET=b\n"))
	recipient := newRecipient(t)
	tokens := make([]minted, size)
	for i := range tokens {
		tokens[i] = mint(t, s, org, `{}`)
	}
	took := make([]time.Duration, size)
	begun := time.Now()
	inParallel(size, func(i int) {
		if err := bootsFirst(t, org, enrollment(t, s.API, tokens[i].Token, recipient, 30*time.Minute), i); err != nil {
			t.Errorf("node %d: %v", i, err)
		}
		took[i] = time.Since(begun)
	})
	slices.Sort(took)
	t.Logf("%d nodes in %s; a boot took %s at the median", size, took[size-1].Round(time.Millisecond), took[size/2].Round(time.Millisecond))
	db := s.Database(t)
	oneKeyEach(t, db, size)
	if n := harness.Number(t, db, "SELECT count(DISTINCT node_id) FROM keys_of_nodes WHERE node_id IN (SELECT id FROM nodes WHERE deleted_at IS NULL)"); n != int64(size) {
		t.Errorf("%d nodes with a key of their own, want %d", n, size)
	}
	onlyOwnKeys(t, s)
}

func bootsFirst(t *testing.T, org string, e *client.Enrollment, i int) error {
	key, err := e.Fetch(t.Context())
	if err != nil {
		return fmt.Errorf("fetching its key: %w", err)
	}
	private, err := client.ParsePrivateKey(key.PEM)
	if err != nil {
		return err
	}
	if err := e.Client.Receipt(t.Context(), key.Delivery, private); err != nil {
		return fmt.Errorf("signing for it: %w", err)
	}
	node := client.Node{Client: e.Client, Org: org, IP: fmt.Sprintf("10.16.%d.%d", i>>8, i&255), Region: "eu", Key: private, KeyID: key.KeyID}
	secrets, err := node.Secrets(t.Context())
	if err != nil || len(secrets) != 1 {
		return fmt.Errorf("fetching its secrets: %d, %w", len(secrets), err)
	}
	if err := node.Register(t.Context(), client.Registration{Version: "1", Status: "active"}); err != nil {
		return fmt.Errorf("registering: %w", err)
	}
	return nil
}
