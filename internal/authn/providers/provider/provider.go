// Package provider is what the test's providers have in common.
package provider

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"os"
	"strconv"
	"sync"
)

// Key is a signing key with its ID.
type Key struct {
	ID      string
	Private *ecdsa.PrivateKey
}

// Keys are the key that signs, and the one before it.
type Keys struct {
	mu   sync.Mutex
	made int
	keys []Key
}

// Rotate makes a new signing key.
func (k *Keys) Rotate() {
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		log.Fatal(err)
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	k.made++
	k.keys = append([]Key{{"key-" + strconv.Itoa(k.made), private}}, k.keys...)[:min(2, len(k.keys)+1)]
}

// All returns the keys, the one that signs first.
func (k *Keys) All() []Key {
	k.mu.Lock()
	defer k.mu.Unlock()
	return append([]Key(nil), k.keys...)
}

// Serve serves what handler makes of the issuer's address, until standard input ends.
func (k *Keys) Serve(handler func(issuer string) http.Handler) {
	k.Rotate()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		log.Fatal(err)
	}
	issuer := "https://" + listener.Addr().String()
	mux := http.NewServeMux()
	mux.HandleFunc("POST /test/rotate", func(http.ResponseWriter, *http.Request) { k.Rotate() })
	mux.Handle("/", handler(issuer))
	go func() { log.Fatal(http.ServeTLS(listener, mux, os.Args[1], os.Args[2])) }()
	fmt.Println(issuer)
	io.Copy(io.Discard, os.Stdin)
}
