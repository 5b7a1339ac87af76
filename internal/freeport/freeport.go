// Package freeport finds loopback ports for tests' servers that are stopped and
// started again.
package freeport

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
)

// Find returns a port that is free, and so are those that lie the given
// distances above it. None is one that the kernel gives to whoever asks for any,
// as every client does: such a one could be taken while its server is stopped.
func Find(beside ...int) (int, error) {
	for range 100 {
		if port := 10000 + rand.N(20000); free(port) && all(port, beside) {
			return port, nil
		}
	}
	return 0, errors.New("no ports are free")
}

func all(port int, beside []int) bool {
	for _, distance := range beside {
		if !free(port + distance) {
			return false
		}
	}
	return true
}

func free(port int) bool {
	l, err := net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", port))
	return err == nil && l.Close() == nil
}
