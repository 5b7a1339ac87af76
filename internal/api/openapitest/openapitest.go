// Package openapitest holds requests and responses against the OpenAPI
// document that the service itself serves.
package openapitest

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"slices"
	"sync"
	"testing"

	"github.com/pb33f/libopenapi"
	validator "github.com/pb33f/libopenapi-validator"
	"github.com/pb33f/libopenapi-validator/config"
	"github.com/pb33f/libopenapi-validator/content"
	problems "github.com/pb33f/libopenapi-validator/errors"
	"github.com/pb33f/libopenapi-validator/schema_validation"
	v3 "github.com/pb33f/libopenapi/datamodel/high/v3"

	"github.com/orgkeys/orgkeys/internal/api"
)

// Check fails t unless the response is one that the document allows for the
// request. A successful response also requires that the request was one that
// the document describes; a refused one may well be malformed. Bodies are
// given apart, since they have been read by then; reqBody may be nil.
func Check(t testing.TB, req *http.Request, reqBody []byte, resp *http.Response, respBody []byte) {
	t.Helper()
	if err := check(req, reqBody, resp, respBody); err != nil {
		t.Errorf("%s %s answered %d, which the OpenAPI document does not allow:\n%v", req.Method, req.URL.Path, resp.StatusCode, err)
	}
}

// Operations returns what the document describes, as "GET /path/{name}", sorted.
func Operations() ([]string, error) {
	d, err := load()
	if err != nil {
		return nil, err
	}
	var all []string
	for path, item := range d.model.Paths.PathItems.FromOldest() {
		for method := range item.GetOperations().FromOldest() {
			all = append(all, fmt.Sprintf("%s %s", method, path))
		}
	}
	slices.Sort(all)
	return all, nil
}

// document is the parsed document with its validators. Responses are checked
// strictly: a field or header that the document does not know is an error.
type document struct {
	model     *v3.Document
	requests  validator.Validator
	responses validator.Validator
	errors    schema_validation.SchemaValidator
}

// Headers that belong to HTTP, to the connection or to every answer, and are
// not declared for each operation.
var general = []string{
	"Access-Control-Allow-Origin", "Access-Control-Expose-Headers", "Allow", "Cache-Control", "Connection",
	"Content-Length", "Content-Type", "Date", "Vary", "X-Content-Type-Options",
}

var load = sync.OnceValues(func() (*document, error) {
	parsed, err := libopenapi.NewDocument(api.Document)
	if err != nil {
		return nil, fmt.Errorf("parsing the OpenAPI document: %w", err)
	}
	model, err := parsed.BuildV3Model()
	if err != nil {
		return nil, fmt.Errorf("reading the OpenAPI document: %w", err)
	}
	text := content.DecoderFunc(func(in *content.DecodeInput) (any, error) {
		b, err := io.ReadAll(in.Body)
		return string(b), err
	})
	options := []config.Option{
		config.WithFormatAssertions(),
		config.WithBodyDecoder("application/x-pem-file", text),
		config.WithBodyDecoder("application/yaml", text),
	}
	strict := append(slices.Clone(options), config.WithStrictMode(), config.WithStrictIgnoredHeaders(general...))
	d := &document{
		model:     &model.Model,
		requests:  validator.NewValidatorFromV3Model(&model.Model, append(slices.Clone(options), config.WithRejectUndeclaredRequestBody())...),
		responses: validator.NewValidatorFromV3Model(&model.Model, strict...),
		errors:    schema_validation.NewSchemaValidator(options...),
	}
	if ok, found := schema_validation.ValidateOpenAPIDocument(parsed); !ok {
		return nil, fmt.Errorf("the OpenAPI document is not valid: %w", join(found))
	}
	return d, nil
})

func check(req *http.Request, reqBody []byte, resp *http.Response, respBody []byte) error {
	d, err := load()
	if err != nil {
		return err
	}
	if resp.Header.Get("X-Request-Id") == "" || resp.Header.Get("X-Content-Type-Options") != "nosniff" {
		return errors.New("X-Request-Id or X-Content-Type-Options: nosniff is missing")
	}
	if outside, err := d.outside(req, resp, respBody); outside {
		return err
	}
	answer := *resp
	answer.Body = io.NopCloser(bytes.NewReader(respBody))
	if ok, found := d.responses.ValidateHttpResponse(replay(req, reqBody), &answer); !ok {
		return join(found)
	}
	if resp.StatusCode >= 300 {
		return nil
	}
	if ok, found := d.requests.ValidateHttpRequestSync(replay(req, reqBody)); !ok {
		return fmt.Errorf("the request succeeded, but is not as described: %w", join(found))
	}
	return nil
}

// beyond are the errors that belong to no operation, with their statuses.
var beyond = map[string]int{"not_found": 404, "method_not_allowed": 405, "header_too_large": 431}

// outside handles what no operation of the document stands for: CORS
// preflights, paths and methods that do not exist, and headers that are too large.
func (d *document) outside(req *http.Request, resp *http.Response, body []byte) (bool, error) {
	if req.Method == http.MethodOptions && resp.StatusCode == http.StatusNoContent {
		if len(body) > 0 {
			return true, errors.New("a preflight's answer has a body")
		}
		return true, nil
	}
	if req.Method == http.MethodHead {
		return true, nil // without a body there is nothing to check
	}
	var e struct{ ErrorCode string }
	if json.Unmarshal(body, &e) != nil || beyond[e.ErrorCode] == 0 {
		return false, nil
	}
	if resp.StatusCode != beyond[e.ErrorCode] {
		return true, fmt.Errorf("%s with status %d", e.ErrorCode, resp.StatusCode)
	}
	if resp.StatusCode == http.StatusMethodNotAllowed && resp.Header.Get("Allow") == "" {
		return true, errors.New("method_not_allowed without Allow")
	}
	schema := d.model.Components.Schemas.GetOrZero("Error").Schema()
	if ok, found := d.errors.ValidateSchemaBytes(schema, body); !ok {
		return true, join(found)
	}
	return true, nil
}

// replay is the request as a server would see it.
func replay(req *http.Request, body []byte) *http.Request {
	r := req.Clone(req.Context())
	r.URL = &url.URL{Path: req.URL.Path, RawPath: req.URL.RawPath, RawQuery: req.URL.RawQuery}
	r.Body, r.ContentLength = http.NoBody, int64(len(body))
	if len(body) > 0 {
		r.Body = io.NopCloser(bytes.NewReader(body))
	}
	return r
}

func join(found []*problems.ValidationError) error {
	all := make([]error, 0, len(found))
	for _, p := range found {
		err := fmt.Errorf("%s: %s", p.Message, p.Reason)
		for _, s := range p.SchemaValidationErrors {
			err = fmt.Errorf("%w\n\t%s at %s", err, s.Reason, s.KeywordLocation)
		}
		all = append(all, err)
	}
	return errors.Join(all...)
}
