package api

import (
	"net/http"
	"net/netip"
	"strings"
	"testing"
)

func prefixes(list ...string) []netip.Prefix {
	var all []netip.Prefix
	for _, p := range list {
		all = append(all, netip.MustParsePrefix(p))
	}
	return all
}

func TestClientAddress(t *testing.T) {
	trusted := prefixes("10.0.0.0/8", "2001:db8:1::/48", "192.0.2.1/32")
	for _, c := range []struct {
		name, peer string
		forwarded  []string
		want       string
	}{
		{"no proxy", "198.51.100.7:1", nil, "198.51.100.7"},
		{"a stranger's word", "198.51.100.7:1", []string{"203.0.113.9"}, "198.51.100.7"},
		{"one proxy", "10.0.0.1:1", []string{"203.0.113.9"}, "203.0.113.9"},
		{"one proxy, and a forged entry before", "10.0.0.1:1", []string{"127.0.0.1, 203.0.113.9"}, "203.0.113.9"},
		{"two proxies", "10.0.0.1:1", []string{"203.0.113.9, 10.2.3.4"}, "203.0.113.9"},
		{"two headers", "10.0.0.1:1", []string{"6.6.6.6", "203.0.113.9, 10.2.3.4"}, "203.0.113.9"},
		{"two headers, all of the second trusted", "10.0.0.1:1", []string{"203.0.113.9", "10.2.3.4"}, "203.0.113.9"},
		{"only proxies", "10.0.0.1:1", []string{"10.2.3.4, 10.2.3.5"}, "10.2.3.4"},
		{"a proxy that says nothing", "10.0.0.1:1", nil, "10.0.0.1"},
		{"garbage next to the proxy", "10.0.0.1:1", []string{"203.0.113.9, unknown"}, "10.0.0.1"},
		{"garbage beyond a proxy", "10.0.0.1:1", []string{"203.0.113.9, <script>, 10.2.3.4"}, "10.2.3.4"},
		{"an empty element", "10.0.0.1:1", []string{"203.0.113.9,"}, "10.0.0.1"},
		{"with a port", "10.0.0.1:1", []string{"203.0.113.9:5555"}, "203.0.113.9"},
		{"IPv6", "[2001:db8:1::1]:1", []string{"2001:db8:2::9"}, "2001:db8:2::9"},
		{"IPv6 with a port", "[2001:db8:1::1]:1", []string{"[2001:db8:2::9]:5555"}, "2001:db8:2::9"},
		{"a mapped peer is a proxy too", "[::ffff:10.0.0.1]:1", []string{"203.0.113.9"}, "203.0.113.9"},
		{"a mapped client", "10.0.0.1:1", []string{"::ffff:203.0.113.9"}, "203.0.113.9"},
		{"a zone", "10.0.0.1:1", []string{"fe80::1%eth0"}, "10.0.0.1"},
		{"no peer", "@", []string{"203.0.113.9"}, "invalid IP"},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := &http.Request{RemoteAddr: c.peer, Header: http.Header{"X-Forwarded-For": c.forwarded}}
			if got := (Proxies{Trusted: trusted}).Client(r); got.String() != c.want {
				t.Errorf("got %s, want %s", got, c.want)
			}
		})
	}
}

func FuzzForwardedFor(f *testing.F) {
	for _, seed := range []string{"", "1.2.3.4", "1.2.3.4, 10.0.0.1", ",,,", "[::1]:80", "::ffff:10.0.0.1", "fe80::1%a", strings.Repeat("10.0.0.1,", 500)} {
		f.Add(seed)
	}
	p := Proxies{Trusted: prefixes("10.0.0.0/8")}
	f.Fuzz(func(t *testing.T, forwarded string) {
		ask := func(list string) netip.Addr {
			return p.Client(&http.Request{RemoteAddr: "10.0.0.1:1", Header: http.Header{"X-Forwarded-For": {list}}})
		}
		if got := ask(forwarded); !got.IsValid() || got.Zone() != "" || got.Is4In6() {
			t.Errorf("%q: %s", forwarded, got)
		}
		// What a client writes never hides what the proxy appended.
		if got := ask(forwarded + ", 203.0.113.9"); got.String() != "203.0.113.9" {
			t.Errorf("%q hid the client: %s", forwarded, got)
		}
		// Nor does it count from somebody who is no proxy.
		r := &http.Request{RemoteAddr: "198.51.100.7:1", Header: http.Header{"X-Forwarded-For": {forwarded}}}
		if got := p.Client(r); got.String() != "198.51.100.7" {
			t.Errorf("%q counted: %s", forwarded, got)
		}
	})
}

func TestAddressReachesTheAuditTrail(t *testing.T) {
	b := newBench(t, func(c *Config) { c.Proxies.Trusted = prefixes("127.0.0.0/8") })
	b.ask("GET", "/organization/acme/key", "X-Forwarded-For", "6.6.6.6, 203.0.113.9")
	if got := b.keys.call.Address; got != "203.0.113.9" {
		t.Errorf("behind a trusted proxy: %q", got)
	}
	b = newBench(t, nil)
	b.ask("GET", "/organization/acme/key", "X-Forwarded-For", "203.0.113.9")
	if got := b.keys.call.Address; got != "127.0.0.1" {
		t.Errorf("no proxy is trusted: %q", got)
	}
}

func TestTLSByProxy(t *testing.T) {
	b := newBench(t, func(c *Config) { c.Proxies = Proxies{Trusted: prefixes("127.0.0.0/8"), TLS: true} })
	stranger := newBench(t, func(c *Config) { c.Proxies = Proxies{Trusted: prefixes("10.0.0.0/8"), TLS: true} })
	for _, c := range []struct {
		name   string
		bench  *bench
		proto  []string
		status int
	}{
		{"the proxy says https", b, []string{"X-Forwarded-Proto", "https"}, 200},
		{"the proxy says http", b, []string{"X-Forwarded-Proto", "http"}, 400},
		{"the proxy says nothing", b, nil, 400},
		{"the proxy says both", b, []string{"X-Forwarded-Proto", "https", "X-Forwarded-Proto", "http"}, 400},
		{"the proxy says a list", b, []string{"X-Forwarded-Proto", "https, http"}, 400},
		{"a stranger says https", stranger, []string{"X-Forwarded-Proto", "https"}, 400},
	} {
		t.Run(c.name, func(t *testing.T) {
			c.bench.t = t
			a := c.bench.ask("POST", "/organization/acme/key", c.proto...)
			if a.StatusCode != c.status {
				t.Errorf("%d %s", a.StatusCode, a.body)
			}
			if c.status == 400 && errorOf(t, a).ErrorCode != "tls_required" {
				t.Errorf("%s", a.body)
			}
			if probe := c.bench.ask("GET", "/readyz"); probe.StatusCode != 200 {
				t.Errorf("a health probe: %d", probe.StatusCode)
			}
		})
	}
	if got := stranger.keys.log(); len(got) > 0 {
		t.Errorf("use cases asked: %q", got)
	}
}
