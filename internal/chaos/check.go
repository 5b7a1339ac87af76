// Package chaos runs replicas under load while everything around them is
// killed, and then reads what is left to see whether a promise was broken.
//
// The checker shares no code with the service: it knows tables, leaves and
// Vault's audit file by their documented form, and hashes the log's tree itself.
package chaos

import (
	"crypto/sha256"
	"fmt"
	"slices"
	"time"
)

// Evidence is everything that a run left behind.
type Evidence struct {
	Limit int // keys that an organization may have

	Received  []Received           // private keys that clients received in full
	Deletions map[string]bool      // IDs of the requests by which clients deleted keys
	Deleted   []string             // keys whose deletion was answered with success
	Log       []Leaf               // in the order of the log
	Unplaced  int                  // events without a place in the log
	Size      int64                // of the log, as its head says
	Root      []byte               // likewise
	Keys      []KeyRow             // every record of a key
	Listed    map[string][]string  // key IDs by organization, as the API lists them
	Public    map[string]string    // the thumbprint of the public key that the API lists under this ID
	Device    map[string]time.Time // when Vault's audit device first had the event of this ID
	Transit   []string             // keys left in Transit
	Locks     []string             // quota locks left in Redis, and advisory ones in PostgreSQL
	Verified  string               // what "audit verify" objects to; empty: nothing
}

// Received is a private key that a client has. Thumbprint (RFC 7638) is of its
// public half, as the client worked it out.
type Received struct{ Org, ID, Thumbprint string }

// Leaf is an event of the log.
type Leaf struct {
	Index   int64
	ID      string `json:"id"`
	Type    string `json:"type"`
	Reason  string `json:"reason"`
	Org     string `json:"org"`
	Object  string `json:"object"`
	Request string `json:"request"`
	Detail  struct {
		Fingerprint string `json:"fingerprint"`
	} `json:"detail"`
	Raw []byte // verbatim
}

// KeyRow is a key's record.
type KeyRow struct {
	ID, Org, State string
	Slot           int64     // 0: none
	Released       time.Time // zero: never
}

// Check returns every promise that the evidence shows broken.
func Check(e Evidence) []string {
	c := &checker{Evidence: e, rows: map[string]KeyRow{}, created: map[string]Leaf{}, ended: map[string]Leaf{}}
	for _, k := range e.Keys {
		c.rows[k.ID] = k
	}
	c.tree()
	c.replay()
	c.received()
	c.released()
	c.records()
	c.leftovers()
	return c.broken
}

type checker struct {
	Evidence
	rows    map[string]KeyRow
	created map[string]Leaf // by key
	ended   map[string]Leaf // by key: its withdrawal or deletion
	broken  []string
}

func (c *checker) report(format string, args ...any) {
	c.broken = append(c.broken, fmt.Sprintf(format, args...))
}

// tree hashes the log anew (RFC 9162, 2.1.1).
func (c *checker) tree() {
	hashes := make([][32]byte, len(c.Log))
	for i, l := range c.Log {
		if l.Index != int64(i) {
			c.report("the log has no event %d", i)
			return
		}
		hashes[i] = sha256.Sum256(append([]byte{0}, l.Raw...))
	}
	if c.Size != int64(len(c.Log)) {
		c.report("the log's head says %d events, and there are %d", c.Size, len(c.Log))
	}
	if root := rootOf(hashes); string(root[:]) != string(c.Root) {
		c.report("the log's root does not match its events")
	}
	if c.Unplaced > 0 {
		c.report("%d events have no place in the log", c.Unplaced)
	}
	if c.Verified != "" {
		c.report("audit verify: %s", c.Verified)
	}
}

func rootOf(leaves [][32]byte) [32]byte {
	switch len(leaves) {
	case 0:
		return sha256.Sum256(nil)
	case 1:
		return leaves[0]
	}
	split := 1
	for 2*split < len(leaves) {
		split *= 2
	}
	left, right := rootOf(leaves[:split]), rootOf(leaves[split:])
	return sha256.Sum256(slices.Concat([]byte{1}, left[:], right[:]))
}

// replay counts each organization's keys at every event of the log.
func (c *checker) replay() {
	count := map[string]int{}
	for _, l := range c.Log {
		switch l.Type {
		case "orgkey.created":
			if _, twice := c.created[l.Object]; twice {
				c.report("event %d: key %s was created twice", l.Index, l.Object)
			}
			c.created[l.Object] = l
			if count[l.Org]++; count[l.Org] > c.Limit {
				c.report("event %d: organization %s has %d keys, and may have %d", l.Index, l.Org, count[l.Org], c.Limit)
			}
		case "orgkey.withdrawn", "orgkey.deleted":
			born, known := c.created[l.Object]
			switch _, twice := c.ended[l.Object]; {
			case !known || born.Org != l.Org:
				c.report("event %d: key %s of organization %s ended and was never created", l.Index, l.Object, l.Org)
			case twice:
				c.report("event %d: key %s ended twice", l.Index, l.Object)
			default:
				count[l.Org]--
			}
			c.ended[l.Object] = l
		}
	}
}

// received: whoever received a key in full has it, unless writing it out
// failed on the other side, or somebody deleted it. It is the key that list and
// log tell of, and nobody else's.
func (c *checker) received() {
	seen := map[string]bool{}
	holders := map[string]string{} // key IDs by thumbprint
	for _, r := range c.Received {
		if seen[r.ID] {
			c.report("key %s was received twice", r.ID)
		}
		if other, twice := holders[r.Thumbprint]; twice && other != r.ID {
			c.report("keys %s and %s are one", other, r.ID)
		}
		if listed, is := c.Public[r.ID]; is && listed != r.Thumbprint {
			c.report("key %s was received, and another is listed under its ID", r.ID)
		}
		if c.created[r.ID].Detail.Fingerprint != r.Thumbprint {
			c.report("key %s was received, and the log tells of another under its ID", r.ID)
		}
		seen[r.ID], holders[r.Thumbprint] = true, r.ID
		end, over := c.ended[r.ID]
		switch {
		case !over && !slices.Contains(c.Listed[r.Org], r.ID):
			c.report("key %s was received, and is neither listed nor ended", r.ID)
		case !over:
		case end.Type == "orgkey.withdrawn" && end.Reason != "write_failed":
			c.report("key %s was received, and withdrawn for the reason %q", r.ID, end.Reason)
		case end.Type == "orgkey.deleted" && !c.Deletions[end.Request]:
			c.report("key %s was received, and deleted by a request that nobody made", r.ID)
		}
		if c.rows[r.ID].Released.IsZero() {
			c.report("key %s was received, and never released", r.ID)
		}
	}
	for _, id := range c.Deleted {
		if c.ended[id].Type != "orgkey.deleted" {
			c.report("the deletion of key %s was answered, and is not in the log", id)
		}
	}
}

// released: no key was released before the log and Vault's device had its event.
func (c *checker) released() {
	for _, k := range c.Keys {
		if k.Released.IsZero() {
			continue
		}
		event, logged := c.created[k.ID]
		if !logged {
			c.report("key %s was released, and the log does not say that it was created", k.ID)
			continue
		}
		switch at, there := c.Device[event.ID]; {
		case !there:
			c.report("key %s was released, and Vault's audit device does not have its event", k.ID)
		case at.After(k.Released):
			c.report("key %s was released %s before Vault's audit device had its event", k.ID, at.Sub(k.Released))
		}
	}
}

// records: records, log and what the API lists agree.
func (c *checker) records() {
	slots := map[string]bool{}
	for _, k := range c.Keys {
		_, over := c.ended[k.ID]
		listed := slices.Contains(c.Listed[k.Org], k.ID)
		switch {
		case k.State == "released" && over:
			c.report("key %s has ended, and its record is released", k.ID)
		case k.State == "released" && !listed:
			c.report("key %s is released and not listed", k.ID)
		case k.State != "released" && listed:
			c.report("key %s is listed, and its record is %s", k.ID, k.State)
		case k.State == "deleted" && !over:
			c.report("the record of key %s is deleted, and no event says why", k.ID)
		}
		if k.Slot == 0 {
			continue
		}
		slot := fmt.Sprint(k.Org, " ", k.Slot)
		if slots[slot] || k.Slot > int64(c.Limit) {
			c.report("key %s has place %d of organization %s, which is taken or not one", k.ID, k.Slot, k.Org)
		}
		slots[slot] = true
	}
	for id, l := range c.created {
		if _, there := c.rows[id]; !there {
			c.report("event %d: key %s was created, and there is no record of it", l.Index, id)
		}
	}
}

// leftovers: nothing is left after its life.
func (c *checker) leftovers() {
	for _, k := range c.Keys {
		if k.State == "reserved" || k.State == "pending" {
			c.report("key %s is still %s", k.ID, k.State)
		}
	}
	for _, name := range c.Transit {
		c.report("Transit still has key %s", name)
	}
	for _, name := range c.Locks {
		c.report("lock %s is left", name)
	}
}
