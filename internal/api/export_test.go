package api

import (
	"net/http"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// CheckExchange sees every exchange of these tests. The external test package
// sets it to openapitest.Check, which this one cannot import.
var CheckExchange func(t testing.TB, req *http.Request, reqBody []byte, resp *http.Response, respBody []byte)

// PublicRoutes returns the public listener's routes as OpenAPI writes them, sorted.
func PublicRoutes(t *testing.T) []string {
	parameter := regexp.MustCompile(`:([A-Za-z]+)`)
	var all []string
	for _, r := range newBench(t, nil).api.public.Routes() {
		if r.Method == http.MethodHead { // said once, for all
			continue
		}
		all = append(all, strings.ToLower(r.Method)+" "+parameter.ReplaceAllString(r.Path, "{$1}"))
	}
	slices.Sort(all)
	return all
}
