// Command fakes3 serves an S3-compatible store from memory, with the bucket "log", and ends
// with its standard input. It prints its address; the credentials are its arguments.
package main

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"sync"
	"time"

	"github.com/rclone/gofakes3"
	"github.com/rclone/gofakes3/s3mem"
)

func main() {
	if len(os.Args) != 3 {
		fmt.Fprintln(os.Stderr, "usage: fakes3 ACCESS-KEY SECRET-KEY")
		os.Exit(2)
	}
	backend := s3mem.New()
	if err := backend.CreateBucket(context.Background(), "log"); err != nil {
		fail(err)
	}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		fail(err)
	}
	handler := gofakes3.New(backend, gofakes3.WithV4Auth(map[string]string{os.Args[1]: os.Args[2]})).Server()
	go func() {
		server := &http.Server{Handler: inTurns(handler), ReadHeaderTimeout: time.Minute}
		fail(server.Serve(listener))
	}()
	fmt.Println("http://" + listener.Addr().String())
	_, _ = io.Copy(io.Discard, os.Stdin) // its end is what counts
}

// inTurns makes conditional writes what S3 promises: this store looks at If-None-Match before it
// reads the body, and not again as it stores it.
func inTurns(next http.Handler) http.Handler {
	var writing sync.Mutex
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method == http.MethodPut {
			writing.Lock()
			defer writing.Unlock()
		}
		next.ServeHTTP(w, r)
	})
}

func fail(err error) {
	fmt.Fprintln(os.Stderr, err)
	os.Exit(1)
}
