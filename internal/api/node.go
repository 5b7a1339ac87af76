package api

import (
	"context"
	"errors"
	"io"
	"net/http"
	"net/url"
	"os"
	"strconv"
	"time"

	"github.com/gin-gonic/gin"

	"github.com/orgkeys/orgkeys/internal/authn"
	"github.com/orgkeys/orgkeys/internal/authz"
	"github.com/orgkeys/orgkeys/internal/gate"
	"github.com/orgkeys/orgkeys/internal/node"
	"github.com/orgkeys/orgkeys/internal/org"
)

// Nodes is what the routes need of *node.Service.
type Nodes interface {
	Register(ctx context.Context, from node.Origin, body []byte) error
	Unregister(ctx context.Context, from node.Origin, body []byte) error
	Secrets(ctx context.Context, from node.Origin, body []byte, deliver func([]node.Envelope) error) error
	List(ctx context.Context, call gate.Call, org org.ID) ([]node.Node, error)
	Delete(ctx context.Context, call gate.Call, org org.ID, id string) error
	PutSecret(ctx context.Context, call gate.Call, org org.ID, name string, value []byte) error
	ListSecrets(ctx context.Context, call gate.Call, org org.ID) ([]node.Secret, error)
	DeleteSecret(ctx context.Context, call gate.Call, org org.ID, name string) error
}

var _ Nodes = (*node.Service)(nil)

func (a *API) routesNodes(r gin.IRouter) {
	signed := r.Group("", a.whileServing, noStore)
	signed.POST("/register", a.signed("Node registered successfully", a.Nodes.Register))
	signed.POST("/unregister", a.signed("Node unregistered successfully", a.Nodes.Unregister))
	signed.POST("/secrets", a.fetchSecrets)

	get(r, "/node", a.whileServing, a.authenticate, a.ofCaller(authz.ListNodes), a.withoutBody, a.listing, a.listNodesByService)

	org := r.Group("/organization/:idOrg", a.whileServing, a.authenticate)
	get(org, "/nodes", a.organization(authz.ListNodes), a.withoutBody, a.listing, a.listNodes)
	org.DELETE("/node/:idNode", a.organization(authz.DeleteNode), a.withoutBody, a.reasoned, a.deleteNode)
	get(org, "/secret", a.organization(authz.ListSecrets), a.withoutBody, a.listing, a.listSecrets)
	org.PUT("/secret/:name", a.organization(authz.PutSecret), a.putSecret)
	org.DELETE("/secret/:name", a.organization(authz.DeleteSecret), a.withoutBody, a.reasoned, a.deleteSecret)
}

func noStore(c *gin.Context) { c.Header("Cache-Control", "no-store") }

// readBody reads a body of at most maxBody bytes.
func readBody(c *gin.Context) (body []byte, refusal *problem) {
	body, err := io.ReadAll(http.MaxBytesReader(underlying(c), c.Request.Body, maxBody))
	switch {
	case err == nil:
		bodyRead(c)
		return body, nil
	case errors.As(err, new(*http.MaxBytesError)):
		refusal = &bodyTooLarge
	case errors.Is(err, os.ErrDeadlineExceeded):
		refusal = &bodyTooSlow
	default:
		refusal = &bodyUnreadable
	}
	clear(body)
	return nil, refusal
}

// signedBody reads the body of a request that only what is in it vouches for. A body
// may take until readTimeout, so those who send none must not hold every place.
func (a *API) signedBody(c *gin.Context) ([]byte, bool) {
	leave := a.reading.Take(a.Proxies.Client(c.Request))
	if leave == nil {
		a.refuse(c, nodesBusy)
		return nil, false
	}
	body, refusal := readBody(c)
	leave()
	if refusal != nil {
		a.countNode(authn.ReasonNodeRequest)
		a.refuse(c, *refusal)
	}
	return body, refusal == nil
}

func origin(c *gin.Context) node.Origin {
	x := exchangeOf(c)
	return node.Origin{Request: x.id, Address: x.address}
}

func (a *API) signed(done string, act func(context.Context, node.Origin, []byte) error) gin.HandlerFunc {
	answer := append(appendJSONString([]byte(`{"success":true,"message":`), []byte(done)), '}') // a success, encoded once
	return func(c *gin.Context) {
		body, ok := a.signedBody(c)
		if !ok {
			return
		}
		if err := act(c.Request.Context(), origin(c), body); err != nil {
			a.failSigned(c, err)
			return
		}
		c.Data(http.StatusOK, "application/json", answer)
	}
}

// failSigned is fail, and counts an unauthenticated sender.
func (a *API) failSigned(c *gin.Context, err error) {
	switch {
	case errors.As(err, new(*node.InputError)):
		a.countNode(authn.ReasonNodeRequest)
	case errors.Is(err, node.ErrStale):
		a.countNode(authn.ReasonNodeTimestamp)
	case errors.Is(err, node.ErrSignature):
		a.countNode(authn.ReasonNodeSignature)
	case errors.Is(err, node.ErrTooManyFailures):
		a.countNode(authn.ReasonTooMany)
	}
	a.fail(c, err)
}

func (a *API) countNode(reason string) {
	a.metrics.authnFailures.WithLabelValues(reason).Inc()
	a.Unauthenticated(reason)
}

func (a *API) fetchSecrets(c *gin.Context) {
	body, ok := a.signedBody(c)
	if !ok {
		return
	}
	err := a.Nodes.Secrets(c.Request.Context(), origin(c), body, func(envelopes []node.Envelope) error {
		return writeEnvelopes(c, envelopes)
	})
	if err != nil {
		a.failSigned(c, err)
	}
}

// writeEnvelopes writes one envelope after the other, so that there is no
// second copy of them all, and bounds how long a reader may hold them.
func writeEnvelopes(c *gin.Context, envelopes []node.Envelope) error {
	if err := http.NewResponseController(underlying(c)).SetWriteDeadline(time.Now().Add(secretsTimeout)); err != nil {
		return err
	}
	c.Header("Content-Type", "application/json")
	// By which a node knows an answer without secrets from somebody else's {}.
	c.Header("X-Secret-Count", strconv.Itoa(len(envelopes)))
	c.Status(http.StatusOK)
	text := []byte("{")
	for i, e := range envelopes {
		if i > 0 {
			text = append(text, ',')
		}
		text = appendJSONString(text, []byte(e.Name+"_enc"))
		text = append(text, ':')
		text = appendJSONString(text, e.Text)
		if _, err := c.Writer.Write(text); err != nil {
			return err
		}
		text = text[:0]
	}
	_, err := c.Writer.Write(append(text, '}'))
	return err
}

type nodeList struct {
	Success bool        `json:"success"`
	Data    []nodeEntry `json:"data"`
	Total   int         `json:"total"`
}

type nodeEntry struct {
	ID           string `json:"id"`
	IP           string `json:"ip"`
	Region       string `json:"region"`
	Version      string `json:"version"`
	Status       string `json:"status"`
	URL          string `json:"url"`
	IDOrg        org.ID `json:"id_org"`
	NodeServices int64  `json:"nodeServices"`
	LastUpdated  string `json:"lastUpdated"` // when it registered last
	LastSeen     string `json:"lastSeen"`    // when it signed anything last
	Provider     string `json:"provider,omitempty"`
}

func (a *API) listNodes(c *gin.Context) { a.answerNodes(c, 0) }

// listNodesByService lists the nodes of the caller's own organization that offer
// every service of a bit mask, as the platform's client asks for them.
func (a *API) listNodesByService(c *gin.Context) {
	services, err := servicesAsked(c.Request.URL.RawQuery)
	if err != nil {
		a.reject(c, "invalid", problem{http.StatusBadRequest, "invalid_request", err.Error(), 0})
		return
	}
	a.answerNodes(c, services)
}

// servicesAsked is the bit mask of a query; without one it has no bits.
func servicesAsked(query string) (int64, error) {
	wrong := &node.InputError{Field: "nodeServices", Problem: "is not one whole number from 0 to 2147483647"}
	values, err := url.ParseQuery(query)
	if err != nil {
		return 0, wrong
	}
	asked, given := values["nodeServices"]
	if !given {
		return 0, nil
	}
	services, err := strconv.ParseUint(asked[0], 10, 31)
	if err != nil || len(asked) != 1 {
		return 0, wrong
	}
	return int64(services), nil
}

// answerNodes lists the organization's nodes that have all bits of services.
func (a *API) answerNodes(c *gin.Context, services int64) {
	x := exchangeOf(c)
	nodes, err := a.Nodes.List(c.Request.Context(), x.call(), x.org)
	if err != nil {
		a.fail(c, err)
		return
	}
	list := nodeList{Success: true, Data: make([]nodeEntry, 0, len(nodes))}
	for _, n := range nodes {
		if max(n.Services, 0)&services != services { // a negative number is no mask
			continue
		}
		list.Data = append(list.Data, nodeEntry{
			ID: n.ID, IP: n.IP.String(), Region: n.Region, Version: n.Version, Status: n.Status, URL: n.URL, IDOrg: n.Org,
			NodeServices: n.Services, LastUpdated: instant(n.Updated), LastSeen: instant(n.Seen), Provider: n.Provider,
		})
	}
	list.Total = len(list.Data)
	a.writeList(c, list)
}

func (a *API) deleteNode(c *gin.Context) {
	id := c.Param("idNode")
	if !isKeyID(id) { // nodes' IDs have the same form
		a.reject(c, "not_found", nodeNotFound)
		return
	}
	x := exchangeOf(c)
	if err := a.Nodes.Delete(c.Request.Context(), x.call(), x.org, id); err != nil {
		a.fail(c, err)
		return
	}
	writeJSON(c, http.StatusOK, success{true, "Node deleted successfully"})
}

type secretList struct {
	Success bool          `json:"success"`
	Data    []secretEntry `json:"data"`
	Total   int           `json:"total"`
}

type secretEntry struct {
	Name      string `json:"name"`
	CreatedAt string `json:"createdAt"`
	UpdatedAt string `json:"updatedAt"`
}

func (a *API) listSecrets(c *gin.Context) {
	x := exchangeOf(c)
	secrets, err := a.Nodes.ListSecrets(c.Request.Context(), x.call(), x.org)
	if err != nil {
		a.fail(c, err)
		return
	}
	list := secretList{true, make([]secretEntry, len(secrets)), len(secrets)}
	for i, s := range secrets {
		list.Data[i] = secretEntry{s.Name, instant(s.Created), instant(s.Updated)}
	}
	a.writeList(c, list)
}

func (a *API) putSecret(c *gin.Context) {
	value, refusal := readBody(c)
	defer clear(value)
	if refusal != nil {
		a.reject(c, refusal.code, *refusal)
		return
	}
	x := exchangeOf(c)
	if err := a.Nodes.PutSecret(c.Request.Context(), x.call(), x.org, c.Param("name"), value); err != nil {
		a.fail(c, err)
		return
	}
	writeJSON(c, http.StatusOK, success{true, "Secret stored successfully"})
}

func (a *API) deleteSecret(c *gin.Context) {
	x := exchangeOf(c)
	if err := a.Nodes.DeleteSecret(c.Request.Context(), x.call(), x.org, c.Param("name")); err != nil {
		a.fail(c, err)
		return
	}
	writeJSON(c, http.StatusOK, success{true, "Secret deleted successfully"})
}
