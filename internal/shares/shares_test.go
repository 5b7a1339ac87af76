package shares_test

import (
	"fmt"
	"net/netip"
	"testing"

	"github.com/orgkeys/orgkeys/internal/shares"
)

func TestOneAddressLeavesRoomForOthers(t *testing.T) {
	t.Parallel()
	many := netip.MustParseAddr("192.0.2.200")
	p := shares.New(16, func(a netip.Addr) bool { return a == many })
	var leave []func()
	take := func(from string) (n int) {
		for {
			l := p.Take(netip.MustParseAddr(from))
			if l == nil {
				return n
			}
			leave = append(leave, l)
			n++
		}
	}
	for i, want := range []int{8, 4, 2, 1} {
		if got := take(fmt.Sprintf("192.0.2.%d", i+1)); got != want {
			t.Errorf("address %d holds %d places, want %d", i+1, got, want)
		}
	}
	if got := take("192.0.2.200"); got != 1 || p.Taken() != 16 {
		t.Errorf("an address that stands for many clients gets %d of 1 places; %d are taken", got, p.Taken())
	}
	for _, l := range leave {
		l()
		l() // gives nothing back a second time
	}
	if p.Taken() != 0 {
		t.Errorf("%d places are not given back", p.Taken())
	}
	// All addresses of a /64 are one source.
	if got := take("2001:db8::1"); got != 8 {
		t.Errorf("an IPv6 address holds %d places", got)
	}
	if got := take("2001:db8::2"); got != 0 {
		t.Errorf("its neighbour holds %d more", got)
	}
}
