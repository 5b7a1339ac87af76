package console

import (
	"bytes"
	"cmp"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"

	"github.com/orgkeys/orgkeys/client"
	"github.com/orgkeys/orgkeys/internal/snippet"
)

// overviewData is nil where the person's role may not list keys.
type overviewData struct {
	*client.Summary
	Bars []bar
}

// bar is one hour of the plot.
type bar struct {
	X, Y, Height int
	At           time.Time
	N            int
}

// plotHeight is the plot's, in units of its view box.
const plotHeight = 48

// Free are the places of the quota that nobody has.
func (d overviewData) Free() []struct{} {
	return make([]struct{}, min(max(d.Keys.Limit-d.Keys.Used, 0), 64))
}

// Events is the sum of the bars.
func (d overviewData) Events() (n int) {
	for _, b := range d.Bars {
		n += b.N
	}
	return n
}

// Lag is how many events no signed checkpoint covers yet.
func (d overviewData) Lag() int64 { return max(d.Log.Size-d.Log.Signed, 0) }

func (v *visit) overview() error {
	if !v.may("orgkey.list") {
		return v.show(http.StatusOK, "overview", "Overview", overviewData{})
	}
	s, err := v.api.Summary(v.r.Context(), v.org)
	if err != nil {
		return err
	}
	data := overviewData{Summary: s}
	most := max(1, slices.Max(append(s.EventsByHour, 1)))
	for i, n := range s.EventsByHour {
		height := n * plotHeight / most
		if n > 0 {
			height = max(height, 2)
		}
		data.Bars = append(data.Bars, bar{i * 10, plotHeight - height, height, s.EventsFrom.Add(time.Duration(i) * time.Hour), n})
	}
	return v.show(http.StatusOK, "overview", "Overview", data)
}

type keysData struct {
	Own, Nodes []client.Key
}

func (v *visit) keys() error {
	own, err := v.api.Keys(v.r.Context(), v.org)
	if err != nil {
		return err
	}
	ofNodes, err := v.api.NodeKeys(v.r.Context(), v.org)
	if err != nil {
		return err
	}
	return v.show(http.StatusOK, "keys", "Keys", keysData{own, ofNodes})
}

type keyData struct {
	ID       string
	Key      *client.Key // nil: it is no more
	Timeline []entry     // oldest first
}

// idForm is the form of the IDs of keys, nodes and enrollments.
var idForm = regexp.MustCompile(`^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$`)

// timelineLength bounds the events of one key that its page shows.
const timelineLength = 200

func (v *visit) key() error {
	data := keyData{ID: v.r.PathValue("id")}
	for _, list := range []func() ([]client.Key, error){
		func() ([]client.Key, error) { return v.api.Keys(v.r.Context(), v.org) },
		func() ([]client.Key, error) { return v.api.NodeKeys(v.r.Context(), v.org) },
	} {
		keys, err := list()
		if err != nil {
			return err
		}
		if at := slices.IndexFunc(keys, func(k client.Key) bool { return k.ID == data.ID }); at >= 0 {
			data.Key = &keys[at]
			break
		}
	}
	if v.may("event.read") && idForm.MatchString(data.ID) {
		page, err := v.api.Log(v.r.Context(), v.org, client.LogFilter{Object: data.ID, Take: timelineLength})
		if err != nil {
			return err
		}
		data.Timeline = entries(page)
		slices.Reverse(data.Timeline)
	}
	if data.Key == nil && len(data.Timeline) == 0 {
		return &client.Error{Status: http.StatusNotFound, Code: client.KeyNotFound, Message: "The organization has no such key."}
	}
	return v.show(http.StatusOK, "key", "Key "+data.ID[:8], data)
}

func (v *visit) deleteKey() error {
	form, err := v.form()
	if err != nil {
		return err
	}
	if err := v.because(form).DeleteKey(v.r.Context(), v.org, v.r.PathValue("id")); err != nil {
		return err
	}
	return v.then("/console/keys", "key-deleted")
}

// because is the client whose deletions have the form's reason.
func (v *visit) because(form url.Values) *client.Client { return v.api.Because(form.Get("reason")) }

func (v *visit) enrollments() error {
	all, err := v.api.Permissions(v.r.Context(), v.org)
	if err != nil {
		return err
	}
	return v.show(http.StatusOK, "enrollments", "Enrollments", all)
}

func (v *visit) enrollment() error {
	one, err := v.api.Permission(v.r.Context(), v.org, v.r.PathValue("id"))
	if err != nil {
		return err
	}
	return v.show(http.StatusOK, "enrollment", "Enrollment "+one.ID[:8], one)
}

type mintedData struct {
	*client.MintedPermission
	Token    string
	Snippets []snippetText
}

type snippetText struct{ Kind, Text string }

// mint shows the token in its own answer, and nowhere else.
func (v *visit) mint() error {
	form, err := v.form()
	if err != nil {
		return err
	}
	terms, err := readTerms(form)
	if err != nil {
		return err
	}
	minted, err := v.api.CreateEnrollment(v.r.Context(), v.org, terms)
	if err != nil {
		return err
	}
	data := mintedData{MintedPermission: minted, Token: string(minted.Token)}
	server := v.origin(v.r).String()
	for _, kind := range snippet.Kinds() {
		var text bytes.Buffer
		e := snippet.Enrollment{Server: server, ID: minted.ID, Token: data.Token, OwnKey: minted.Origin == "node", TPM: minted.Bind.InTPM()}
		if err := snippet.Write(&text, kind, e); err != nil {
			v.Log.Warn("the console shows no snippet", "error", err)
			continue
		}
		data.Snippets = append(data.Snippets, snippetText{kind, text.String()})
	}
	return v.show(http.StatusCreated, "minted", "Enrollment minted", data)
}

func readTerms(form url.Values) (client.Terms, error) {
	t := client.Terms{
		Scope: form.Get("scope"), Origin: form.Get("origin"), EK: form.Get("ek"), TPM: form.Get("tpm") != "", Recipient: form.Get("recipient"), IP: form.Get("ip"), Note: form.Get("note"), Approval: form.Get("approval") != "",
	}
	uses, err := strconv.Atoi(cmp.Or(form.Get("uses"), "1"))
	hours, err2 := strconv.Atoi(cmp.Or(form.Get("hours"), "24"))
	if err != nil || err2 != nil || uses < 1 || hours < 1 || hours > 1<<20 {
		return t, &client.Error{Status: http.StatusBadRequest, Code: client.InvalidRequest, Message: "Uses and hours are whole numbers, and at least 1."}
	}
	t.Uses, t.Life = uses, time.Duration(hours)*time.Hour
	return t, nil
}

func (v *visit) approve() error {
	form, err := v.form()
	if err != nil {
		return err
	}
	id := v.r.PathValue("id")
	if err := v.api.ApproveEnrollment(v.r.Context(), v.org, id, form.Get("recipient")); err != nil {
		return err
	}
	return v.then("/console/enrollments/"+url.PathEscape(id), "approved")
}

func (v *visit) revoke() error {
	form, err := v.form()
	if err != nil {
		return err
	}
	id := v.r.PathValue("id")
	if err := v.because(form).RevokeEnrollment(v.r.Context(), v.org, id); err != nil {
		return err
	}
	return v.then("/console/enrollments/"+url.PathEscape(id), "revoked")
}

func (v *visit) nodes() error {
	all, err := v.api.Nodes(v.r.Context(), v.org)
	if err != nil {
		return err
	}
	return v.show(http.StatusOK, "nodes", "Nodes", all)
}

func (v *visit) deleteNode() error {
	form, err := v.form()
	if err != nil {
		return err
	}
	if err := v.because(form).DeleteNode(v.r.Context(), v.org, v.r.PathValue("id")); err != nil {
		return err
	}
	return v.then("/console/nodes", "node-deleted")
}

func (v *visit) devices() error {
	all, err := v.api.Devices(v.r.Context(), v.org)
	if err != nil {
		return err
	}
	return v.show(http.StatusOK, "devices", "Devices", all)
}

func (v *visit) allowDevice() error {
	form, err := v.form()
	if err != nil {
		return err
	}
	if err := v.api.AllowDevice(v.r.Context(), v.org, strings.TrimSpace(form.Get("ek")), form.Get("note")); err != nil {
		return err
	}
	return v.then("/console/devices", "device-allowed")
}

func (v *visit) removeDevice() error {
	form, err := v.form()
	if err != nil {
		return err
	}
	if err := v.because(form).RemoveDevice(v.r.Context(), v.org, v.r.PathValue("ek")); err != nil {
		return err
	}
	return v.then("/console/devices", "device-removed")
}

func (v *visit) secrets() error {
	all, err := v.api.StoredSecrets(v.r.Context(), v.org)
	if err != nil {
		return err
	}
	return v.show(http.StatusOK, "secrets", "Boot secrets", all)
}

// putSecret stores a file as it is, or else the text with the line ends of text files:
// forms send CR LF.
func (v *visit) putSecret() error {
	name, value, err := v.secretForm()
	defer clear(value)
	if err != nil {
		return err
	}
	if err := v.api.PutSecret(v.r.Context(), v.org, name, value); err != nil {
		return err
	}
	return v.then("/console/secrets", "secret-stored")
}

// secretForm reads the form part by part, so that no value becomes a string.
func (v *visit) secretForm() (name string, value []byte, err error) {
	parts, err := v.r.MultipartReader()
	if err != nil {
		return "", nil, errForm
	}
	for {
		part, err := parts.NextPart()
		if err == io.EOF {
			return name, value, nil
		}
		if err != nil {
			return "", value, errForm
		}
		content, err := io.ReadAll(part)
		if err != nil {
			clear(content)
			return "", value, errForm
		}
		switch part.FormName() {
		case "name":
			name = string(content)
		case "value":
			text := bytes.ReplaceAll(content, []byte("\r\n"), []byte("\n"))
			clear(content)
			value = text
		case "file":
			if len(content) > 0 {
				clear(value)
				value = content
			}
		}
	}
}

func (v *visit) deleteSecret() error {
	form, err := v.form()
	if err != nil {
		return err
	}
	if err := v.because(form).DeleteSecret(v.r.Context(), v.org, v.r.PathValue("name")); err != nil {
		return err
	}
	return v.then("/console/secrets", "secret-deleted")
}

// group is a choice of events to show.
type group struct {
	Name, Title string
	types       []string
}

var groups = []group{
	{"", "everything", nil},
	{"keys", "keys", []string{"orgkey.created", "orgkey.sealed", "orgkey.delivered", "orgkey.fetched", "orgkey.received", "orgkey.withdrawn", "orgkey.refused", "orgkey.deleted", "orgkey.all_deleted"}},
	{"enrollments", "enrollments and devices", []string{"enrollment.created", "enrollment.claimed", "enrollment.conflict", "enrollment.approved", "enrollment.expired", "enrollment.revoked", "device.allowed", "device.removed"}},
	{"nodes", "nodes", []string{"node.registered", "node.unregistered", "node.deleted"}},
	{"secrets", "boot secrets", []string{"secret.put", "secret.deleted", "secret.fetched"}},
	{"refused", "what was refused or failed", []string{"access.denied", "request.failed", "orgkey.refused", "enrollment.conflict"}},
	{"reads", "reads, and what changed nothing", []string{"orgkey.listed", "enrollment.listed", "node.listed", "secret.listed", "device.listed", "event.read", "event.marked", "policy.asked", "request.repeated"}},
}

type eventsData struct {
	Groups              []group
	Group, Object, By   string
	From, Until         string
	Events              []entry
	Older, Newest, Save string // addresses; empty: there is none
	Archived            int64  // first events of the log that are elsewhere
}

// clock is how browsers send a date and time; here it is UTC.
const clock = "2006-01-02T15:04"

// filter reads the query of the events page.
func filter(q url.Values) (client.LogFilter, error) {
	f := client.LogFilter{Object: q.Get("object"), Actor: q.Get("by")}
	for _, g := range groups {
		if g.Name == q.Get("show") {
			f.Types = g.types
		}
	}
	for name, at := range map[string]*time.Time{"from": &f.From, "until": &f.Until} {
		text := q.Get(name)
		if text == "" {
			continue
		}
		parsed, err := time.Parse(clock, text)
		if err != nil {
			return f, &client.Error{Status: http.StatusBadRequest, Code: client.InvalidRequest, Message: "A time is written as 2026-11-25T04:26, in UTC."}
		}
		*at = parsed
	}
	if text := q.Get("before"); text != "" {
		n, err := strconv.ParseInt(text, 10, 64)
		if err != nil || n < 1 {
			return f, &client.Error{Status: http.StatusBadRequest, Code: client.InvalidRequest, Message: "There is no such page of events."}
		}
		f.Before = n
	}
	return f, nil
}

const eventsPerPage = 50

func (v *visit) events() error {
	q := v.r.URL.Query()
	f, err := filter(q)
	if err != nil {
		return err
	}
	f.Take = eventsPerPage
	page, err := v.api.Log(v.r.Context(), v.org, f)
	if err != nil {
		return err
	}
	data := eventsData{Groups: groups, Group: q.Get("show"), Object: f.Object, By: f.Actor, From: q.Get("from"), Until: q.Get("until"), Events: entries(page), Archived: page.Archived}
	same := url.Values{}
	for _, name := range []string{"show", "object", "by", "from", "until"} {
		if q.Get(name) != "" {
			same.Set(name, q.Get(name))
		}
	}
	data.Save = "/console/events/export?" + same.Encode()
	if f.Before > 0 {
		data.Newest = "/console/events?" + same.Encode()
	}
	if page.Next > 0 {
		same.Set("before", strconv.FormatInt(page.Next, 10))
		data.Older = "/console/events?" + same.Encode()
	}
	return v.show(http.StatusOK, "events", "Events", data)
}

// exportPages bounds an export, at 1000 events a page; with a filter a page looks through
// as many as the API says. Whoever needs more has "orgkeys audit export".
const exportPages = 10

// export sends the events that match, newest first, one leaf a line.
func (v *visit) export() error {
	f, err := filter(v.r.URL.Query())
	if err != nil {
		return err
	}
	leave := v.exports.Take(v.Client(v.r))
	if leave == nil {
		return &client.Error{Status: http.StatusServiceUnavailable, Code: client.Overloaded, Message: "There are too many exports at once. Please try again shortly."}
	}
	defer leave()
	f.Take = 1000
	for n := range exportPages {
		lines, next, err := v.lines(f)
		if err != nil && n == 0 {
			return err
		}
		if err != nil { // an end that nobody takes for the export's
			v.Log.Error("an export of events broke off", "error", err)
			panic(http.ErrAbortHandler)
		}
		if h := v.w.Header(); n == 0 {
			h.Set("Content-Type", "application/jsonl")
			h.Set("Content-Disposition", fmt.Sprintf(`attachment; filename="events-%s-%s.jsonl"`, v.org, time.Now().UTC().Format("20060102T150405Z")))
		}
		if _, err := v.w.Write(lines); err != nil || next == 0 {
			return nil // nobody is there any more, or all is sent
		}
		f.Before = next
	}
	return nil
}

// lines are the leaves of a page of events, and where the next page begins.
func (v *visit) lines(f client.LogFilter) (lines []byte, next int64, err error) {
	page, err := v.api.Log(v.r.Context(), v.org, f)
	if err != nil {
		return nil, 0, err
	}
	for _, e := range page.Entries {
		if !jsontext.Value(e.Leaf).IsValid() {
			return nil, 0, fmt.Errorf("an event is not JSON: %.80q", e.Leaf)
		}
		lines = append(append(lines, e.Leaf...), '\n')
	}
	return lines, page.Next, nil
}

func (v *visit) verify() error {
	return v.show(http.StatusOK, "verify", "Verify", v.r.URL.Query().Get("event"))
}

type policyData struct {
	Roles []string
	Rows  []client.PolicyRow
	Asked *client.Decision
	JSON  string
}

func (v *visit) policy() error {
	data := policyData{Roles: []string{"OWNER", "ADMINISTRATOR", "WORKSPACES", "BILLING", "USER"}}
	var err error
	if data.Rows, err = v.api.Policy(v.r.Context(), v.org); err != nil {
		return err
	}
	if action := v.r.URL.Query().Get("action"); action != "" {
		if data.Asked, err = v.api.AskPolicy(v.r.Context(), v.org, action); err != nil {
			return err
		}
		text, err := json.Marshal(data.Asked, jsontext.WithIndent("  "))
		if err != nil {
			return err
		}
		data.JSON = string(text)
	}
	return v.show(http.StatusOK, "policy", "Policy", data)
}
