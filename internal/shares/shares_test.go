package shares_test

import (
	"context"
	"fmt"
	"net/netip"
	"testing"
	"time"

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

func TestOneHolderLeavesSomethingForOthers(t *testing.T) {
	t.Parallel()
	a := shares.NewAmount[string](96)
	all := func(of string, n int64) (kept []func(int64)) {
		for {
			keep := a.Take(of, n)
			if keep == nil {
				return kept
			}
			kept = append(kept, keep)
		}
	}
	first := all("a", 8)
	if len(first) != 6 || a.Taken() != 48 {
		t.Errorf("a holds %d times 8, of %d", len(first), a.Taken())
	}
	if keep := a.Take("b", 1000); keep == nil || a.Taken() != 96 {
		t.Errorf("what is more than half of all does not count as half: %d are taken", a.Taken())
	} else {
		keep(0)
	}
	if second := all("b", 24); len(second) != 1 {
		t.Errorf("b holds %d times 24", len(second))
	}
	if a.Take("a", 0) == nil || a.Take("b", 0) == nil {
		t.Error("what takes nothing is refused")
	}
	if c := a.Take("c", 2); c == nil || a.Take("c", 20) != nil {
		t.Error("c does not get 2, or 20 more of 22")
	} else {
		c(0)
	}
	first[0](3)
	first[0](5) // takes nothing back
	if a.Taken() != 72-5 {
		t.Errorf("%d are taken", a.Taken())
	}
	for _, keep := range first {
		keep(0)
		keep(0)
	}
	if a.Taken() != 24 {
		t.Errorf("%d are taken, of which b has 24", a.Taken())
	}
}

// Whoever wants much waits until it is there, and nobody waits behind them.
func TestNobodyWaitsBehindThoseWhoWantMuch(t *testing.T) {
	t.Parallel()
	a := shares.NewAmount[string](8)
	held := []func(int64){a.Take("a", 4), a.Take("b", 2)}
	much := make(chan func(int64))
	go func() { much <- a.Await(t.Context(), "c", 4) }()
	short, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if a.Await(short, "d", 3) != nil {
		t.Error("d gets more than is left")
	}
	if little := a.Await(t.Context(), "d", 1); little == nil || a.Taken() != 7 {
		t.Errorf("d waits for 1 of 2 places; %d are taken", a.Taken())
	}
	held[1](0)
	select {
	case <-much:
		t.Error("c has 4 of 3")
	case <-time.After(50 * time.Millisecond):
	}
	held[0](3)
	if keep := <-much; keep == nil || a.Taken() != 8 {
		t.Errorf("c does not get what is left, %d are taken", a.Taken())
	}
}
