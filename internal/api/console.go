package api

import (
	"net/http"

	"github.com/gin-gonic/gin"
)

// routesConsole hands requests for pages on. They are counted and logged here as one
// route; what a page asks of the API is counted and logged once more, as what it is.
func (a *API) routesConsole(r gin.IRouter, pages http.Handler) {
	serve := func(c *gin.Context) {
		c.Request.Header.Set("X-Request-Id", exchangeOf(c).id)
		pages.ServeHTTP(c.Writer, c.Request)
	}
	get(r, "/console", func(c *gin.Context) { c.Redirect(http.StatusSeeOther, "/console/") })
	get(r, "/console/*page", a.whileServing, noStore, serve)
	r.POST("/console/*page", a.whileServing, noStore, serve)
}
