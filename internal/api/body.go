package api

import (
	"errors"
	"io"
	"net/http"
	"os"

	"github.com/gin-gonic/gin"
)

// maxBody is the longest request body, in bytes.
const maxBody = 64 << 10

// expectBody makes an answer that is given before the body was read close the
// connection. net/http would otherwise read the rest of the body before it sends
// the answer, and a client that never sends the rest would never get an answer.
func expectBody(c *gin.Context) {
	// net/http does not tell whether a Content-Length came beside a
	// Transfer-Encoding. A
	// proxy may have used the former, so the connection must not be used again (RFC 9112,
	// section 6.1).
	if len(c.Request.TransferEncoding) > 0 {
		endConnection(c)
	}
	if c.Request.ContentLength != 0 && c.Request.ProtoMajor == 1 {
		c.Header("Connection", "close")
	}
}

// endConnection closes the connection after this answer, even if the body was not read.
func endConnection(c *gin.Context) {
	exchangeOf(c).last = true
	c.Header("Connection", "close")
}

// bodyRead is called once nothing of the body is left, and lets the connection
// serve further requests.
func bodyRead(c *gin.Context) {
	if !exchangeOf(c).last {
		c.Writer.Header().Del("Connection")
	}
}

// underlying is net/http's own writer. Gin's hides what a flush reports and
// what http.MaxBytesReader asks for.
func underlying(c *gin.Context) http.ResponseWriter {
	var w http.ResponseWriter = c.Writer
	for {
		u, ok := w.(interface{ Unwrap() http.ResponseWriter })
		if !ok {
			return w
		}
		w = u.Unwrap()
	}
}

// withoutBody is for requests that take no body. A body is
// read and ignored, within limits: unread, it would keep net/http from noticing that the
// client has disconnected, and a key would be released to a closed connection.
func (a *API) withoutBody(c *gin.Context) {
	if c.Request.ContentLength == 0 {
		return
	}
	body := http.MaxBytesReader(underlying(c), c.Request.Body, maxBody)
	_, err := io.Copy(io.Discard, body)
	var tooLarge *http.MaxBytesError
	switch {
	case err == nil:
		bodyRead(c)
	case errors.As(err, &tooLarge):
		a.reject(c, "body_too_large", bodyTooLarge)
	case errors.Is(err, os.ErrDeadlineExceeded):
		a.reject(c, "body_too_slow", bodyTooSlow)
	default:
		a.reject(c, "body_unreadable", bodyUnreadable)
	}
}
