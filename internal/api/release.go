package api

import (
	"context"
	"net/http"
	"strconv"
	"time"

	"github.com/gin-gonic/gin"

	"github.com/orgkeys/orgkeys/internal/orgkey"
)

// release writes a private key out. Its error, of the write or of the flush,
// withdraws the key; nil means that all of it was handed to the connection.
func release(ctx context.Context, c *gin.Context, f form, g orgkey.Generated) error {
	body := g.PEM
	if f == jsonString {
		body = appendJSONString(make([]byte, 0, 2*len(g.PEM)+2), g.PEM)
		defer clear(body)
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	connection := http.NewResponseController(underlying(c))
	if err := connection.SetWriteDeadline(time.Now().Add(releaseTimeout)); err != nil {
		return err
	}
	h := c.Writer.Header()
	h.Set("Location", "/organization/"+string(g.Org)+"/key/"+g.ID)
	h.Set("X-Key-Id", g.ID)
	h.Set("X-Key-Fingerprint", g.Fingerprint)
	h.Set("Content-Length", strconv.Itoa(len(body)))
	h.Set("Content-Type", f.mediaType())
	if f == pemFile {
		h.Set("Content-Disposition", `attachment; filename="private_key.pem"`)
	}
	c.Status(http.StatusOK)
	if _, err := c.Writer.Write(body); err != nil {
		return err
	}
	return connection.Flush()
}

// appendJSONString appends text as a JSON string (RFC 8259, section 7). PEM and
// envelopes are ASCII in which nothing else needs escaping. encoding/json would leave
// copies of the key in buffers that cannot be cleared; dst must have enough capacity.
func appendJSONString(dst, text []byte) []byte {
	dst = append(dst, '"')
	for _, b := range text {
		switch b {
		case '\n':
			dst = append(dst, '\\', 'n')
		case '\r':
			dst = append(dst, '\\', 'r')
		case '"', '\\':
			dst = append(dst, '\\', b)
		default:
			dst = append(dst, b)
		}
	}
	return append(dst, '"')
}
