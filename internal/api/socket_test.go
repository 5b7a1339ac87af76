package api

import (
	"bufio"
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

const authorized = "Host: h\r\nAuthorization: Bearer " + token + "\r\n"

// dial opens a plain connection to the API.
func (b *bench) dial() net.Conn {
	b.t.Helper()
	conn, err := net.Dial("tcp", b.address)
	if err != nil {
		b.t.Fatal(err)
	}
	b.t.Cleanup(func() { conn.Close() })
	if err := conn.SetDeadline(time.Now().Add(30 * time.Second)); err != nil {
		b.t.Fatal(err)
	}
	return conn
}

// raw sends bytes as they are and returns the response to them.
func (b *bench) raw(request string) *http.Response {
	b.t.Helper()
	conn := b.dial()
	if _, err := io.WriteString(conn, request); err != nil {
		b.t.Fatal(err)
	}
	resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil {
		b.t.Fatalf("%.80q: %v", request, err)
	}
	return resp
}

func TestRawRequests(t *testing.T) {
	b := newBench(t, nil)
	const list = "GET /organization/acme/key HTTP/1.1\r\n" + authorized
	const post = "POST /organization/acme/key HTTP/1.1\r\n" + authorized
	for _, c := range []struct {
		name, request string
		status        int
	}{
		{"HTTP/1.0", "GET /organization/acme/key HTTP/1.0\r\n" + authorized + "\r\n", 200},
		{"HTTP/1.0 without a host", "GET /healthz HTTP/1.0\r\n\r\n", 200},
		{"HTTP/1.1 without a host", "GET /healthz HTTP/1.1\r\n\r\n", 400},
		{"HTTP/3.0", "GET /healthz HTTP/3.0\r\nHost: h\r\n\r\n", 505},
		{"an absolute URI", "GET http://elsewhere.example/organization/acme/key HTTP/1.1\r\n" + authorized + "\r\n", 200},
		{"an absolute URI of no host", "GET http:///organization/acme/key HTTP/1.1\r\n" + authorized + "\r\n", 200},
		{"an absolute URI without a path", "GET http://elsewhere.example HTTP/1.1\r\n" + authorized + "\r\n", 404},
		{"OPTIONS *", "OPTIONS * HTTP/1.1\r\n" + authorized + "\r\n", 404},
		{"CONNECT", "CONNECT evil.example:443 HTTP/1.1\r\n" + authorized + "\r\n", 404},
		{"CONNECT of a path", "CONNECT /organization/acme/key HTTP/1.1\r\n" + authorized + "\r\n", 405},
		{"TRACE", "TRACE /organization/acme/key HTTP/1.1\r\n" + authorized + "\r\n", 405},
		{"no method", " /healthz HTTP/1.1\r\nHost: h\r\n\r\n", 400},
		{"a method with a colon", "GE:T /healthz HTTP/1.1\r\nHost: h\r\n\r\n", 400},
		{"no path", "GET  HTTP/1.1\r\nHost: h\r\n\r\n", 400},
		{"a control character in the path", "GET /organization/a\x01b/key HTTP/1.1\r\n" + authorized + "\r\n", 400},
		{"a bad escape in the path", "GET /organization/%zz/key HTTP/1.1\r\n" + authorized + "\r\n", 400},
		{"not HTTP", "\x16\x03\x01\x02\x00\r\n\r\n", 400},
		{"a header without a colon", list + "Accept\r\n\r\n", 400},
		{"a header name with a space", list + "Accept : */*\r\n\r\n", 400},
		{"a NUL in a header", list + "X-A: a\x00b\r\n\r\n", 400},
		{"two Content-Lengths", post + "Content-Length: 1\r\nContent-Length: 2\r\n\r\nab", 400},
		{"a list of Content-Lengths", post + "Content-Length: 1, 2\r\n\r\nab", 400},
		{"a negative Content-Length", post + "Content-Length: -1\r\n\r\n", 400},
		{"a Content-Length with a sign", post + "Content-Length: +1\r\n\r\na", 400},
		{"a Content-Length beyond 63 bits", post + "Content-Length: 99999999999999999999\r\n\r\n", 400},
		{"a Content-Length over the limit", post + "Content-Length: 70000\r\n\r\n" + strings.Repeat("a", 70000), 413},
		{"an unknown Transfer-Encoding", post + "Transfer-Encoding: gzip\r\n\r\n", 501},
		{"two Transfer-Encodings", post + "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 501},
		{"Transfer-Encoding and Content-Length", post + "Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n0\r\n\r\n", 200},
		{"a chunked body", post + "Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n", 200},
		{"a chunked body over the limit", post + "Transfer-Encoding: chunked\r\n\r\n11170\r\n" + strings.Repeat("a", 70000) + "\r\n0\r\n\r\n", 413},
		{"a bad chunk length", post + "Transfer-Encoding: chunked\r\n\r\nzz\r\n", 400},
		{"a body that is ignored", post + "Content-Length: 5\r\n\r\nhello", 200},
		{"a body announced by Expect", post + "Expect: something\r\nContent-Length: 5\r\n\r\nhello", 417},
		{"headers of 15 KiB", list + "X-Fill: " + strings.Repeat("a", 15<<10) + "\r\n\r\n", 200},
		{"headers of 17 KiB", list + "X-Fill: " + strings.Repeat("a", 17<<10) + "\r\n\r\n", 431},
		{"an Accept of 100 kB", list + "Accept: " + strings.Repeat("a/b,", 25000) + "\r\n\r\n", 431},
		{"2,000 headers", list + strings.Repeat("A: b\r\n", 3000) + "\r\n", 431},
	} {
		t.Run(c.name, func(t *testing.T) {
			resp := b.raw(c.request)
			if resp.StatusCode != c.status {
				body, _ := io.ReadAll(resp.Body)
				t.Errorf("%s: %s", resp.Status, body)
			}
		})
	}
	if resp := b.raw(list + "\r\n"); resp.StatusCode != 200 {
		t.Errorf("afterwards: %s", resp.Status)
	}
}

func TestSlowHeadersAreCutOff(t *testing.T) {
	t.Parallel()
	b := newBench(t, nil)
	conn := b.dial()
	if _, err := io.WriteString(conn, "GET /healthz HTTP/1.1\r\nHost: h\r\nX-Slow: "); err != nil {
		t.Fatal(err)
	}
	started := time.Now()
	_, err := io.Copy(io.Discard, conn) // ends with an end of file or a reset
	if took := time.Since(started); took > readHeaderTimeout+5*time.Second {
		t.Errorf("took %s: %v", took, err)
	}
}

// TestSlowBodiesHoldNothingUp: whatever is decided without the body is
// answered without waiting for it.
func TestSlowBodiesHoldNothingUp(t *testing.T) {
	b := newBench(t, nil)
	for name, c := range map[string]struct {
		request string
		status  int
	}{
		"unknown caller": {"POST /organization/acme/key HTTP/1.1\r\nHost: h\r\nContent-Length: 100\r\n\r\n", 401},
		"bad path":       {"POST /nowhere HTTP/1.1\r\n" + authorized + "Content-Length: 100\r\n\r\n", 404},
		"bad method":     {"PUT /organization/acme/key HTTP/1.1\r\n" + authorized + "Transfer-Encoding: chunked\r\n\r\n", 405},
		"health":         {"GET /healthz HTTP/1.1\r\nHost: h\r\nContent-Length: 100\r\n\r\n", 200},
	} {
		started := time.Now()
		resp := b.raw(c.request)
		if took := time.Since(started); resp.StatusCode != c.status || took > readTimeout/2 || !resp.Close {
			t.Errorf("%s: %s after %s, closing: %t", name, resp.Status, took, resp.Close)
		}
	}
}

func TestBodyThatNeverCameIs408(t *testing.T) {
	t.Parallel()
	b := newBench(t, nil)
	started := time.Now()
	resp := b.raw("POST /organization/acme/key HTTP/1.1\r\n" + authorized + "Content-Length: 100\r\n\r\nabc")
	if took := time.Since(started); resp.StatusCode != 408 || took > readTimeout+5*time.Second {
		t.Errorf("%s after %s", resp.Status, took)
	}
	if got := fmt.Sprint(b.keys.log()); got != "[reject acme orgkey.generate body_too_slow]" {
		t.Error(got)
	}
}

// TestPatientClientsGetTheirKey: readTimeout is for reading a request, not for
// the work on it.
func TestPatientClientsGetTheirKey(t *testing.T) {
	t.Parallel()
	b := newBench(t, nil)
	b.keys.before = func(ctx context.Context) {
		select {
		case <-ctx.Done():
		case <-time.After(readTimeout + 2*time.Second):
		}
	}
	for _, body := range []string{"", "ignored"} {
		t.Run("body "+body, func(t *testing.T) {
			t.Parallel()
			conn := b.dial()
			fmt.Fprintf(conn, "POST /organization/acme/key HTTP/1.1\r\n%sContent-Length: %d\r\n\r\n%s", authorized, len(body), body)
			resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
			if err != nil || resp.StatusCode != 200 {
				t.Fatal(resp, err)
			}
		})
	}
}

// TestClientsThatGoAwayGetNothing, with a body or without, before the release.
func TestClientsThatGoAwayGetNothing(t *testing.T) {
	for name, body := range map[string]string{"no body": "", "a body": "Content-Length: 3\r\n\r\nabc"} {
		t.Run(name, func(t *testing.T) {
			b := newBench(t, nil)
			started := make(chan struct{})
			b.keys.ended = make(chan struct{})
			b.keys.before = func(ctx context.Context) { close(started); <-ctx.Done() }
			if body == "" {
				body = "\r\n"
			}
			conn := b.dial()
			if _, err := io.WriteString(conn, "POST /organization/acme/key HTTP/1.1\r\n"+authorized+body); err != nil {
				t.Fatal(err)
			}
			<-started
			conn.Close()
			select {
			case <-b.keys.ended:
			case <-time.After(15 * time.Second):
				t.Fatal("nobody noticed that the client went away")
			}
			b.keys.mu.Lock()
			defer b.keys.mu.Unlock()
			if b.keys.delivery == nil {
				t.Error("the key was delivered to nobody, and nobody noticed")
			}
			eventually(t, "the access log's line", func() bool { return strings.Contains(b.logs.String(), `"status":499`) })
		})
	}
}

// TestAFailedWriteIsReported: a client that reads nothing, of a response that
// does not fit into its buffers, makes the delivery fail within its deadline.
func TestAFailedWriteIsReported(t *testing.T) {
	t.Parallel()
	b := newBench(t, nil)
	b.keys.private = make([]byte, 64<<20)
	b.keys.ended = make(chan struct{})
	conn := b.dial()
	if _, err := io.WriteString(conn, "POST /organization/acme/key HTTP/1.1\r\n"+authorized+"\r\n"); err != nil {
		t.Fatal(err)
	}
	select {
	case <-b.keys.ended:
	case <-time.After(releaseTimeout + 10*time.Second):
		t.Fatal("the write has no deadline")
	}
	b.keys.mu.Lock()
	defer b.keys.mu.Unlock()
	if b.keys.delivery == nil {
		t.Error("a write that failed was reported as delivered")
	}
	eventually(t, "the access log's line", func() bool { return strings.Contains(b.logs.String(), `"status":499`) })
}

// TestAFlushThatFailsIsReported: a key fits into the buffers, so only the
// flush finds out.
func TestAFlushThatFailsIsReported(t *testing.T) {
	b := newBench(t, nil)
	b.keys.private = b.keys.private[:100]
	b.keys.ended = make(chan struct{})
	gone := make(chan struct{})
	// With a second request behind it net/http sees no end of the connection,
	// so the context stays alive and the write itself has to fail.
	b.keys.before = func(context.Context) { <-gone }
	conn := b.dial().(*net.TCPConn)
	if _, err := io.WriteString(conn, "POST /organization/acme/key HTTP/1.1\r\n"+authorized+"\r\nGET /"); err != nil {
		t.Fatal(err)
	}
	if err := conn.SetLinger(0); err != nil { // close with a reset
		t.Fatal(err)
	}
	eventually(t, "the request", func() bool { return len(b.keys.log()) == 1 })
	conn.Close()
	close(gone)
	<-b.keys.ended
	b.keys.mu.Lock()
	defer b.keys.mu.Unlock()
	if b.keys.delivery == nil {
		t.Error("a flush that failed was reported as delivered")
	}
}

// TestConnectionsAreKept: reading bodies to their end is what makes that safe.
// A Transfer-Encoding ends them, since a Content-Length may have come beside it.
func TestConnectionsAreKept(t *testing.T) {
	b := newBench(t, nil)
	conn := b.dial()
	answers := bufio.NewReader(conn)
	const chunked = "Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n"
	for _, body := range []string{"\r\n", "Content-Length: 3\r\n\r\nabc", "\r\n", "Content-Length: 3\r\n" + chunked} {
		if _, err := io.WriteString(conn, "POST /organization/acme/key HTTP/1.1\r\n"+authorized+body); err != nil {
			t.Fatal(err)
		}
		resp, err := http.ReadResponse(answers, nil)
		if err != nil || resp.StatusCode != 200 || resp.Close != strings.Contains(body, chunked) {
			t.Fatalf("%q: %v %v", body, resp, err)
		}
		if _, err := io.Copy(io.Discard, resp.Body); err != nil {
			t.Fatal(err)
		}
	}
}

// TestLeavingEndsConnections: with a body or without, so that a client's next
// request goes to another replica.
func TestLeavingEndsConnections(t *testing.T) {
	b := newBench(t, nil)
	b.api.Leave()
	for _, body := range []string{"\r\n", "Content-Length: 3\r\n\r\nabc"} {
		if resp := b.raw("POST /organization/acme/key HTTP/1.1\r\n" + authorized + body); resp.StatusCode != 200 || !resp.Close {
			t.Errorf("%q: %s, closing: %t", body, resp.Status, resp.Close)
		}
	}
}

// TestHeadersOverTheLimit are refused by themselves, over HTTP/2 too: a
// request beside them on the same connection goes on.
func TestHeadersOverTheLimit(t *testing.T) {
	b := newBench(t, nil)
	started, leave := make(chan struct{}), make(chan struct{})
	b.keys.before = func(ctx context.Context) {
		close(started)
		select {
		case <-ctx.Done():
		case <-leave:
		}
	}
	ca := newAuthority(t)
	dir := t.TempDir()
	files := TLSFiles{Cert: filepath.Join(dir, "cert.pem"), Key: filepath.Join(dir, "key.pem")}
	cert, key := ca.issue("server")
	writePair(t, files, cert, key)
	address := serve(t, ServerConfig{Address: "127.0.0.1:0", TLS: files, GenerationDeadline: 30 * time.Second, Log: slog.New(slog.DiscardHandler)}, b.api.Handler())
	roots := x509.NewCertPool()
	roots.AddCert(ca.cert)
	dials := 0
	transport := &http.Transport{ForceAttemptHTTP2: true, TLSClientConfig: &tls.Config{RootCAs: roots, ServerName: "localhost"},
		DialContext: func(ctx context.Context, network, addr string) (net.Conn, error) {
			dials++
			return (&net.Dialer{}).DialContext(ctx, network, addr)
		}}
	defer transport.CloseIdleConnections()
	client := &http.Client{Transport: transport, Timeout: 30 * time.Second}
	ask := func(method, url string, fill int) (status int, body []byte, err error) {
		req, err := http.NewRequest(method, url+"/organization/acme/key", nil)
		if err != nil {
			return 0, nil, err
		}
		req.Header.Set("Authorization", "Bearer "+token)
		req.Header.Set("X-Fill", strings.Repeat("a", fill))
		resp, err := client.Do(req)
		if err != nil {
			return 0, nil, err
		}
		defer resp.Body.Close()
		body, err = io.ReadAll(resp.Body)
		CheckExchange(t, req, nil, resp, body)
		return resp.StatusCode, body, err
	}
	beside := make(chan error, 1)
	go func() {
		status, _, err := ask("POST", "https://"+address, 0)
		if err == nil && status != 200 {
			err = fmt.Errorf("status %d", status)
		}
		beside <- err
	}()
	<-started
	for _, url := range []string{"https://" + address, b.url} {
		if status, body, err := ask("GET", url, 15<<10); status != 200 {
			t.Errorf("%s, headers of 15 KiB: %d %s %v", url, status, body, err)
		}
		for _, fill := range []int{17 << 10, 31 << 10} {
			if status, body, err := ask("GET", url, fill); status != 431 || !strings.Contains(string(body), `"header_too_large"`) {
				t.Errorf("%s, headers of %d bytes: %d %s %v", url, fill, status, body, err)
			}
		}
	}
	close(leave)
	if err := <-beside; err != nil {
		t.Error("the request beside them:", err)
	}
	if dials != 2 { // one for each URL
		t.Errorf("%d connections", dials)
	}
}
