package node_test

import (
	"bytes"
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/orgkeys/orgkeys/internal/audit"
	"github.com/orgkeys/orgkeys/internal/authz"
	"github.com/orgkeys/orgkeys/internal/envelope"
	"github.com/orgkeys/orgkeys/internal/gate"
	"github.com/orgkeys/orgkeys/internal/node"
	"github.com/orgkeys/orgkeys/internal/org"
	"github.com/orgkeys/orgkeys/internal/orgkey"
)

func (w *world) want(what string, err, want error) {
	w.t.Helper()
	if !errors.Is(err, want) {
		w.t.Errorf("%s: got %v, want %v", what, err, want)
	}
}

func TestRegisteringAgainUpdatesTheNode(t *testing.T) {
	onBoth(t, func(t *testing.T, w *world) {
		k := w.release("acme")
		w.must(w.register(k.signedAt("192.0.2.1", w.now())))
		w.must(w.register(k.signedAt("192.0.2.2", w.now())))
		before := w.nodes("acme")
		again := k.signedAt("192.0.2.1", w.now().Add(time.Second)).with("status", "ONLINE").with("version", "2").
			with("url", "https://n").with("nodeServices", 3).with("provider", "AWS")
		w.must(w.register(again))
		after := w.nodes("acme")
		if len(before) != 2 || len(after) != 2 || after[1].ID != before[1].ID || after[0] != before[0] {
			t.Fatalf("before %v, after %v", before, after)
		}
		n := after[1]
		if n.IP.String() != "192.0.2.1" || n.Status != "ONLINE" || n.Version != "2" || n.URL != "https://n" || n.Services != 3 || n.Provider != "AWS" {
			t.Errorf("node %+v", n)
		}
		if !n.Updated.After(before[1].Updated) || n.Registered != before[1].Registered {
			t.Errorf("times %+v, before %+v", n, before[1])
		}
	})
}

func TestEverySignedFormIsAccepted(t *testing.T) {
	onBoth(t, func(t *testing.T, w *world) {
		k := w.release("acme")
		now := w.now()
		stamps := []any{
			now.Unix(), now.UnixMilli(), strconv.FormatInt(now.Unix()+1, 10), strconv.FormatInt(now.UnixMilli()+1, 10),
			now.UTC().Format(time.RFC3339), now.In(time.FixedZone("", 3600)).Format(time.RFC3339Nano),
		}
		for _, stamp := range stamps {
			for _, org := range []string{"", "|acme"} {
				f := fields{"ip": "192.0.2.1", "region": "eu", "timestamp": stamp, "id_org": "acme", "version": "1", "status": "s"}
				w.must(w.register(f.with("signature", k.sign(fmt.Sprintf("192.0.2.1|eu|%v%s", stamp, org)))))
				without := f.with("region", nil)
				for _, line := range []string{"192.0.2.1||%v%s", "192.0.2.1|%v%s"} {
					signature := k.sign(fmt.Sprintf(line, stamp, org))
					if _, ok := errors.AsType[*node.InputError](w.register(without.with("signature", signature))); !ok {
						t.Error("registered without a region")
					}
					w.want("register under a line without its region", w.register(f.with("signature", signature)), node.ErrSignature)
					w.must(w.unregister(without.with("signature", signature)))
					w.must(w.register(k.signedAt("192.0.2.1", w.now())))
				}
			}
		}
	})
}

func TestStaleTimestampsAreRefused(t *testing.T) {
	onBoth(t, func(t *testing.T, w *world) {
		k := w.release("acme")
		for _, off := range []time.Duration{-301 * time.Second, 301 * time.Second, -time.Hour} {
			w.want(off.String(), w.register(k.signedAt("192.0.2.1", w.now().Add(off))), node.ErrStale)
		}
		for _, off := range []time.Duration{-299 * time.Second, 299 * time.Second} {
			w.must(w.register(k.signedAt("192.0.2.1", w.now().Add(off))))
		}
	})
}

func TestStrangersAllHearTheSame(t *testing.T) {
	onBoth(t, func(t *testing.T, w *world) {
		k, other := w.release("acme"), w.release("other")
		dead := w.release("acme")
		w.deleteKey(dead)
		good := k.signedAt("192.0.2.1", w.now())
		for name, f := range map[string]fields{
			"unknown organization":          good.with("id_org", "nobody"),
			"another organization's key":    other.signedAt("192.0.2.1", w.now()).with("id_org", "acme"),
			"a deleted key":                 dead.signedAt("192.0.2.1", w.now()),
			"another ip":                    good.with("ip", "192.0.2.2"),
			"another text of the same ip":   good.with("ip", "::ffff:192.0.2.1"),
			"another region":                good.with("region", "us"),
			"another timestamp":             good.with("timestamp", strconv.FormatInt(w.now().UnixMilli()+5, 10)),
			"no signature but base64":       good.with("signature", "AAAA"),
			"another organization's suffix": good.with("signature", k.sign("192.0.2.1|eu|"+good["timestamp"].(string)+"|other")),
		} {
			w.want(name+", registering", w.register(f), node.ErrSignature)
			w.want(name+", unregistering", w.unregister(f), node.ErrSignature)
			_, err := w.secrets(f)
			w.want(name+", fetching", err, node.ErrSignature)
		}
		if nodes := w.nodes("acme"); len(nodes) != 0 {
			t.Errorf("nodes %v", nodes)
		}
	})
}

// What no key, secret or node can be called is as unknown as what there is none
// of: PostgreSQL refuses texts with U+0000 or bytes that are no UTF-8.
func TestNamedByWhatDatabasesRefuse(t *testing.T) {
	onBoth(t, func(t *testing.T, w *world) {
		k := w.release("acme")
		for _, name := range []string{"\x00", "a\x00b", "\xff", "a\xc3", "", "A", strings.Repeat("x", 1<<10)} {
			w.want(fmt.Sprintf("deleting secret %.20q", name), w.service.DeleteSecret(t.Context(), by("acme", authz.Owner), "acme", name), node.ErrSecretNotFound)
			if !utf8.ValidString(name) { // JSON has none
				continue
			}
			good := k.signedAt("192.0.2.1", w.now())
			w.must(w.register(good.with("key_id", name)))
			w.want(fmt.Sprintf("key_id %.20q", name), w.register(good.with("key_id", name).with("region", "us")), node.ErrSignature)
		}
	})
}

func TestSameRequestAgainChangesNothing(t *testing.T) {
	onBoth(t, func(t *testing.T, w *world) {
		k := w.release("acme")
		f := k.signedAt("192.0.2.1", w.now())
		w.must(w.register(f))
		first := w.nodes("acme")
		w.must(w.register(f))
		w.must(w.another().Register(t.Context(), there, f.with("unknown", 1).with("org_id", "acme").body()))
		if again := w.nodes("acme"); again[0] != first[0] {
			t.Errorf("was %+v, is %+v", first[0], again[0])
		}
		bye := k.signedAt("192.0.2.1", w.now().Add(time.Second))
		w.must(w.unregister(bye))
		w.must(w.unregister(bye))
		w.must(w.register(f))
		if nodes := w.nodes("acme"); len(nodes) != 0 {
			t.Errorf("an old registration brought the node back: %v", nodes)
		}
		got := w.events()
		want := []string{
			"orgkey.created", "node.registered created", "node.listed", "node.registered repeated", "node.registered repeated",
			"node.listed", "node.unregistered deleted", "node.unregistered repeated", "node.registered repeated", "node.listed",
		}
		if !slices.Equal(got, want) {
			t.Errorf("events %q", got)
		}
	})
}

func TestSignatureHasOneMeaning(t *testing.T) {
	onBoth(t, func(t *testing.T, w *world) {
		k := w.release("acme")
		f := k.signedAt("192.0.2.1", w.now())
		w.must(w.register(f))
		replica := w.another()
		w.want("another status", w.register(f.with("status", "off")), node.ErrReused)
		w.want("another status, another replica", replica.Register(t.Context(), there, f.with("status", "off").body()), node.ErrReused)
		w.want("a url", w.register(f.with("url", "https://evil")), node.ErrReused)
		w.want("the other endpoint", w.unregister(f), node.ErrReused)
		if n := w.nodes("acme"); len(n) != 1 || n[0].Status != "active" || n[0].URL != "" {
			t.Errorf("nodes %v", n)
		}
		w.deleteKey(k)
		w.want("after the key was deleted", w.register(f), node.ErrSignature)
		if got := w.events(); !slices.Contains(got, "request.failed failure signature_reused") {
			t.Errorf("events %q", got)
		}
	})
}

// An earlier version recorded uses without the time that their lines name.
func TestAUseThatAnEarlierVersionRecordedIsOne(t *testing.T) {
	onBoth(t, func(t *testing.T, w *world) {
		k := w.release("acme")
		f := k.signedAt("192.0.2.1", w.now())
		w.must(w.register(f))
		w.exec("UPDATE signature_uses SET stamp = 0")
		w.want("another status", w.register(f.with("status", "off")), node.ErrReused)
		w.want("the other endpoint", w.unregister(f), node.ErrReused)
		w.must(w.register(f))
		w.ahead.Store(int64(620 * time.Second))
		if n := w.forget(); n != 1 {
			t.Errorf("%d uses are forgotten, want the one", n)
		}
	})
}

func TestTimestampAheadIsNotReplayableLater(t *testing.T) {
	onBoth(t, func(t *testing.T, w *world) {
		k := w.release("acme")
		f := k.signedAt("192.0.2.1", w.now().Add(290*time.Second))
		w.must(w.register(f))
		w.ahead.Store(int64(310 * time.Second))
		w.forget()
		w.want("310 s later", w.register(f.with("status", "off")), node.ErrReused)
		w.ahead.Store(int64(591 * time.Second))
		w.forget()
		w.want("301 s after its timestamp", w.register(f.with("status", "off")), node.ErrStale)
	})
}

// forget removes the uses that have expired. The store's clock goes with the
// world's: what it wrote down is moved back instead.
func (w *world) forget() int {
	w.t.Helper()
	passed := w.ahead.Load() - w.passed
	w.passed += passed
	w.exec("UPDATE signature_uses SET until = until - $1", passed/1000)
	n, err := w.db.ForgetUses(w.t.Context(), 1000)
	w.must(err)
	return n
}

// Promise 7: replicas agree on what is a replay whatever their clocks say: the
// database's decides when a use is forgotten, and refuses one that comes later.
func TestPromise7_AReplicasClockDecidesNothing(t *testing.T) {
	onBoth(t, func(t *testing.T, w *world) {
		k := w.release("acme")
		at := func(off time.Duration) *node.Service {
			return w.with(func(c *node.Config) { c.Now = func() time.Time { return time.Now().Add(off) } })
		}
		f := k.signedAt("192.0.2.1", w.now())
		w.must(w.register(f))
		forgetful, stop := context.WithTimeout(t.Context(), 300*time.Millisecond)
		defer stop()
		w.must(at(10*time.Minute).Keep(forgetful, 10*time.Millisecond))
		w.want("a captured registration, after a replica with a fast clock has forgotten", w.register(f.with("status", "off")), node.ErrReused)

		slow := at(-10 * time.Minute)
		captured := k.signedAt("192.0.2.1", w.now().Add(-10*time.Minute))
		w.want("one from ten minutes ago, to a replica with a slow clock", slow.Register(t.Context(), there, captured.with("status", "off").body()), node.ErrStale)
		w.want("an unregistration", slow.Unregister(t.Context(), there, captured.body()), node.ErrStale)
		if n := len(w.nodes("acme")); n != 1 {
			t.Errorf("%d nodes", n)
		}
	})
}

// What a clock wrote down that was set back since is shown as now, and gives way
// to the next use.
func TestTimesFromTheFutureGiveWay(t *testing.T) {
	onBoth(t, func(t *testing.T, w *world) {
		k := w.release("acme")
		w.must(w.register(k.signedAt("192.0.2.1", w.now())))
		w.exec("UPDATE org_keys SET last_used_at = created_at + $1", time.Hour.Microseconds())
		w.exec("UPDATE nodes SET seen_at = updated_at + $1", time.Hour.Microseconds())
		shown := func(what string) {
			t.Helper()
			keys, err := w.db.Keys(t.Context(), "acme")
			w.must(err)
			for name, at := range map[string]time.Time{"lastUsed": keys[0].LastUsed, "seen": w.nodes("acme")[0].Seen} {
				if time.Since(at).Abs() > time.Minute {
					t.Errorf("%s: %s is %s", what, name, at)
				}
			}
		}
		shown("before the next use")
		w.must(w.db.Seen(t.Context(), map[string]time.Duration{k.id: time.Second},
			map[node.Contact]time.Duration{{Ref: node.Ref{Org: "acme", IP: w.nodes("acme")[0].IP}, Key: k.id}: time.Second}))
		shown("after it")
		var ahead int
		w.must(w.raw.QueryRow("SELECT (SELECT count(*) FROM org_keys WHERE last_used_at > $1) + (SELECT count(*) FROM nodes WHERE seen_at > $1)", time.Now().Add(time.Minute).UnixMicro()).Scan(&ahead))
		if ahead != 0 {
			t.Errorf("%d times are in the future still", ahead)
		}
	})
}

func TestUsesAreForgottenAMinuteAfterTheWindow(t *testing.T) {
	onBoth(t, func(t *testing.T, w *world) {
		k := w.release("acme")
		w.must(w.register(k.signedAt("192.0.2.1", w.now())))
		w.ahead.Store(int64(359 * time.Second))
		if n := w.forget(); n != 0 {
			t.Errorf("%d forgotten after 359 s", n)
		}
		w.ahead.Store(int64(361 * time.Second))
		if n := w.forget(); n != 1 {
			t.Errorf("%d forgotten after 361 s", n)
		}
	})
}

func TestWhatFailsUsesNothingUp(t *testing.T) {
	onBoth(t, func(t *testing.T, w *world) {
		k := w.release("acme")
		f := k.signedAt("192.0.2.1", w.now())
		w.want("unregistering nobody", w.unregister(f), node.ErrNodeNotFound)
		w.must(w.register(f))
	})
}

// Deployed scripts fetch and register within one second, and sign the same line.
func TestFetchingNeitherUsesUpNorMindsUses(t *testing.T) {
	onBoth(t, func(t *testing.T, w *world) {
		k := w.release("acme")
		f := k.signedAt("192.0.2.1", w.now())
		for range 2 {
			if _, err := w.secrets(f); err != nil {
				t.Fatal(err)
			}
		}
		w.must(w.register(f))
		if _, err := w.secrets(f); err != nil {
			t.Error(err)
		}
	})
}

func TestConcurrentUsesOfOneSignatureHaveOneMeaning(t *testing.T) {
	onBoth(t, func(t *testing.T, w *world) {
		k := w.release("acme")
		f := k.signedAt("192.0.2.1", w.now())
		var mu sync.Mutex
		served := map[string]int{}
		var wg sync.WaitGroup
		for i := range 40 {
			status := "s" + strconv.Itoa(i%2)
			wg.Go(func() {
				err := w.register(f.with("status", status))
				mu.Lock()
				defer mu.Unlock()
				switch {
				case err == nil:
					served[status]++
				case !errors.Is(err, node.ErrReused):
					t.Error(err)
				}
			})
		}
		wg.Wait()
		if nodes := w.nodes("acme"); len(served) != 1 || len(nodes) != 1 || served[nodes[0].Status] != 20 {
			t.Errorf("served %v, nodes %v", served, nodes)
		}
		count := map[string]int{}
		for _, e := range w.events() {
			count[e]++
		}
		if count["node.registered created"] != 1 || count["node.registered repeated"] != 19 || count["request.failed failure signature_reused"] != 20 {
			t.Errorf("events %v", count)
		}
	})
}

func TestAllFormsOfAnAddressAreOneNode(t *testing.T) {
	onBoth(t, func(t *testing.T, w *world) {
		k := w.release("acme")
		for i, ip := range []string{"2001:db8::1", "2001:DB8:0:0::1", "192.0.2.1", "::ffff:192.0.2.1", "::ffff:c000:201"} {
			w.must(w.register(k.signedAt(ip, w.now().Add(time.Duration(i)*time.Second))))
		}
		if nodes := w.nodes("acme"); len(nodes) != 2 || nodes[0].IP.String() != "192.0.2.1" || nodes[1].IP.String() != "2001:db8::1" {
			t.Errorf("nodes %v", nodes)
		}
	})
}

func TestDeletedNodeComesBackByRegistering(t *testing.T) {
	onBoth(t, func(t *testing.T, w *world) {
		k := w.release("acme")
		w.release("other")
		w.must(w.register(k.signedAt("192.0.2.1", w.now())))
		id := w.nodes("acme")[0].ID
		admin := by("acme", authz.Administrator)
		w.must(w.service.Delete(t.Context(), admin, "acme", id))
		w.want("again", w.service.Delete(t.Context(), admin, "acme", id), node.ErrAlreadyDeleted)
		w.want("no such node", w.service.Delete(t.Context(), admin, "acme", "x"), node.ErrNodeNotFound)
		w.want("another organization's", w.service.Delete(t.Context(), by("other", authz.Owner), "other", id), node.ErrNodeNotFound)
		if nodes := w.nodes("acme"); len(nodes) != 0 {
			t.Errorf("listed: %v", nodes)
		}
		w.want("unregistering it", w.unregister(k.signedAt("192.0.2.1", w.now().Add(time.Second))), node.ErrNodeNotFound)
		w.must(w.register(k.signedAt("192.0.2.1", w.now().Add(2*time.Second))))
		if nodes := w.nodes("acme"); len(nodes) != 1 || nodes[0].ID != id {
			t.Errorf("came back as %v", nodes)
		}
	})
}

func TestPolicyDecidesForPeople(t *testing.T) {
	onBoth(t, func(t *testing.T, w *world) {
		ctx := t.Context()
		for name, ask := range map[string]func(gate.Call) error{
			"delete":        func(c gate.Call) error { return w.service.Delete(ctx, c, "acme", "x") },
			"put secret":    func(c gate.Call) error { return w.service.PutSecret(ctx, c, "acme", "a", []byte("v")) },
			"list secrets":  func(c gate.Call) error { _, err := w.service.ListSecrets(ctx, c, "acme"); return err },
			"delete secret": func(c gate.Call) error { return w.service.DeleteSecret(ctx, c, "acme", "a") },
		} {
			denied, ok := errors.AsType[*gate.DeniedError](ask(by("acme", authz.Billing)))
			if !ok || denied.Reason != authz.InsufficientRole {
				t.Errorf("%s by BILLING: %v", name, denied)
			}
			denied, ok = errors.AsType[*gate.DeniedError](ask(by("other", authz.Owner)))
			if !ok || denied.Reason != authz.OtherOrganization {
				t.Errorf("%s by a stranger: %v", name, denied)
			}
		}
		_, err := w.service.List(ctx, by("other", authz.Owner), "acme")
		if denied, ok := errors.AsType[*gate.DeniedError](err); !ok || denied.Reason != authz.OtherOrganization {
			t.Errorf("listing by a stranger: %v", err)
		}
	})
}

// nodeKeys returns "ip" or "ip?" (unconfirmed) for each association of k.
func (w *world) nodeKeys(k key) string {
	w.t.Helper()
	records, err := w.db.Keys(w.t.Context(), k.org)
	w.must(err)
	var ips []string
	for _, r := range records {
		for _, n := range r.Nodes {
			if r.ID != k.id {
				continue
			}
			if !n.Confirmed {
				n.NodeID += "?"
			}
			ips = append(ips, n.NodeID)
		}
	}
	return strings.Join(ips, " ")
}

func TestNewKeyIsAssociatedWithRegisteredNodes(t *testing.T) {
	onBoth(t, func(t *testing.T, w *world) {
		first, unused := w.release("acme"), w.release("acme")
		w.must(w.register(first.signedAt("192.0.2.1", w.now())))
		w.must(w.register(first.signedAt("192.0.2.2", w.now())))
		second := w.release("acme")
		foreign := w.release("other")
		w.must(w.register(second.signedAt("192.0.2.1", w.now())))
		w.must(w.register(second.signedAt("192.0.2.3", w.now())))
		for _, c := range []struct {
			name, want string
			key        key
		}{
			{"the key they registered with", "192.0.2.2 192.0.2.1", first},
			{"a key from before they registered", "", unused},
			{"a key from after", "192.0.2.3 192.0.2.2? 192.0.2.1", second},
			{"another organization's", "", foreign},
		} {
			if got := w.nodeKeys(c.key); got != c.want {
				t.Errorf("%s: %q, want %q", c.name, got, c.want)
			}
		}
		w.must(w.unregister(second.signedAt("192.0.2.1", w.now().Add(time.Second))))
		if got := w.nodeKeys(first) + ", " + w.nodeKeys(second); got != "192.0.2.2, 192.0.2.3 192.0.2.2?" {
			t.Errorf("after a node was deleted: %s", got)
		}
		w.deleteKey(first)
		if got := w.nodeKeys(first) + ", " + w.nodeKeys(second); got != ", 192.0.2.3 192.0.2.2?" {
			t.Errorf("after a key was deleted: %s", got)
		}
		w.must(w.register(second.signedAt("192.0.2.1", w.now().Add(2*time.Second))))
		if got := w.nodeKeys(second); got != "192.0.2.1 192.0.2.3 192.0.2.2?" {
			t.Errorf("after it came back: %s", got)
		}
	})
}

// Whoever rotates a key waits until every node has signed with the new one.
// Fetching secrets is signing.
func TestFetchingConfirmsAnAssociation(t *testing.T) {
	onBoth(t, func(t *testing.T, w *world) {
		first := w.release("acme")
		w.must(w.register(first.signedAt("192.0.2.1", w.now())))
		w.must(w.register(first.signedAt("192.0.2.2", w.now())))
		second := w.release("acme")
		w.ahead.Store(int64(time.Second))
		for _, k := range []key{first, second} {
			for _, ip := range []string{"192.0.2.1", "192.0.2.99"} {
				if _, err := w.secrets(k.signedAt(ip, w.now())); err != nil {
					t.Fatal(err)
				}
			}
		}
		ctx, stop := context.WithCancel(t.Context())
		stop()
		w.must(w.service.Keep(ctx, time.Hour))
		if got := w.nodeKeys(first) + ", " + w.nodeKeys(second); got != "192.0.2.2 192.0.2.1, 192.0.2.2? 192.0.2.1" {
			t.Errorf("associations %s", got)
		}
	})
}

func TestSecretsReachTheHolderOfAKey(t *testing.T) {
	onBoth(t, func(t *testing.T, w *world) {
		k, other := w.release("acme"), w.release("other")
		ctx, admin := t.Context(), by("acme", authz.Owner)
		w.must(w.service.PutSecret(ctx, admin, "acme", "env_s3", []byte("A=old")))
		w.must(w.service.PutSecret(ctx, admin, "acme", "env_s3", []byte("A=1")))
		w.must(w.service.PutSecret(ctx, admin, "acme", "env_gcs", []byte("B=2")))
		got, err := w.secrets(k.signedAt("192.0.2.1", w.now()))
		w.must(err)
		var opened []string
		for _, e := range got {
			secret, err := envelope.Open(k.private, e.Text)
			w.must(err)
			opened = append(opened, e.Name+" "+string(secret))
		}
		if !slices.Equal(opened, []string{"env_gcs B=2", "env_s3 A=1"}) {
			t.Errorf("got %q", opened)
		}
		if got, err = w.secrets(other.signedAt("192.0.2.1", w.now())); err != nil || len(got) != 0 {
			t.Errorf("another organization got %v, %v", got, err)
		}
		w.must(w.service.DeleteSecret(ctx, admin, "acme", "env_gcs"))
		w.want("deleting it again", w.service.DeleteSecret(ctx, admin, "acme", "env_gcs"), node.ErrSecretNotFound)
		listed, err := w.service.ListSecrets(ctx, admin, "acme")
		if err != nil || len(listed) != 1 || listed[0].Name != "env_s3" || !listed[0].Updated.After(listed[0].Created) {
			t.Errorf("listed %v, %v", listed, err)
		}
		for _, want := range []string{"secret.put", "secret.fetched", "secret.deleted", "request.failed failure not_found", "secret.listed"} {
			if !slices.Contains(w.events(), want) {
				t.Errorf("no event %q", want)
			}
		}
	})
}

func TestRefusedSecrets(t *testing.T) {
	onBoth(t, func(t *testing.T, w *world) {
		ctx, admin := t.Context(), by("acme", authz.Owner)
		for _, name := range []string{"", "Env", "1env", "_env", "env-s3", "../env", "env\n", strings.Repeat("a", 65)} {
			if _, ok := errors.AsType[*node.InputError](w.service.PutSecret(ctx, admin, "acme", name, []byte("v"))); !ok {
				t.Errorf("name %q is accepted", name)
			}
		}
		for _, value := range [][]byte{nil, make([]byte, 64<<10+1)} {
			if _, ok := errors.AsType[*node.InputError](w.service.PutSecret(ctx, admin, "acme", "a", value)); !ok {
				t.Errorf("%d bytes are accepted", len(value))
			}
		}
		w.must(w.service.PutSecret(ctx, admin, "acme", strings.Repeat("a", 64), make([]byte, 64<<10)))
		for i := range node.MaxSecrets - 1 {
			w.must(w.service.PutSecret(ctx, admin, "acme", "s"+strconv.Itoa(i), []byte("v")))
		}
		w.want("one too many", w.service.PutSecret(ctx, admin, "acme", "z", []byte("v")), node.ErrTooManySecrets)
		w.must(w.service.PutSecret(ctx, admin, "acme", "s0", []byte("w")))
	})
}

// An organization whose nodes do not read their answers leaves memory for others'.
func TestSlowReadersOfSecretsLeaveMemoryForOtherOrganizations(t *testing.T) {
	t.Parallel()
	w := newWorld(t, filepath.Join(t.TempDir(), "orgkeys.db"))
	value := make([]byte, 64<<10)
	orgs := []org.ID{"slow", "large", "small"}
	keys := map[org.ID]key{}
	for _, o := range orgs {
		keys[o] = w.release(o)
		n := node.MaxSecrets
		if o == "small" {
			n, value = 3, []byte("A=1")
		}
		for i := range n {
			w.must(w.service.PutSecret(t.Context(), by(o, authz.Owner), o, "s"+strconv.Itoa(i), value))
		}
	}
	fetch := func(ctx context.Context, o org.ID, deliver func([]node.Envelope) error) error {
		return w.service.Secrets(ctx, here, keys[o].signedAt("192.0.2.1", w.now()).body(), deliver)
	}
	atOnce := func([]node.Envelope) error { return nil }
	read := make(chan struct{})
	// hold has an organization fetch without reading, as often as it can.
	hold := func(o org.ID) (held int) {
		for ; ; held++ {
			reading, ended := make(chan struct{}), make(chan error, 1)
			go func() {
				ended <- fetch(t.Context(), o, func([]node.Envelope) error {
					close(reading)
					<-read
					return nil
				})
			}()
			select {
			case <-reading:
			case err := <-ended:
				w.want("an answer too many", err, node.ErrBusy)
				return held
			}
		}
	}
	if n := hold("slow"); n < 2 || n > 6 {
		t.Errorf("one organization holds %d answers of 8 MiB", n)
	}
	w.must(fetch(t.Context(), "large", atOnce))
	hold("large")
	waiting := make(chan error)
	go func() { waiting <- fetch(t.Context(), "large", atOnce) }()
	w.must(fetch(t.Context(), "small", atOnce))
	w.want("an answer for which there is no memory", <-waiting, node.ErrBusy)
	close(read)
	w.must(fetch(t.Context(), "slow", atOnce))
}

func TestMovedSecretDoesNotOpen(t *testing.T) {
	onBoth(t, func(t *testing.T, w *world) {
		k := w.release("acme")
		foreign, err := token.Seal(t.Context(), orgkey.Binding{Purpose: orgkey.BootSecret, Org: "other", ID: "env_s3"}, []byte("theirs"))
		w.must(err)
		w.must(w.db.PutSecret(t.Context(), "acme", node.SealedSecret{Name: "env_s3", Sealed: foreign}, 64, audit.New(audit.SecretPut, "acme")))
		got, err := w.secrets(k.signedAt("192.0.2.1", w.now()))
		w.want("a secret moved from another organization", err, node.ErrSecretBroken)
		if got != nil {
			t.Errorf("got %v", got)
		}
	})
}

// What went out once goes to the key's other nodes without the back end, and to nobody
// else; and never for a secret that was changed, deleted or moved.
func TestWhatIsRememberedOfEnvelopesIsWhatIsStored(t *testing.T) {
	onBoth(t, func(t *testing.T, w *world) {
		k, second := w.release("acme"), w.release("acme")
		ctx, admin := t.Context(), by("acme", authz.Owner)
		w.must(w.service.PutSecret(ctx, admin, "acme", "env_s3", []byte("A=1")))
		w.must(w.service.PutSecret(ctx, admin, "acme", "env_gcs", []byte("B=2")))
		w.must(w.service.PutSecret(ctx, admin, "acme", "env_long", bytes.Repeat([]byte("L"), 4<<10)))
		fetched := func(k key, ip string, unsealed int64, want ...string) {
			t.Helper()
			before := w.opened.Load()
			got, err := w.secrets(k.signedAt(ip, w.now()))
			w.must(err)
			var opened []string
			for _, e := range got {
				secret, err := envelope.Open(k.private, e.Text)
				w.must(err)
				opened = append(opened, e.Name+" "+string(secret[:3]))
			}
			if !slices.Equal(opened, want) {
				t.Errorf("%s got %q, want %q", ip, opened, want)
			}
			if n := w.opened.Load() - before; n != unsealed {
				t.Errorf("%s: %d values were unsealed, want %d", ip, n, unsealed)
			}
		}
		w.must(w.register(second.signedAt("192.0.2.9", w.now()))) // from here on no key is unsealed
		w.must(w.register(k.signedAt("192.0.2.9", w.now().Add(time.Second))))
		fetched(k, "192.0.2.1", 3, "env_gcs B=2", "env_long LLL", "env_s3 A=1")
		fetched(k, "192.0.2.2", 1, "env_gcs B=2", "env_long LLL", "env_s3 A=1")
		fetched(second, "192.0.2.3", 3, "env_gcs B=2", "env_long LLL", "env_s3 A=1")
		w.must(w.service.PutSecret(ctx, admin, "acme", "env_more", bytes.Repeat([]byte("M"), 8<<10)))
		fetched(k, "192.0.2.2", 2, "env_gcs B=2", "env_long LLL", "env_more MMM", "env_s3 A=1")
		w.must(w.service.DeleteSecret(ctx, admin, "acme", "env_more"))
		w.must(w.service.DeleteSecret(ctx, admin, "acme", "env_long"))
		w.must(w.service.PutSecret(ctx, admin, "acme", "env_s3", []byte("A=2")))
		fetched(k, "192.0.2.1", 1, "env_gcs B=2", "env_s3 A=2")
		w.ahead.Store(int64(6 * time.Minute))
		fetched(k, "192.0.2.1", 2, "env_gcs B=2", "env_s3 A=2")
		w.exec("UPDATE boot_secrets SET sealed = (SELECT s.sealed FROM boot_secrets s WHERE s.name = 'env_s3') WHERE name = 'env_gcs'")
		_, err := w.secrets(k.signedAt("192.0.2.1", w.now()))
		w.want("a secret moved to another name", err, node.ErrSecretBroken)
	})
}

// Promise 6: what a replica remembers of a key makes it act for nobody: a deleted key is
// refused at once, one whose record was damaged likewise, and one that was sealed anew goes on.
func TestPromise6_ARememberedKeyIsComparedWithWhatIsStored(t *testing.T) {
	onBoth(t, func(t *testing.T, w *world) {
		k, other := w.release("acme"), w.release("acme")
		w.must(w.service.PutSecret(t.Context(), by("acme", authz.Owner), "acme", "env_s3", []byte("A=1")))
		remembering := func(k key) {
			t.Helper()
			for range 2 {
				if _, err := w.secrets(k.signedAt("192.0.2.1", w.now())); err != nil {
					t.Fatal(err)
				}
			}
		}
		refused := func(what string) {
			t.Helper()
			before := w.events()
			_, err := w.secrets(k.signedAt("192.0.2.1", w.now()))
			w.want(what+": secrets", err, node.ErrSignature)
			w.want(what+": register", w.register(k.signedAt("192.0.2.1", w.now())), node.ErrSignature)
			w.want(what+": unregister", w.unregister(k.signedAt("192.0.2.1", w.now()).with("version", nil).with("status", nil)), node.ErrSignature)
			if after := w.events(); len(after) != len(before)+1 { // before's own reading
				t.Errorf("%s: events %v", what, after[len(before):])
			}
		}
		remembering(k)
		der, err := x509.MarshalPKIXPublicKey(&k.private.PublicKey)
		w.must(err)
		anew, err := token.Seal(t.Context(), orgkey.PublicKeyOf("acme", k.id), der)
		w.must(err)
		w.exec("UPDATE org_keys SET sealed = $1 WHERE id = $2", anew, k.id)
		w.must(w.register(k.signedAt("192.0.2.1", w.now())))

		remembering(k)
		w.exec("UPDATE org_keys SET sealed = (SELECT o.sealed FROM org_keys o WHERE o.id = $1) WHERE id = $2", other.id, k.id)
		refused("with another key's record")
		w.exec("UPDATE org_keys SET sealed = $1 WHERE id = $2", anew, k.id)

		remembering(k)
		w.deleteKey(k)
		refused("deleted")
		remembering(other)
	})
}

// stuck is a sink that never acknowledges.
type stuck struct{ audit.Sink }

func (stuck) Append(context.Context, []audit.Entry, audit.Checkpoint) ([][]byte, error) {
	return nil, errors.New("stuck")
}

func TestNoSecretBeforeItsEventIsAcknowledged(t *testing.T) {
	w := newWorld(t, filepath.Join(t.TempDir(), "orgkeys.db"), stuck{audit.NewFileSink(filepath.Join(t.TempDir(), "audit.jsonl"))})
	w.service = w.with(func(c *node.Config) { c.AuditDeadline = 200 * time.Millisecond })
	k := w.release("acme")
	w.must(w.service.PutSecret(t.Context(), by("acme", authz.Owner), "acme", "env_s3", []byte("A=1")))
	got, err := w.secrets(k.signedAt("192.0.2.1", w.now()))
	w.want("a sink that does not acknowledge", err, gate.ErrAudit)
	if got != nil {
		t.Errorf("got %v", got)
	}
	w.must(w.register(k.signedAt("192.0.2.1", w.now())))
}

func TestFailuresNeitherLockOutNorCount(t *testing.T) {
	onBoth(t, func(t *testing.T, w *world) {
		k := w.release("acme")
		bad := k.signedAt("192.0.2.1", w.now()).with("signature", "AAAA")
		for range 30 {
			w.want("within the limit", w.register(bad), node.ErrSignature)
		}
		w.want("past it", w.register(bad), node.ErrTooManyFailures)
		w.want("an unknown organization", w.register(bad.with("id_org", "nobody")), node.ErrTooManyFailures)
		w.want("from elsewhere", w.service.Register(t.Context(), there, bad.body()), node.ErrSignature)
		w.must(w.register(k.signedAt("192.0.2.1", w.now())))
		w.must(w.service.Register(t.Context(), there, k.signedAt("192.0.2.2", w.now()).body()))
		w.ahead.Store(int64(time.Minute))
		w.want("a minute later", w.register(k.signedAt("192.0.2.1", w.now()).with("signature", "AAAA")), node.ErrSignature)
		for range 100 {
			w.must(w.register(k.signedAt("192.0.2.1", w.now())))
		}
	})
}

func TestStrangersCauseNoUnsealing(t *testing.T) {
	onBoth(t, func(t *testing.T, w *world) {
		k := w.release("acme")
		w.release("acme")
		var wg sync.WaitGroup
		for i := range 50 {
			from := node.Origin{Address: fmt.Sprintf("2001:db8:0:%x::1", i)}
			wg.Go(func() {
				w.want("bad", w.service.Register(t.Context(), from, k.signedAt("192.0.2.1", w.now()).with("signature", "AAAA").body()), node.ErrSignature)
			})
		}
		wg.Wait()
		if n := w.opened.Load(); n > 6 {
			t.Errorf("50 requests unsealed %d values", n)
		}
		before := w.opened.Load()
		w.must(w.register(k.signedAt("192.0.2.1", w.now())))
		if w.opened.Load() != before {
			t.Error("a registration unsealed again")
		}
	})
}

// One damaged record takes neither the organization's other keys with it, nor
// does it open a way to the sealer for strangers.
func TestDamagedKeyCannotVerifyAndOthersCan(t *testing.T) {
	onBoth(t, func(t *testing.T, w *world) {
		k, damaged := w.release("acme"), w.releaseSealedFor("acme", "other")
		w.must(w.register(k.signedAt("192.0.2.1", w.now())))
		w.want("by the damaged key", w.register(damaged.signedAt("192.0.2.2", w.now())), node.ErrSignature)
		asked := w.asked.Load()
		bad := k.signedAt("192.0.2.1", w.now()).with("signature", "AAAA")
		for range 29 { // with the one above as many as an address may have at once
			w.want("a stranger", w.register(bad), node.ErrSignature)
		}
		w.want("a stranger too often", w.register(bad), node.ErrTooManyFailures)
		w.must(w.register(k.signedAt("192.0.2.3", w.now())))
		if n := w.asked.Load() - asked; n != 0 {
			t.Errorf("the sealer was asked %d times more", n)
		}
		w.ahead.Store(int64(61 * time.Second))
		w.want("by the damaged key", w.register(damaged.signedAt("192.0.2.2", w.now())), node.ErrSignature)
		if n := w.asked.Load() - asked; n != 1 {
			t.Errorf("after a minute the sealer was asked %d times more, want 1", n)
		}
		only := w.releaseSealedFor("lonely", "other")
		w.want("an organization whose one key is damaged", w.service.Register(t.Context(), there, only.signedAt("192.0.2.1", w.now()).body()), node.ErrSignature)
	})
}

// A back end that cannot be asked says nothing about keys: it is the service's
// failure, nobody's signature, and over when it is back.
func TestUnavailableSealerIsNoVerdictOnKeys(t *testing.T) {
	onBoth(t, func(t *testing.T, w *world) {
		k := w.release("acme")
		w.down.Store(true)
		for range 40 {
			w.want("while it is down", w.register(k.signedAt("192.0.2.1", w.now())), orgkey.ErrUnavailable)
		}
		w.down.Store(false)
		w.must(w.register(k.signedAt("192.0.2.1", w.now())))
	})
}

func TestLastUseAndLastSightAreWrittenDown(t *testing.T) {
	onBoth(t, func(t *testing.T, w *world) {
		k, idle := w.release("acme"), w.release("acme")
		w.must(w.register(k.signedAt("192.0.2.1", w.now())))
		w.exec("UPDATE nodes SET seen_at = seen_at - 60000000") // a minute passes
		registered := w.nodes("acme")[0]
		for _, ip := range []string{"192.0.2.1", "192.0.2.99"} {
			if _, err := w.secrets(k.signedAt(ip, w.now())); err != nil {
				t.Fatal(err)
			}
		}
		ctx, stop := context.WithCancel(t.Context())
		stop()
		w.must(w.service.Keep(ctx, time.Hour))
		n := w.nodes("acme")[0]
		if n.Seen.Sub(registered.Seen) < 50*time.Second || n.Updated != registered.Updated {
			t.Errorf("seen %s, registered %s", n.Seen, registered.Seen)
		}
		records, err := w.db.Keys(t.Context(), "acme")
		w.must(err)
		for _, r := range records {
			if used := !r.LastUsed.IsZero(); used != (r.ID == k.id) {
				t.Errorf("key %s (idle is %s) used %s", r.ID, idle.id, r.LastUsed)
			}
		}
		past := map[string]time.Duration{k.id: time.Hour}
		w.must(w.db.Seen(t.Context(), past, map[node.Contact]time.Duration{{Ref: node.Ref{Org: "acme", IP: n.IP}, Key: k.id}: time.Hour}))
		if again := w.nodes("acme")[0]; again.Seen != n.Seen {
			t.Errorf("sight moved back to %s", again.Seen)
		}
	})
}
