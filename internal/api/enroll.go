package api

import (
	"context"
	"errors"
	"net/http"
	"time"

	"github.com/gin-gonic/gin"

	"github.com/orgkeys/orgkeys/internal/authn"
	"github.com/orgkeys/orgkeys/internal/authz"
	"github.com/orgkeys/orgkeys/internal/enroll"
	"github.com/orgkeys/orgkeys/internal/gate"
	"github.com/orgkeys/orgkeys/internal/node"
	"github.com/orgkeys/orgkeys/internal/org"
	"github.com/orgkeys/orgkeys/internal/orgkey"
)

// Enrollments is what the routes need of *enroll.Service.
type Enrollments interface {
	Create(ctx context.Context, call gate.Call, org org.ID, body []byte, deliver func(enroll.Minted) error) error
	List(ctx context.Context, call gate.Call, org org.ID) ([]enroll.Enrollment, error)
	Get(ctx context.Context, call gate.Call, org org.ID, id string) (enroll.Enrollment, error)
	Approve(ctx context.Context, call gate.Call, org org.ID, id string, body []byte) error
	Revoke(ctx context.Context, call gate.Call, org org.ID, id string) error
	Claim(ctx context.Context, from enroll.Origin, id string, body []byte, deliver func(enroll.Answer) error, ask func(enroll.Challenge) error) error
	Receive(ctx context.Context, from enroll.Origin, id string, body []byte) error
	Generate(ctx context.Context, call gate.Call, org org.ID, body []byte, deliver func(enroll.Answer) error) error
	Fetch(ctx context.Context, call gate.Call, org org.ID, keyID string, deliver func(enroll.Answer) error) error
	ReceiveOwn(ctx context.Context, call gate.Call, org org.ID, keyID string, body []byte) error
	Add(ctx context.Context, call gate.Call, org org.ID, body []byte, deliver func(enroll.Answer) error) error
	AllowDevice(ctx context.Context, call gate.Call, org org.ID, ek string, body []byte) (enroll.AllowedDevice, error)
	ListDevices(ctx context.Context, call gate.Call, org org.ID) ([]enroll.AllowedDevice, error)
	GetDevice(ctx context.Context, call gate.Call, org org.ID, ek string) (enroll.AllowedDevice, error)
	RemoveDevice(ctx context.Context, call gate.Call, org org.ID, ek string) error
}

var _ Enrollments = (*enroll.Service)(nil)

// sealedForm is the media type of a private key that is sealed to a recipient.
const sealedForm = "application/vnd.orgkeys.sealed+json"

func (a *API) routesEnrollments(r gin.IRouter) {
	all := r.Group("/organization/:idOrg/enrollment", a.whileServing, a.authenticate)
	all.POST("", a.organization(authz.CreateEnrollment), a.createEnrollment)
	get(all, "", a.organization(authz.ListEnrollments), a.withoutBody, a.listing, a.listEnrollments)
	one := all.Group("/:idEnrollment")
	get(one, "", a.organization(authz.ListEnrollments), a.withoutBody, a.existing, a.listing, a.getEnrollment)
	one.DELETE("", a.organization(authz.RevokeEnrollment), a.withoutBody, a.reasoned, a.existing, a.revokeEnrollment)
	one.POST("/approve", a.organization(authz.ApproveEnrollment), a.existing, a.approveEnrollment)

	devices := r.Group("/organization/:idOrg/device", a.whileServing, a.authenticate)
	get(devices, "", a.organization(authz.ListDevices), a.withoutBody, a.listing, a.listDevices)
	devices.PUT("/:ek", a.organization(authz.AllowDevice), a.allowDevice)
	get(devices, "/:ek", a.organization(authz.ListDevices), a.withoutBody, a.getDevice)
	devices.DELETE("/:ek", a.organization(authz.RemoveDevice), a.withoutBody, a.reasoned, a.removeDevice)

	nodes := r.Group("/enroll/:idEnrollment", a.whileServing, noStore)
	nodes.POST("", a.claimEnrollment)
	nodes.POST("/receipt", a.receiveEnrollment)

	keys := r.Group("/organization/:idOrg/key/:idKey", a.whileServing, a.authenticate)
	// Not by HEAD: what was handed out, and to nobody, would count as delivered.
	keys.GET("/sealed", a.organization(authz.FetchSealedKey), a.withoutBody, a.fetchSealed)
	keys.POST("/receipt", a.organization(authz.FetchSealedKey), a.receiveSealed)
}

// existing refuses the ID of an enrollment that cannot exist.
func (a *API) existing(c *gin.Context) {
	if !isKeyID(c.Param("idEnrollment")) { // enrollments' IDs have the same form
		a.reject(c, "not_found", enrollmentNotFound)
	}
}

// adminBody reads the body of an authenticated request.
func (a *API) adminBody(c *gin.Context) ([]byte, bool) {
	body, refusal := readBody(c)
	if refusal != nil {
		a.reject(c, refusal.code, *refusal)
	}
	return body, refusal == nil
}

type mintedAnswer struct {
	success
	Data mintedEntry `json:"data"`
}

type mintedEntry struct {
	enrollmentEntry
	Token string `json:"token"`
}

type enrollmentAnswer struct {
	Success bool            `json:"success"`
	Data    enrollmentEntry `json:"data"`
}

type enrollmentList struct {
	Success bool              `json:"success"`
	Data    []enrollmentEntry `json:"data"`
	Total   int               `json:"total"`
}

type enrollmentEntry struct {
	ID        string       `json:"id"`
	OrgID     string       `json:"orgId"`
	State     string       `json:"state"`
	Scope     string       `json:"scope"`
	Origin    string       `json:"origin"`
	Uses      int          `json:"uses"`
	Bind      *bindEntry   `json:"bind,omitempty"`
	Approval  bool         `json:"approval"`
	IP        string       `json:"ip,omitempty"`
	Note      string       `json:"note,omitempty"`
	CreatedAt string       `json:"createdAt"`
	ExpiresAt string       `json:"expiresAt"`
	RevokedAt string       `json:"revokedAt,omitempty"`
	Conflicts int          `json:"conflicts"`
	Refused   []string     `json:"refusedRecipients,omitempty"`
	Claimed   int          `json:"claimed"`
	Claims    []claimEntry `json:"claims"`
	Warning   string       `json:"warning,omitempty"`
}

type bindEntry struct {
	Recipient string `json:"recipient,omitempty"`
	EK        string `json:"ek,omitempty"`
	TPM       bool   `json:"tpm,omitempty"`
}

type claimEntry struct {
	KeyID        string `json:"keyId"`
	State        string `json:"state"`
	Recipient    string `json:"recipient"`
	Address      string `json:"address"`
	ClaimedAt    string `json:"claimedAt"`
	Approved     bool   `json:"approved"`
	EK           string `json:"ek,omitempty"`
	Evidence     string `json:"evidence,omitempty"`
	Fingerprint  string `json:"fingerprint,omitempty"`
	SHA256       string `json:"sha256,omitempty"`
	Answers      int    `json:"answers"`
	DeliverUntil string `json:"deliverUntil,omitempty"`
	ReceivedAt   string `json:"receivedAt,omitempty"`
}

// manyUses warns of what a token with several uses cannot do.
const manyUses = "This token admits several nodes, so one stolen token can admit a node of an attacker. Compare the claims with your nodes."

func enrollmentOf(e enroll.Enrollment) enrollmentEntry {
	entry := enrollmentEntry{
		ID: e.ID, OrgID: string(e.Org), State: enrollmentState(e), Scope: string(e.Scope), Origin: string(e.Origin), Uses: e.Uses, Approval: e.Approval,
		Note: e.Note, CreatedAt: instant(e.Created), ExpiresAt: instant(e.Expires), Conflicts: e.Conflicts, Refused: e.Refused, Claimed: e.Claimed, Claims: make([]claimEntry, len(e.Claims)),
	}
	switch {
	case e.TPM == enroll.AnyAllowedTPM:
		entry.Bind = &bindEntry{TPM: true}
	case e.TPM != "":
		entry.Bind = &bindEntry{EK: e.TPM}
	case e.Recipient != "":
		entry.Bind = &bindEntry{Recipient: e.Recipient}
	}
	if e.Address.IsValid() {
		entry.IP = e.Address.String()
	}
	if !e.Revoked.IsZero() {
		entry.RevokedAt = instant(e.Revoked)
	}
	if e.Uses > 1 {
		entry.Warning = manyUses
	}
	for i, d := range e.Claims {
		entry.Claims[i] = claimOf(d)
	}
	return entry
}

// enrollmentState is that of the claim which has come least far, or what became
// of uses that nobody claimed or whose key never arrived.
func enrollmentState(e enroll.Enrollment) string {
	switch {
	case !e.Revoked.IsZero():
		return "revoked"
	case e.Claimed < e.Uses && e.Over:
		return "expired"
	case e.Claimed < e.Uses:
		return "open"
	case e.Waiting > 0:
		return "waiting"
	case e.Unreceived > 0:
		return "sealed"
	case e.Lost > 0:
		return "expired"
	default:
		return "received"
	}
}

func claimOf(d enroll.Delivery) claimEntry {
	entry := claimEntry{
		KeyID: d.KeyID, State: claimState(d), Recipient: d.Recipient, Address: d.From, ClaimedAt: instant(d.ClaimedAt), Approved: d.Approved,
		EK: d.Device.EK, Evidence: string(d.Device.Evidence), Fingerprint: d.Fingerprint, SHA256: d.Wrapped.SHA256, Answers: d.Answers,
	}
	if d.Stage == enroll.Available {
		entry.DeliverUntil = deadline(d.Until)
	}
	if !d.ReceivedAt.IsZero() {
		entry.ReceivedAt = instant(d.ReceivedAt)
	}
	return entry
}

// deadline is empty where there is none: a rollback was accepted, and the key may
// have been received before.
func deadline(t time.Time) string {
	if t.IsZero() {
		return ""
	}
	return instant(t)
}

func claimState(d enroll.Delivery) string {
	switch d.Stage {
	case enroll.Available:
		return "sealed"
	case enroll.Received:
		return "received"
	case enroll.Ended:
		return "ended"
	default:
		return "waiting"
	}
}

func (a *API) createEnrollment(c *gin.Context) {
	body, ok := a.adminBody(c)
	if !ok {
		return
	}
	x := exchangeOf(c)
	err := a.Enrollments.Create(c.Request.Context(), x.call(), x.org, body, func(m enroll.Minted) error {
		c.Header("Location", "/organization/"+string(m.Org)+"/enrollment/"+m.ID)
		writeJSON(c, http.StatusCreated, mintedAnswer{
			success{true, "Enrollment created. The token is shown only once."},
			mintedEntry{enrollmentOf(m.Enrollment), string(m.Token)},
		})
		return nil
	})
	if err != nil {
		a.fail(c, err)
	}
}

func (a *API) listEnrollments(c *gin.Context) {
	x := exchangeOf(c)
	all, err := a.Enrollments.List(c.Request.Context(), x.call(), x.org)
	if err != nil {
		a.fail(c, err)
		return
	}
	list := enrollmentList{true, make([]enrollmentEntry, len(all)), len(all)}
	for i, e := range all {
		list.Data[i] = enrollmentOf(e)
	}
	a.writeList(c, list)
}

func (a *API) getEnrollment(c *gin.Context) {
	x := exchangeOf(c)
	e, err := a.Enrollments.Get(c.Request.Context(), x.call(), x.org, c.Param("idEnrollment"))
	if err != nil {
		a.fail(c, err)
		return
	}
	a.writeList(c, enrollmentAnswer{true, enrollmentOf(e)}) // it may have many claims
}

func (a *API) approveEnrollment(c *gin.Context) {
	body, ok := a.adminBody(c)
	if !ok {
		return
	}
	x := exchangeOf(c)
	if err := a.Enrollments.Approve(c.Request.Context(), x.call(), x.org, c.Param("idEnrollment"), body); err != nil {
		a.fail(c, err)
		return
	}
	writeJSON(c, http.StatusOK, success{true, "Claim approved"})
}

func (a *API) revokeEnrollment(c *gin.Context) {
	x := exchangeOf(c)
	if err := a.Enrollments.Revoke(c.Request.Context(), x.call(), x.org, c.Param("idEnrollment")); err != nil {
		a.fail(c, err)
		return
	}
	writeJSON(c, http.StatusOK, success{true, "Enrollment revoked"})
}

// sealedAnswer is the answer with a sealed key.
type sealedAnswer struct {
	ID           string      `json:"id,omitempty"`
	Org          string      `json:"org"`
	Origin       string      `json:"origin"`
	KeyID        string      `json:"keyId"`
	Scope        string      `json:"scope"`
	Algorithm    string      `json:"algorithm"`
	Fingerprint  string      `json:"fingerprint"`
	Recipient    string      `json:"recipient"`
	Sealed       *sealedBody `json:"sealed,omitempty"` // not of a key that its holder made
	SHA256       string      `json:"sha256"`
	Event        string      `json:"event"`
	DeliverUntil string      `json:"deliverUntil,omitempty"`
	MAC          []byte      `json:"mac,omitempty"`
}

type sealedBody struct {
	Alg   string `json:"alg"`
	Value []byte `json:"value"`
}

// writeSealed writes a sealed key out, and reports whether all of it was handed
// to the connection.
func writeSealed(c *gin.Context, a enroll.Answer) error {
	connection := http.NewResponseController(underlying(c))
	if err := connection.SetWriteDeadline(time.Now().Add(releaseTimeout)); err != nil {
		return err
	}
	c.Header("X-Key-Id", a.KeyID)
	c.Header("X-Key-Fingerprint", a.Fingerprint)
	answer := sealedAnswer{
		ID: a.Enrollment, Org: a.Org, Origin: a.Origin, KeyID: a.KeyID, Scope: string(a.Scope), Algorithm: orgkey.Algorithm,
		Fingerprint: a.Fingerprint, Recipient: a.Recipient, SHA256: a.SHA256,
		Event: string(a.Event), MAC: a.MAC,
	}
	if a.SHA256 != "" {
		answer.Sealed, answer.DeliverUntil = new(sealedBody(a.Sealed)), deadline(a.Until)
	}
	writeJSON(c, http.StatusOK, answer)
	return connection.Flush()
}

func (a *API) claimEnrollment(c *gin.Context) {
	a.byEnrollment(c, func(ctx context.Context, from enroll.Origin, id string, body []byte) error {
		return a.Enrollments.Claim(ctx, from, id, body, func(answer enroll.Answer) error { return writeSealed(c, answer) }, func(x enroll.Challenge) error {
			writeJSON(c, http.StatusOK, challengeAnswer{challengeBody{x.IDObject, x.EncSecret, x.MAC}})
			return nil
		})
	})
}

// challengeAnswer asks a node's TPM for a proof.
type challengeAnswer struct {
	Challenge challengeBody `json:"challenge"`
}

type challengeBody struct {
	IDObject  []byte `json:"idObject"`
	EncSecret []byte `json:"encSecret"`
	MAC       []byte `json:"mac"`
}

func (a *API) receiveEnrollment(c *gin.Context) {
	a.byEnrollment(c, func(ctx context.Context, from enroll.Origin, id string, body []byte) error {
		if err := a.Enrollments.Receive(ctx, from, id, body); err != nil {
			return err
		}
		writeJSON(c, http.StatusOK, success{true, "Receipt recorded"})
		return nil
	})
}

// byEnrollment serves a node that only its token, or the key it was given, vouches for.
func (a *API) byEnrollment(c *gin.Context, act func(context.Context, enroll.Origin, string, []byte) error) {
	body, ok := a.signedBody(c)
	if !ok {
		return
	}
	id := c.Param("idEnrollment")
	if !isKeyID(id) { // such an enrollment cannot exist
		a.countNode(authn.ReasonEnrollment)
		a.refuse(c, enrollmentUnknown)
		return
	}
	x := exchangeOf(c)
	err := act(c.Request.Context(), enroll.Origin{Request: x.id, Address: x.address}, id, body)
	switch {
	case err == nil:
		return
	case errors.As(err, new(*enroll.InputError)):
		a.countNode(authn.ReasonNodeRequest)
	case errors.Is(err, enroll.ErrUnknown):
		a.countNode(authn.ReasonEnrollment)
	case errors.Is(err, enroll.ErrSignature):
		a.countNode(authn.ReasonNodeSignature)
	case errors.Is(err, node.ErrTooManyFailures):
		a.countNode(authn.ReasonTooMany)
	}
	a.fail(c, err)
}

// writeNew writes out a key that the request brought about.
func writeNew(c *gin.Context) func(enroll.Answer) error {
	return func(answer enroll.Answer) error {
		c.Header("Vary", "Accept, Sec-Fetch-Mode")
		c.Header("Location", "/organization/"+answer.Org+"/key/"+answer.KeyID)
		return writeSealed(c, answer)
	}
}

func (a *API) generateSealed(c *gin.Context) {
	body, ok := a.adminBody(c)
	if !ok {
		return
	}
	x := exchangeOf(c)
	err := a.Enrollments.Generate(c.Request.Context(), x.call(), x.org, body, writeNew(c))
	if err != nil {
		a.fail(c, err)
	}
}

func (a *API) fetchSealed(c *gin.Context) {
	id := c.Param("idKey")
	if !isKeyID(id) {
		a.reject(c, "not_found", keyNotFound)
		return
	}
	x := exchangeOf(c)
	err := a.Enrollments.Fetch(c.Request.Context(), x.call(), x.org, id, func(answer enroll.Answer) error { return writeSealed(c, answer) })
	if errors.Is(err, enroll.ErrNotFound) {
		a.refuse(c, keyNotFound)
		return
	}
	if err != nil {
		a.fail(c, err)
	}
}

func (a *API) receiveSealed(c *gin.Context) {
	body, ok := a.adminBody(c)
	if !ok {
		return
	}
	id := c.Param("idKey")
	if !isKeyID(id) {
		a.reject(c, "not_found", keyNotFound)
		return
	}
	x := exchangeOf(c)
	err := a.Enrollments.ReceiveOwn(c.Request.Context(), x.call(), x.org, id, body)
	if errors.Is(err, enroll.ErrNotFound) {
		a.refuse(c, keyNotFound)
		return
	}
	if err != nil {
		a.fail(c, err)
		return
	}
	writeJSON(c, http.StatusOK, success{true, "Receipt recorded"})
}
