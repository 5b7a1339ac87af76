package bench_test

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"net/http"
	"net/http/httptrace"
	"net/url"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/orgkeys/orgkeys/client"
	"github.com/orgkeys/orgkeys/internal/e2e/harness"
)

// BenchmarkConsole: how long the first byte of each page takes, asked for one at a time, and
// the server's processor time for the whole of it. api is the time of GET …/nodes,
// in turns with the page: one read with its durable event.
func BenchmarkConsole(b *testing.B) {
	s, key := startOrganization(b)
	token := s.Token(b, "bench", "OWNER")
	session := signIn(b, s, token)
	get := func(path, header, value string) (time.Duration, error) {
		req, err := http.NewRequest(http.MethodGet, s.API+path, nil)
		if err != nil {
			return 0, err
		}
		req.Header.Set(header, value)
		return firstByte(s, req)
	}
	for _, page := range []string{"", "keys", "keys/" + key, "enrollments", "nodes", "devices", "secrets", "events", "verify", "policy"} {
		b.Run(strings.ReplaceAll(cmp.Or(page, "overview"), key, "ID"), func(b *testing.B) {
			var pages, lists []time.Duration
			var busy time.Duration
			b.ResetTimer()
			for range b.N {
				before := s.ProcessorTime(b)
				took, err := get("/console/"+page, "Cookie", session)
				if err != nil {
					b.Fatal(err)
				}
				busy += s.ProcessorTime(b) - before
				pages = append(pages, took)
				if took, err = get("/organization/bench/nodes", "Authorization", "Bearer "+token); err != nil {
					b.Fatal(err)
				}
				lists = append(lists, took)
			}
			slices.Sort(pages)
			slices.Sort(lists)
			ms := func(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }
			b.ReportMetric(ms(pages[len(pages)/2]), "p50-ms")
			b.ReportMetric(ms(lists[len(lists)/2]), "api-p50-ms")
			b.ReportMetric(ms(busy)/float64(b.N), "cpu-ms")
		})
	}
}

// startOrganization starts a server with an organization that has something on every page.
func startOrganization(b *testing.B) (s *harness.Server, key string) {
	b.Helper()
	n := startNodes(b, 20)
	s = n.s
	for i := range n.requests {
		if err := n.register(i); err != nil {
			b.Fatal(err)
		}
	}
	c := s.Client(b, "bench", "OWNER")
	for i := range 20 {
		if _, err := c.CreateEnrollment(b.Context(), "bench", client.Terms{Scope: "node", Uses: 1, Note: fmt.Sprintf("rack %d", i), Life: time.Hour}); err != nil {
			b.Fatal(err)
		}
		if err := c.AllowDevice(b.Context(), "bench", fmt.Sprintf("sha256-%064x", i), "rack"); err != nil {
			b.Fatal(err)
		}
	}
	return s, s.Generate(b, "bench").ID
}

// signIn returns the header with the session's cookie.
func signIn(b *testing.B, s *harness.Server, token string) string {
	b.Helper()
	resp, err := s.HTTP.PostForm(s.API+"/console/sign-in", url.Values{"token": {token}})
	if err != nil {
		b.Fatal(err)
	}
	resp.Body.Close()
	cookies := resp.Cookies()
	if resp.StatusCode != http.StatusSeeOther || len(cookies) != 1 {
		b.Fatalf("signing in answers %d %v", resp.StatusCode, cookies)
	}
	return cookies[0].Name + "=" + cookies[0].Value
}

// firstByte sends a request, and reads the whole of its answer.
func firstByte(s *harness.Server, req *http.Request) (took time.Duration, err error) {
	var begun time.Time
	trace := &httptrace.ClientTrace{
		WroteRequest:         func(httptrace.WroteRequestInfo) { begun = time.Now() },
		GotFirstResponseByte: func() { took = time.Since(begun) },
	}
	resp, err := s.HTTP.Do(req.WithContext(httptrace.WithClientTrace(context.Background(), trace)))
	if err != nil {
		return 0, err
	}
	defer resp.Body.Close()
	if _, err := io.Copy(io.Discard, resp.Body); err != nil {
		return 0, err
	}
	if resp.StatusCode != http.StatusOK {
		return 0, fmt.Errorf("%s answers %d", req.URL.Path, resp.StatusCode)
	}
	return took, nil
}
