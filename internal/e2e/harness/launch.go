package harness

import (
	"net/http"
	"time"
)

// Launch starts the server's process without waiting for it. It may end by
// itself, and may be launched again once it has.
func (s *Server) Launch() error { return s.spawn() }

// Address is where the server was told to listen, from the setting.
func (s *Server) Address() string { return s.env["ORGKEYS_LISTEN"] }

// Ready asks a launched server with a fixed address whether it is ready.
func (s *Server) Ready() bool {
	c := &http.Client{Timeout: 2 * time.Second, Transport: s.HTTP.Transport}
	resp, err := c.Get("http://" + s.Address() + "/readyz")
	if err != nil {
		return false
	}
	resp.Body.Close()
	return resp.StatusCode == http.StatusOK
}

// Setting is what the server was given, empty if nothing.
func (s *Server) Setting(name string) string { return s.env[name] }
