package vaulttest

import (
	"crypto/tls"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"path/filepath"
	"sync"
)

// Proxy stands between a client and Vault, under Vault's own certificate, and
// lets a test interfere with each call.
type Proxy struct {
	Address string

	server  *httptest.Server
	forward http.Handler
	mu      sync.Mutex
	before  func(w http.ResponseWriter, r *http.Request) bool
	after   func(r *http.Response) error
}

// NewProxy starts a proxy in front of s; Close ends it.
func NewProxy(s *Server) (*Proxy, error) {
	target, err := url.Parse(s.Address)
	if err != nil {
		return nil, err
	}
	client, err := s.HTTP()
	if err != nil {
		return nil, err
	}
	certificate, err := tls.LoadX509KeyPair(s.CACert, filepath.Join(s.Dir, "tls.key"))
	if err != nil {
		return nil, err
	}
	p := &Proxy{}
	forward := &httputil.ReverseProxy{
		Rewrite:        func(r *httputil.ProxyRequest) { r.SetURL(target) },
		Transport:      client.Transport,
		ModifyResponse: p.answered,
		ErrorLog:       log.New(io.Discard, "", 0), // a stopped Vault is what some tests want
	}
	p.forward = forward
	p.server = httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if p.asked(w, r) {
			forward.ServeHTTP(w, r)
		}
	}))
	p.server.Config.ErrorLog = forward.ErrorLog
	p.server.TLS = &tls.Config{Certificates: []tls.Certificate{certificate}}
	p.server.StartTLS()
	p.Address = p.server.URL
	return p, nil
}

// Close ends the proxy.
func (p *Proxy) Close() {
	p.server.CloseClientConnections()
	p.server.Close()
}

// Forward sends r to Vault, and its answer to nobody.
func (p *Proxy) Forward(r *http.Request) { p.forward.ServeHTTP(httptest.NewRecorder(), r) }

// Before has hook see each request; if it returns false it has answered itself.
func (p *Proxy) Before(hook func(w http.ResponseWriter, r *http.Request) bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.before = hook
}

// After has hook see, and change, each answer; its error becomes a 502.
func (p *Proxy) After(hook func(r *http.Response) error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.after = hook
}

func (p *Proxy) asked(w http.ResponseWriter, r *http.Request) bool {
	p.mu.Lock()
	hook := p.before
	p.mu.Unlock()
	return hook == nil || hook(w, r)
}

func (p *Proxy) answered(r *http.Response) error {
	p.mu.Lock()
	hook := p.after
	p.mu.Unlock()
	if hook == nil {
		return nil
	}
	return hook(r)
}
