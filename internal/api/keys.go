package api

import (
	"context"
	"encoding/pem"
	"errors"
	"fmt"
	"mime"
	"net/http"
	"net/url"
	"time"

	"github.com/gin-gonic/gin"
	"github.com/go-json-experiment/json/jsontext"
	"github.com/google/uuid"

	"github.com/orgkeys/orgkeys/internal/authz"
	"github.com/orgkeys/orgkeys/internal/jsonbody"
	"github.com/orgkeys/orgkeys/internal/org"
	"github.com/orgkeys/orgkeys/internal/orgkey"
)

func (a *API) routesKeys(r gin.IRouter) {
	r.POST("/organization/:idOrg/key", a.whileServing, a.formAuthorization, a.authenticate,
		a.organization(authz.GenerateKey), a.plainOrSealed)
	keys := r.Group("/organization/:idOrg/key", a.whileServing, a.authenticate)
	get(keys, "", a.organization(authz.ListKeys), a.withoutBody, a.listing, a.listKeys)
	keys.DELETE("", a.organization(authz.DeleteAllKeys), a.withoutBody, a.reasoned, a.deleteKeys)
	keys.DELETE("/:idKey", a.organization(authz.DeleteKey), a.withoutBody, a.reasoned, a.deleteKey)
}

// plainOrSealed answers with the private key itself, as the contract has it, or
// sealed to a recipient, where the request accepts that form by its name.
func (a *API) plainOrSealed(c *gin.Context) {
	if namesSealed(c.Request.Header) {
		a.generateSealed(c)
		return
	}
	if mediaType, _, err := mime.ParseMediaType(c.GetHeader("Content-Type")); err == nil && mediaType == "application/json" {
		a.addOrGenerate(c)
		return
	}
	a.withoutBody(c)
	if !c.IsAborted() {
		a.generateKey(c)
	}
}

// addOrGenerate adds the key that a body names. Any other body is ignored, as the
// contract has it.
func (a *API) addOrGenerate(c *gin.Context) {
	body, ok := a.adminBody(c)
	if !ok {
		return
	}
	var f struct {
		PublicKey jsontext.Value `json:"publicKey"`
	}
	if jsonbody.Decode(body, &f) != nil || f.PublicKey == nil {
		a.generateKey(c)
		return
	}
	x := exchangeOf(c)
	x.action = authz.AddKey
	err := a.Enrollments.Add(c.Request.Context(), x.call(), x.org, body, writeNew(c))
	if err != nil {
		a.fail(c, err)
	}
}

func (a *API) generateKey(c *gin.Context) {
	c.Writer.Header().Add("Vary", "Accept, Sec-Fetch-Mode")
	f, ok := negotiate(c.Request.Header)
	if !ok {
		a.reject(c, "not_acceptable", notAcceptable)
		return
	}
	a.metrics.generating.Inc()
	defer a.metrics.generating.Dec()
	x := exchangeOf(c)
	err := a.Keys.Generate(c.Request.Context(), x.call(), x.org, func(ctx context.Context, g orgkey.Generated) error {
		return release(ctx, c, f, g)
	})
	if err == nil && !c.Writer.Written() {
		err = errors.New("the key was generated but could not be written to the connection")
	}
	if err != nil {
		a.fail(c, generationError{err})
	}
}

// success is an answer without data.
type success struct {
	Success bool   `json:"success"`
	Message string `json:"message"`
}

type keyList struct {
	success
	Data []keyEntry `json:"data"`
}

type keyEntry struct {
	ID          string         `json:"id"`
	OrgID       org.ID         `json:"orgId"`
	PublicKey   string         `json:"publicKey"` // PKIX PEM
	Fingerprint string         `json:"fingerprint"`
	CreatedAt   string         `json:"createdAt"`
	LastUsed    string         `json:"lastUsed,omitempty"`
	Delivery    string         `json:"delivery,omitempty"`
	DeliveredAt string         `json:"deliveredAt,omitempty"`
	DeliveredTo string         `json:"deliveredTo,omitempty"`
	Scope       string         `json:"scope"`
	Enrollment  string         `json:"enrollment,omitempty"`
	NodeKeys    []nodeKeyEntry `json:"nodeKeys"`
}

type nodeKeyEntry struct {
	KeyID     string `json:"keyId"`
	NodeID    string `json:"nodeId"`
	Confirmed bool   `json:"confirmed"`
}

// scopeAsked is what a query's scope says: the organization's own keys without
// one, or the other that there is.
func scopeAsked(query, other string) (bool, error) {
	wrong := &jsonbody.Error{Field: "scope", Problem: `is not one of "organization" and "` + other + `"`}
	values, err := url.ParseQuery(query)
	if err != nil {
		return false, wrong
	}
	asked, given := values["scope"]
	switch {
	case !given:
		return false, nil
	case len(asked) != 1 || asked[0] != other && asked[0] != "organization":
		return false, wrong
	}
	return asked[0] == other, nil
}

func (a *API) listKeys(c *gin.Context) {
	ofNodes, err := scopeAsked(c.Request.URL.RawQuery, "node")
	if err != nil {
		a.reject(c, "invalid", problem{http.StatusBadRequest, "invalid_request", err.Error(), 0})
		return
	}
	read, message := a.Keys.List, "Organization keys retrieved successfully"
	if ofNodes {
		read, message = a.Keys.ListNodeKeys, "Node keys retrieved successfully"
	}
	x := exchangeOf(c)
	keys, err := read(c.Request.Context(), x.call(), x.org)
	if err != nil {
		a.fail(c, err)
		return
	}
	list := keyList{success{true, message}, make([]keyEntry, len(keys))}
	for i, k := range keys {
		if list.Data[i], err = entry(k); err != nil {
			a.fail(c, err)
			return
		}
	}
	a.writeList(c, list)
}

// timeForm is RFC 3339 to the millisecond, in UTC.
const timeForm = "2006-01-02T15:04:05.000Z"

func entry(k orgkey.Key) (keyEntry, error) {
	der, err := k.Public.DER()
	if err != nil {
		return keyEntry{}, fmt.Errorf("encoding public key %s: %w", k.ID, err)
	}
	e := keyEntry{
		ID: k.ID, OrgID: k.Org, Fingerprint: k.Fingerprint,
		PublicKey: string(pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der})),
		CreatedAt: instant(k.Created), DeliveredTo: k.DeliveredTo, Scope: "organization", Enrollment: k.Enrollment, NodeKeys: make([]nodeKeyEntry, len(k.Nodes)),
	}
	if k.OfNode {
		e.Scope = "node"
	}
	if !k.LastUsed.IsZero() {
		e.LastUsed = instant(k.LastUsed)
	}
	if k.Delivered.IsZero() {
		e.Delivery = "unconfirmed"
	} else {
		e.DeliveredAt = instant(k.Delivered)
	}
	for i, n := range k.Nodes {
		e.NodeKeys[i] = nodeKeyEntry{n.KeyID, n.NodeID, n.Confirmed}
	}
	return e, nil
}

func instant(t time.Time) string { return t.UTC().Format(timeForm) }

func (a *API) deleteKeys(c *gin.Context) {
	withNodeKeys, err := scopeAsked(c.Request.URL.RawQuery, "all")
	if err != nil {
		a.reject(c, "invalid", problem{http.StatusBadRequest, "invalid_request", err.Error(), 0})
		return
	}
	x := exchangeOf(c)
	n, err := a.Keys.DeleteAll(c.Request.Context(), x.call(), x.org, withNodeKeys)
	if err != nil {
		a.fail(c, err)
		return
	}
	message := fmt.Sprintf("Successfully deleted %d organization key(s)", n.Keys)
	if withNodeKeys {
		message += fmt.Sprintf(" and %d node key(s)", n.NodeKeys)
	}
	writeJSON(c, http.StatusOK, success{true, message})
}

func (a *API) deleteKey(c *gin.Context) {
	id := c.Param("idKey")
	if !isKeyID(id) { // such a key cannot exist
		a.reject(c, "not_found", keyNotFound)
		return
	}
	x := exchangeOf(c)
	if err := a.Keys.Delete(c.Request.Context(), x.call(), x.org, id); err != nil {
		a.fail(c, err)
		return
	}
	writeJSON(c, http.StatusOK, success{true, "Organization key deleted successfully"})
}

// isKeyID reports whether id has the one form in which key IDs are issued.
func isKeyID(id string) bool {
	parsed, err := uuid.Parse(id)
	return err == nil && parsed.String() == id
}
