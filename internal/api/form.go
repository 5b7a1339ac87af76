package api

import (
	"io"
	"mime"
	"net/http"
	"net/url"

	"github.com/gin-gonic/gin"
)

// maxForm is more than a form with the longest token takes, in bytes.
const maxForm = 16 << 10

// formAuthorization takes the Authorization header from where the contract's
// Ruby sample puts it: rest-client sends that sample's headers as a form,
// headers[Authorization]=Bearer+…, and none of them as headers. RFC 6750,
// section 2.2, allows a token in a form body likewise. It is for the sample's
// one route, and counts only without a header.
func (a *API) formAuthorization(c *gin.Context) {
	form, _, err := mime.ParseMediaType(c.Request.Header.Get("Content-Type"))
	if err != nil || form != "application/x-www-form-urlencoded" || len(c.Request.Header.Values("Authorization")) > 0 {
		return
	}
	leave := a.reading.Take(a.Proxies.Client(c.Request))
	if leave == nil {
		a.refuse(c, overloaded)
		return
	}
	defer leave()
	body, err := io.ReadAll(http.MaxBytesReader(underlying(c), c.Request.Body, maxForm))
	defer clear(body)
	if err != nil {
		return // no token was found: authentication says so
	}
	fields, err := url.ParseQuery(string(body))
	if sent := fields["headers[Authorization]"]; err == nil && len(sent) == 1 {
		c.Request.Header.Set("Authorization", sent[0])
	}
}
