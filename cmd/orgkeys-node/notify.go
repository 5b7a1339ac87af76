package main

import (
	"net"
	"os"
)

// notify tells systemd what "systemctl status" is to show (sd_notify(3)).
// Nothing depends on it, so errors are ignored.
func notify(state string) {
	path := os.Getenv("NOTIFY_SOCKET")
	if path == "" {
		return
	}
	c, err := net.DialUnix("unixgram", nil, &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		return
	}
	defer c.Close()
	_, _ = c.Write([]byte(state))
}
