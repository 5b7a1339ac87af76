package api

import (
	"net/http"
	"net/netip"
	"slices"
	"strings"

	"github.com/gin-gonic/gin"
)

// Proxies are the proxies that are trusted about a request's origin. Its zero value
// trusts none.
type Proxies struct {
	Trusted []netip.Prefix // addresses whose X-Forwarded-For and X-Forwarded-Proto count
	TLS     bool           // a trusted proxy terminates TLS; requests that did not come through it are refused
}

func (p Proxies) trusts(a netip.Addr) bool {
	return slices.ContainsFunc(p.Trusted, func(t netip.Prefix) bool { return t.Contains(a) })
}

// Shared reports whether many clients may have an address: that of a trusted proxy, and
// this host's own, on which a proxy may run that is not trusted and so not configured.
func (p Proxies) Shared(a netip.Addr) bool { return a.IsLoopback() || p.trusts(a) }

// peer is the address at the other end of the connection; invalid if there is none.
func peer(r *http.Request) netip.Addr { return peerOf(r.RemoteAddr) }

func peerOf(remote string) netip.Addr {
	at, err := netip.ParseAddrPort(remote)
	if err != nil {
		return netip.Addr{}
	}
	return at.Addr().Unmap().WithZone("")
}

// Client is the address that the request came from, according to trusted proxies. Each proxy appends the address of its own peer to
// X-Forwarded-For, so the list is read from the right, up to the first address
// that is no trusted proxy. Whatever stands to the left of that, or of
// something that is not an address, anybody may have written.
func (p Proxies) Client(r *http.Request) netip.Addr {
	at := peer(r)
	lines := r.Header.Values("X-Forwarded-For")
	for i := len(lines) - 1; i >= 0; i-- {
		rest := lines[i]
		for more := true; more; {
			if !p.trusts(at) {
				return at
			}
			var last string
			if comma := strings.LastIndexByte(rest, ','); comma >= 0 {
				rest, last = rest[:comma], rest[comma+1:]
			} else {
				more, last = false, rest
			}
			hop, ok := parseHop(strings.Trim(last, " \t"))
			if !ok {
				return at
			}
			at = hop
		}
	}
	return at
}

// parseHop reads one element of X-Forwarded-For. Some proxies add the port.
func parseHop(s string) (netip.Addr, bool) {
	a, err := netip.ParseAddr(s)
	if err != nil {
		at, err := netip.ParseAddrPort(s)
		if err != nil {
			return netip.Addr{}, false
		}
		a = at.Addr()
	}
	return a.Unmap(), a.Zone() == ""
}

// overTLS reports whether a trusted proxy says that it received the request
// over TLS. Two opinions are none.
func (p Proxies) overTLS(r *http.Request) bool {
	said := r.Header.Values("X-Forwarded-Proto")
	return p.trusts(peer(r)) && len(said) == 1 && strings.EqualFold(said[0], "https")
}

// checkProxy notes where the request came from. With TLS left to a proxy it
// refuses what travelled without, so that a token or key never does; health
// probes come from next door and carry nothing.
func (a *API) checkProxy(c *gin.Context) {
	if from := a.Proxies.Client(c.Request); from.IsValid() {
		exchangeOf(c).address = from.String()
	}
	probe := c.FullPath() == healthPath || c.FullPath() == readyPath
	if a.Proxies.TLS && !probe && !a.Proxies.overTLS(c.Request) {
		a.refuse(c, tlsRequired)
	}
}
