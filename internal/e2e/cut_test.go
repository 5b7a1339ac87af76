package e2e

import (
	"bytes"
	"crypto/tls"
	"io"
	"strings"
	"testing"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"

	"github.com/orgkeys/orgkeys/internal/e2e/harness"
	"github.com/orgkeys/orgkeys/internal/testca"
)

// TestClientGoneBeforeTheBody: the key is withdrawn, its place free, and the
// log says so.
func TestClientGoneBeforeTheBody(t *testing.T) {
	t.Parallel()
	s := harness.Start(t, harness.Set("ORGKEYS_MAX", "1"))

	t.Run("while the key is being generated", func(t *testing.T) {
		org := harness.Org()
		conn := post(t, s, org, s.Token(t, org, "OWNER"))
		db := s.Database(t)
		harness.Eventually(t, harness.Patience, "a place is taken", func() bool {
			return harness.Number(t, db, `SELECT count(*) FROM org_keys WHERE org_id = ?`, org) == 1
		})
		conn.Close()
		harness.Eventually(t, harness.Patience, "an event says that no key came of it", func() bool {
			return len(s.Sink(t).Find(func(l harness.Leaf) bool {
				return l.Org == org && (l.Type == "orgkey.refused" || l.Type == "orgkey.withdrawn")
			})) == 1
		})
		if n := len(s.List(t, org)); n != 0 {
			t.Errorf("%d keys listed", n)
		}
		s.Generate(t, org)
	})

	t.Run("while the audit sink is slow", func(t *testing.T) {
		org := harness.Org()
		owner := s.Token(t, org, "OWNER")
		settled(t, s)
		slow := s.Interfere(t, s.AuditFile(), syncs, "delay_enter=2000000")
		conn := post(t, s, org, owner)
		db := s.Database(t)
		harness.Eventually(t, harness.Patience, "the key is pending", func() bool {
			return harness.Number(t, db, `SELECT count(*) FROM org_keys WHERE org_id = ? AND state = 'pending'`, org) == 1
		})
		conn.Close()
		withdrawnOnce(t, s, org, "caller_gone")
		slow.Stop(t)
		s.Generate(t, org)
	})
}

// TestClientGoneDuringTheBody uses HTTP/2 and a stream window of a few bytes:
// the server cannot write the key out whole.
func TestClientGoneDuringTheBody(t *testing.T) {
	t.Parallel()
	ca := testca.New(t)
	s := harness.Start(t, harness.TLS(ca, ca.Issue(t, "server")), harness.Set("ORGKEYS_MAX", "1"))

	t.Run("the stream is reset", func(t *testing.T) {
		org := harness.Org()
		h := dialHTTP2(t, s, ca, 64)
		h.post(t, org, s.Token(t, org, "OWNER"))
		part := h.data(t)
		if !bytes.HasPrefix(part, []byte("-----BEGIN RSA PRIVATE KEY-----")) || len(part) > 64 {
			t.Fatalf("the first part of the body is %q", part)
		}
		if err := h.framer.WriteRSTStream(1, http2.ErrCodeCancel); err != nil {
			t.Fatal(err)
		}
		withdrawnOnce(t, s, org, "write_failed")
		s.Generate(t, org)
	})

	t.Run("the connection breaks", func(t *testing.T) {
		org := harness.Org()
		h := dialHTTP2(t, s, ca, 64)
		h.post(t, org, s.Token(t, org, "OWNER"))
		h.data(t)
		h.conn.Close()
		withdrawnOnce(t, s, org, "write_failed")
		s.Generate(t, org)
	})

	t.Run("the client reads no further, for longer than the write deadline", func(t *testing.T) {
		org := harness.Org()
		h := dialHTTP2(t, s, ca, 64)
		h.post(t, org, s.Token(t, org, "OWNER"))
		h.data(t)
		start := time.Now()
		withdrawnOnce(t, s, org, "write_failed")
		if took := time.Since(start); took < 3*time.Second || took > 15*time.Second {
			t.Errorf("withdrawn after %s; the write deadline is 5s", took)
		}
		s.Generate(t, org)
	})

	t.Run("a window that opens bit by bit gets the key whole", func(t *testing.T) {
		org := harness.Org()
		h := dialHTTP2(t, s, ca, 64)
		h.post(t, org, s.Token(t, org, "OWNER"))
		var text []byte
		for !strings.Contains(string(text), "-----END RSA PRIVATE KEY-----\n") {
			part := h.data(t)
			text = append(text, part...)
			if len(part) > 0 {
				if err := h.framer.WriteWindowUpdate(1, uint32(len(part))); err != nil {
					t.Fatal(err)
				}
			}
		}
		harness.ParsePrivate(t, text)
		if n := len(s.List(t, org)); n != 1 {
			t.Errorf("%d keys listed", n)
		}
	})
}

// withdrawnOnce waits for the event that says that org's key was withdrawn and
// why, and checks that the key is gone.
func withdrawnOnce(t *testing.T, s *harness.Server, org, reason string) {
	t.Helper()
	var events []harness.Leaf
	harness.Eventually(t, harness.Patience, "an event says that the key was withdrawn", func() bool {
		events = s.Sink(t).Find(func(l harness.Leaf) bool { return l.Org == org && l.Type == "orgkey.withdrawn" })
		return len(events) > 0
	})
	if len(events) != 1 || events[0].Reason != reason || events[0].Object == "" {
		t.Errorf("events %+v, want one with reason %q", events, reason)
	}
	if n := len(s.List(t, org)); n != 0 {
		t.Errorf("%d keys listed", n)
	}
}

// http2Client is a connection on which a test decides about every frame.
type http2Client struct {
	conn   *tls.Conn
	framer *http2.Framer
}

// dialHTTP2 connects with an initial stream window of the given size.
func dialHTTP2(t *testing.T, s *harness.Server, ca *testca.CA, window uint32) *http2Client {
	t.Helper()
	conn, err := tls.Dial("tcp", strings.TrimPrefix(s.API, "https://"), &tls.Config{RootCAs: ca.Pool(), NextProtos: []string{"h2"}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	if p := conn.ConnectionState().NegotiatedProtocol; p != "h2" {
		t.Fatalf("the server speaks %q, not HTTP/2", p)
	}
	conn.SetDeadline(time.Now().Add(2 * harness.Patience))
	if _, err := io.WriteString(conn, http2.ClientPreface); err != nil {
		t.Fatal(err)
	}
	h := &http2Client{conn, http2.NewFramer(conn, conn)}
	if err := h.framer.WriteSettings(http2.Setting{ID: http2.SettingInitialWindowSize, Val: window}); err != nil {
		t.Fatal(err)
	}
	return h
}

func (h *http2Client) post(t *testing.T, org, token string) {
	t.Helper()
	var block bytes.Buffer
	enc := hpack.NewEncoder(&block)
	for _, f := range []hpack.HeaderField{
		{Name: ":method", Value: "POST"}, {Name: ":scheme", Value: "https"}, {Name: ":authority", Value: "127.0.0.1"},
		{Name: ":path", Value: harness.KeyPath(org)}, {Name: "authorization", Value: "Bearer " + token},
	} {
		if err := enc.WriteField(f); err != nil {
			t.Fatal(err)
		}
	}
	err := h.framer.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: block.Bytes(), EndHeaders: true, EndStream: true})
	if err != nil {
		t.Fatal(err)
	}
}

// data returns the next part of the body.
func (h *http2Client) data(t *testing.T) []byte {
	t.Helper()
	for {
		f, err := h.framer.ReadFrame()
		if err != nil {
			t.Fatalf("reading a frame: %v", err)
		}
		switch f := f.(type) {
		case *http2.DataFrame:
			return bytes.Clone(f.Data())
		case *http2.SettingsFrame:
			if !f.IsAck() {
				h.framer.WriteSettingsAck()
			}
		case *http2.PingFrame:
			if !f.IsAck() {
				h.framer.WritePing(true, f.Data)
			}
		case *http2.RSTStreamFrame, *http2.GoAwayFrame:
			t.Fatalf("the server ended the stream: %v", f)
		}
	}
}
