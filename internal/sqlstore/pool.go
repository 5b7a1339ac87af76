package sqlstore

import (
	"context"
	"database/sql"
	"errors"
	"sync"
)

// pool is the connections that many use at once. SQLite's keeps its statements
// prepared, because parsing was half of what a small query costs; pgx does so
// by itself. Statements are constants of this package, but for how many hashes and kinds
// they name and which filters are given, so there are few; longer lists, and what callers
// choose the length of, are one parameter, see elements.
type pool struct {
	*sql.DB
	mu       sync.RWMutex
	prepared map[string]*sql.Stmt // nil in PostgreSQL's
}

func (p *pool) statement(ctx context.Context, text string) (*sql.Stmt, error) {
	p.mu.RLock()
	s := p.prepared[text]
	p.mu.RUnlock()
	if s != nil {
		return s, nil
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if s := p.prepared[text]; s != nil {
		return s, nil
	}
	s, err := p.PrepareContext(ctx, text)
	if err == nil {
		p.prepared[text] = s
	}
	return s, err
}

// close closes the statements too: SQLite keeps a connection open for as long as
// one of its statements is.
func (p *pool) close() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	var errs []error
	for _, s := range p.prepared {
		errs = append(errs, s.Close())
	}
	return errors.Join(append(errs, p.DB.Close())...)
}

// reading is a transaction on SQLite that only reads, by the pool's statements.
type reading struct {
	tx   *sql.Tx
	pool *pool
}

func (r reading) QueryContext(ctx context.Context, text string, args ...any) (*sql.Rows, error) {
	s, err := r.pool.statement(ctx, text)
	if err != nil {
		return nil, err
	}
	return r.tx.StmtContext(ctx, s).QueryContext(ctx, args...)
}

func (r reading) QueryRowContext(ctx context.Context, text string, args ...any) *sql.Row {
	s, err := r.pool.statement(ctx, text)
	if err != nil {
		return r.tx.QueryRowContext(ctx, text, args...) // and so the row says what is wrong
	}
	return r.tx.StmtContext(ctx, s).QueryRowContext(ctx, args...)
}

func (p *pool) QueryContext(ctx context.Context, text string, args ...any) (*sql.Rows, error) {
	if p.prepared == nil {
		return p.DB.QueryContext(ctx, text, args...)
	}
	s, err := p.statement(ctx, text)
	if err != nil {
		return nil, err
	}
	return s.QueryContext(ctx, args...)
}

func (p *pool) QueryRowContext(ctx context.Context, text string, args ...any) *sql.Row {
	if p.prepared != nil {
		if s, err := p.statement(ctx, text); err == nil {
			return s.QueryRowContext(ctx, args...)
		}
	}
	return p.DB.QueryRowContext(ctx, text, args...) // and so the row says what is wrong
}
