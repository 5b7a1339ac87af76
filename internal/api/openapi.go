package api

import (
	_ "embed"
	"net/http"

	"github.com/gin-gonic/gin"
)

// Document is the OpenAPI 3.1 description of everything the public listener
// serves, as GET /openapi.yaml answers it. The package openapitest holds
// requests and responses against it.
//
//go:embed openapi.yaml
var Document []byte

func serveDocument(c *gin.Context) {
	c.Data(http.StatusOK, "application/yaml", Document)
}
