package api

import (
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strings"

	"github.com/gin-gonic/gin"
	"github.com/rs/cors"
)

// preflightLife is how long browsers may remember a preflight's answer, in seconds.
const preflightLife = 600

// newCORS allows exactly origins, or is nil without any. Requests carry their
// token in a header that scripts set, so credentials are never allowed.
func newCORS(origins []string) (*cors.Cors, error) {
	if len(origins) == 0 {
		return nil, nil
	}
	if err := CheckOrigins(origins); err != nil {
		return nil, err
	}
	allowed := slices.Clone(origins)
	return cors.New(cors.Options{
		// AllowedOrigins would ignore case and know wildcards.
		AllowOriginFunc: func(origin string) bool { return slices.Contains(allowed, origin) },
		AllowedMethods:  []string{http.MethodGet, http.MethodHead, http.MethodPost, http.MethodPut, http.MethodDelete},
		AllowedHeaders:  []string{"Accept", "Authorization", "Content-Type", "X-Request-Id"},
		ExposedHeaders:  []string{"Location", "X-Key-Id", "X-Key-Fingerprint", "X-Request-Id", "Retry-After"},
		MaxAge:          preflightLife,
	}), nil
}

// CheckOrigins reports an origin that no browser would ever send.
func CheckOrigins(origins []string) error {
	for _, o := range origins {
		if err := checkOrigin(o); err != nil {
			return fmt.Errorf("ORGKEYS_CORS_ORIGINS: %w", err)
		}
	}
	return nil
}

// checkOrigin accepts an origin only as browsers write it (RFC 6454, section
// 6.2), since it is compared byte for byte and any other spelling would never match.
func checkOrigin(origin string) error {
	u, err := url.Parse(origin)
	if err != nil || (u.Scheme != "https" && u.Scheme != "http") || u.Hostname() == "" ||
		origin != u.Scheme+"://"+u.Host || origin != strings.ToLower(origin) || strings.Contains(origin, "*") {
		return fmt.Errorf("%q is not of the form https://host or https://host:port in lower case", origin)
	}
	if port := u.Port(); port == map[string]string{"https": "443", "http": "80"}[u.Scheme] || strings.HasSuffix(u.Host, ":") {
		return fmt.Errorf("%q has the default port of its scheme, which browsers leave out", origin)
	}
	return nil
}

// crossOrigin answers preflights of allowed origins for paths that exist, and
// marks answers that scripts of those origins may read. Any other OPTIONS is a
// wrong method. A request of several origins is of none: rs/cors judges the
// first and echoes all.
func (a *API) crossOrigin(c *gin.Context) {
	if a.cors == nil {
		return
	}
	if len(c.Request.Header.Values("Origin")) != 1 {
		c.Writer.Header().Add("Vary", "Origin")
		return
	}
	asked := c.Request.Header.Get("Access-Control-Request-Method")
	if c.Request.Method != http.MethodOptions || asked == "" {
		a.cors.HandlerFunc(c.Writer, c.Request)
		return
	}
	// Gin has found by now whether other methods of the path exist.
	exists := c.Writer.Status() == http.StatusMethodNotAllowed
	if !exists || !a.cors.OriginAllowed(c.Request) {
		c.Writer.Header().Add("Vary", "Origin")
		return
	}
	a.cors.HandlerFunc(c.Writer, c.Request)
	c.Abort()
}
