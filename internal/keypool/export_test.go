package keypool

// Opened is how many opened rows the pool remembers.
func (p *Shared) Opened() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return len(p.opened)
}
