package keypool

import (
	"context"

	"github.com/orgkeys/orgkeys/internal/orgkey"
)

// Made counts a key, and reports. Nothing may run.
func (p *Local) Made(ctx context.Context) error {
	p.count.made(orgkey.UseAny)
	return p.report(ctx, true)
}

// Opened is how many opened rows the pool remembers.
func (p *Shared) Opened() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return len(p.opened)
}
