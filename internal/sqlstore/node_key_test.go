package sqlstore_test

import (
	"errors"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/google/uuid"

	"github.com/orgkeys/orgkeys/internal/audit"
	"github.com/orgkeys/orgkeys/internal/enroll"
	"github.com/orgkeys/orgkeys/internal/node"
	"github.com/orgkeys/orgkeys/internal/orgkey"
	"github.com/orgkeys/orgkeys/internal/sqlstore"
)

// nodes is what the nodes of acme ask for.
type nodes struct {
	t    *testing.T
	db   *sqlstore.DB
	last string // the node that changed last
}

// key is a new node key, of an enrollment for address unless that is empty.
func (n *nodes) key(address string) node.Signer {
	n.t.Helper()
	e := enroll.Enrollment{}
	if address != "" {
		e.Address = netip.MustParseAddr(address)
	}
	_, d := claimed(n.t, n.db, e, time.Hour, 100)
	return signer(n.t, n.db, offered(n.t, n.db, d).KeyID)
}

func (n *nodes) use(by node.Signer) node.Use {
	return node.Use{Org: "acme", Signer: by, Message: [32]byte([]byte(uuid.NewString())[:32]), Until: time.Now().Add(time.Hour)}
}

func (n *nodes) register(by node.Signer, ip string) error {
	return n.db.Register(n.t.Context(), n.use(by), node.Node{ID: uuid.NewString(), IP: netip.MustParseAddr(ip)}, func(id string, _ node.Change) audit.Event {
		n.last = id
		return event(audit.NodeRegistered, "acme", id)
	})
}

func (n *nodes) unregister(by node.Signer, ip string) error {
	return n.db.Unregister(n.t.Context(), n.use(by), netip.MustParseAddr(ip), func(id string, _ node.Change) audit.Event {
		n.last = id
		return event(audit.NodeUnregistered, "acme", id)
	})
}

func (n *nodes) secrets(by node.Signer, ip string) error {
	_, err := n.db.Secrets(n.t.Context(), "acme", by, netip.MustParseAddr(ip), 0, func([]string) audit.Event { return event(audit.SecretsFetched, "acme", "") })
	return err
}

// delete deletes a node, and returns the keys that ended with it.
func (n *nodes) delete(id string) (keys []string, err error) {
	err = n.db.DeleteNode(n.t.Context(), "acme", id, event(audit.NodeDeleted, "acme", id), func(key string) audit.Event {
		keys = append(keys, key)
		return event(audit.KeyDeleted, "acme", key)
	})
	return keys, err
}

func (n *nodes) want(err, want error) {
	n.t.Helper()
	if !errors.Is(err, want) {
		n.t.Errorf("%v, want %v", err, want)
	}
}

// over deletes the node of k as id: that ends the key, and then there is only again to say.
func (n *nodes) over(k node.Signer, id string, again error) {
	n.t.Helper()
	stranger := n.db.DeleteNode(n.t.Context(), "other", id, event(audit.NodeDeleted, "other", id), func(key string) audit.Event { return event(audit.KeyDeleted, "other", key) })
	n.want(stranger, node.ErrNodeNotFound)
	keys, err := n.delete(id)
	if err != nil || !slices.Equal(keys, []string{k.Key}) {
		n.t.Errorf("deleting the node: keys %q, %v; want %s", keys, err, k.Key)
	}
	n.want(n.secrets(k, "192.0.2.99"), node.ErrKeyGone)
	n.want(n.register(k, "192.0.2.99"), node.ErrKeyGone)
	keys, err = n.delete(id)
	if !errors.Is(err, again) || len(keys) > 0 {
		n.t.Errorf("deleting it again: keys %q, %v; want %v", keys, err, again)
	}
}

// Whatever a node does, its key stays its own, and is found and deleted by it.
func TestPromise14_ANodeKeyKeepsItsNode(t *testing.T) {
	onBoth(t, func(t *testing.T, db *sqlstore.DB, _ string) {
		n := &nodes{t: t, db: db}
		nodesOf := func(k node.Signer) []orgkey.NodeKey {
			t.Helper()
			listed, err := db.NodeKeys(t.Context(), "acme")
			must(t, err)
			i := slices.IndexFunc(listed, func(r orgkey.Record) bool { return r.ID == k.Key })
			if i < 0 {
				t.Fatalf("key %s is not listed", k.Key)
			}
			return listed[i].Nodes
		}

		// It unregisters, and is deleted.
		a := n.key("")
		must(t, n.register(a, "192.0.2.1"))
		id := n.last
		must(t, n.unregister(a, "192.0.2.1"))
		if got, want := nodesOf(a), []orgkey.NodeKey{{KeyID: a.Key, NodeID: "192.0.2.1", Confirmed: true}}; !slices.Equal(got, want) {
			t.Errorf("the node that unregistered: %v, want %v", got, want)
		}
		n.over(a, id, node.ErrAlreadyDeleted)
		if deleted, ended := recorded(t, db, audit.NodeDeleted), recorded(t, db, audit.KeyDeleted); deleted != 1 || ended != 1 {
			t.Errorf("%d deletions of nodes and %d of keys recorded, want one each", deleted, ended)
		}

		// It unregisters, and another takes its address.
		b, c, public := n.key(""), n.key(""), signer(t, db, released(t, db, "acme", 9))
		must(t, n.register(b, "192.0.2.2"))
		id = n.last
		must(t, n.unregister(b, "192.0.2.2"))
		must(t, n.register(c, "192.0.2.2"))
		other := n.last
		if other == id {
			t.Error("two nodes are one")
		}
		must(t, n.register(public, "192.0.2.3"))
		n.want(n.register(b, "192.0.2.3"), node.ErrAddressInUse) // it has its node, and takes no other's place
		n.want(n.unregister(b, "192.0.2.3"), node.ErrAddressInUse)
		n.want(n.register(b, "192.0.2.2"), node.ErrAddressInUse)
		must(t, n.register(b, "192.0.2.4"))
		if n.last != id {
			t.Errorf("it came back as %s, want %s", n.last, id)
		}
		must(t, n.register(b, "192.0.2.4"))
		must(t, n.register(b, "192.0.2.5"))
		must(t, n.unregister(b, "192.0.2.5"))
		must(t, n.register(c, "192.0.2.5"))
		if n.last != other {
			t.Errorf("the other moved and became %s, want %s", n.last, other)
		}
		n.over(b, id, node.ErrNodeNotFound)
		must(t, n.secrets(c, "192.0.2.5"))
		n.over(c, other, node.ErrAlreadyDeleted)
	})
}

// A registration that waits while its node is deleted does not bring it back.
func TestARegistrationComesBeforeADeletionOrNotAtAll(t *testing.T) {
	location := newDatabase(t, postgres)
	db, beside := open(t, location), raw(t, location)
	n := &nodes{t: t, db: db}
	k := n.key("")
	must(t, n.register(k, "192.0.2.1"))
	id := n.last
	held, err := beside.Begin()
	must(t, err)
	defer held.Rollback()
	statement(t, held, "SELECT pg_advisory_xact_lock(hashtextextended('nodes:acme', 0))")
	waiting := func(want int) func() bool {
		return func() (is bool) {
			must(t, beside.QueryRow("SELECT count(*) = $1 FROM pg_stat_activity WHERE datname = current_database() AND wait_event = 'advisory'", want).Scan(&is))
			return is
		}
	}
	deleted, registered := make(chan error, 1), make(chan error, 1)
	go func() {
		_, err := n.delete(id)
		deleted <- err
	}()
	until(t, "the deletion waits", waiting(1))
	go func() { registered <- n.register(k, "192.0.2.1") }()
	until(t, "the registration waits behind it", waiting(2))
	must(t, held.Rollback())
	must(t, <-deleted)
	n.want(<-registered, node.ErrKeyGone)
	if left, err := db.Nodes(t.Context(), "acme"); err != nil || len(left) != 0 {
		t.Errorf("%v, %v: the node came back", left, err)
	}
}
