package console

import (
	"embed"
	"fmt"
	"html/template"
	"strings"
	"sync"
	"time"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"

	"github.com/orgkeys/orgkeys/client"
)

//go:embed templates
var templateFiles embed.FS

// pages are the templates, each with the layout around it. They are read only, and parsed for the
// first page: that takes longer than anything else that a command would do before its own work.
var pages = sync.OnceValue(parsePages)

func parsePages() map[string]*template.Template {
	all := map[string]*template.Template{}
	layout := template.Must(template.New("").Funcs(functions).ParseFS(templateFiles, "templates/layout.html"))
	entries, err := templateFiles.ReadDir("templates")
	if err != nil {
		panic(err) // the files are in the binary
	}
	for _, e := range entries {
		if name := strings.TrimSuffix(e.Name(), ".html"); name != "layout" {
			all[name] = template.Must(template.Must(layout.Clone()).ParseFS(templateFiles, "templates/"+e.Name()))
		}
	}
	return all
}

// view is what every page is made from.
type view struct {
	Title   string
	Page    string // which entry of the navigation is the present one
	Static  string // the version of the static files
	Version string // of the program
	Done    string // what was done just before
	Data    any
	visit   *visit // nil where nobody is signed in
}

// SignedIn reports whether somebody is.
func (v *view) SignedIn() bool { return v.visit != nil }

// Org is the person's organization.
func (v *view) Org() string { return v.visit.org }

// Who is the person, by name where the token has one.
func (v *view) Who() string {
	if v.visit.caller.Name != "" {
		return v.visit.caller.Name
	}
	return v.visit.caller.Subject
}

// Roles are the person's.
func (v *view) Roles() string {
	var names []string
	for _, role := range v.visit.caller.Roles {
		names = append(names, string(role))
	}
	return strings.Join(names, ", ")
}

// Until is when the session ends.
func (v *view) Until() time.Time { return v.visit.expires }

// May reports whether a button for the action is shown.
func (v *view) May(action string) bool { return v.visit.may(action) }

// section is an entry of the navigation.
type section struct{ Page, Path, Title, Action string }

// Sections are those that the person may read, if only in part.
func (v *view) Sections() []section {
	var shown []section
	for _, s := range []section{
		{"overview", "", "Overview", ""},
		{"keys", "keys", "Keys", "orgkey.list"},
		{"enrollments", "enrollments", "Enrollments", "enrollment.list"},
		{"nodes", "nodes", "Nodes", "node.list"},
		{"devices", "devices", "Devices", "device.list"},
		{"secrets", "secrets", "Boot secrets", "secret.list"},
		{"events", "events", "Events", "event.read"},
		{"verify", "verify", "Verify", "event.read"},
		{"policy", "policy", "Policy", "policy.ask"},
	} {
		if s.Action == "" || v.May(s.Action) {
			shown = append(shown, s)
		}
	}
	return shown
}

// Here reports whether a section is the page's.
func (v *view) Here(page string) bool {
	return v.Page == page || v.Page == map[string]string{"keys": "key", "enrollments": "enrollment"}[page] || page == "enrollments" && v.Page == "minted"
}

var functions = template.FuncMap{
	"ago":   ago,
	"when":  func(t time.Time) string { return t.UTC().Format("2 Jan 2006, 15:04 UTC") },
	"stamp": func(t time.Time) string { return t.UTC().Format(time.RFC3339) },
	"short": func(id string) string { return id[:min(8, len(id))] },
	"count": count,
	"label": label,
	"lower": strings.ToLower,
	"add":   func(a, b int) int { return a + b },
	"dict":  func(name string, value any) map[string]any { return map[string]any{name: value} },
}

// ago says how long ago, or how far ahead, something is, in one unit.
func ago(t time.Time) string {
	d := time.Since(t)
	form := "%s ago"
	if d < 0 {
		d, form = -d, "in %s"
	}
	switch {
	case d < time.Minute:
		return "just now"
	case d < time.Hour:
		return fmt.Sprintf(form, count(int(d/time.Minute), "minute"))
	case d < 48*time.Hour:
		return fmt.Sprintf(form, count(int(d/time.Hour), "hour"))
	}
	return fmt.Sprintf(form, count(int(d/(24*time.Hour)), "day"))
}

func count(n int, what string) string {
	if n == 1 {
		return "1 " + what
	}
	return fmt.Sprintf("%d %ss", n, what)
}

// labels are the types of events in words.
var labels = map[string]string{
	"orgkey.created": "Key made", "orgkey.sealed": "Key sealed to its recipient", "orgkey.delivered": "Private key handed out", "orgkey.received": "Receipt signed",
	"orgkey.fetched":   "Sealed key handed out again",
	"orgkey.withdrawn": "Key withdrawn", "orgkey.refused": "Key refused", "orgkey.deleted": "Key deleted", "orgkey.all_deleted": "All keys deleted", "orgkey.listed": "Keys listed",
	"enrollment.created": "Enrollment minted", "enrollment.claimed": "Enrollment claimed", "enrollment.conflict": "Second claim refused", "enrollment.approved": "Claim approved",
	"enrollment.expired": "Enrollment expired", "enrollment.revoked": "Enrollment revoked", "enrollment.listed": "Enrollments listed",
	"node.registered": "Node registered", "node.unregistered": "Node unregistered", "node.deleted": "Node deleted", "node.listed": "Nodes listed",
	"secret.fetched": "Boot secrets fetched", "secret.put": "Boot secret stored", "secret.deleted": "Boot secret deleted", "secret.listed": "Boot secrets listed",
	"device.allowed": "Device allowed", "device.removed": "Device removed", "device.listed": "Devices listed",
	"event.read": "Events read", "event.marked": "Events marked", "policy.asked": "Policy asked", "request.failed": "Request failed", "request.repeated": "Request repeated", "access.denied": "Access denied",
	"seal.rewrapped": "Seals rewrapped", "person.erased": "Person erased",
}

func label(kind string) string {
	if text, known := labels[kind]; known {
		return text
	}
	return kind
}

// entry is an event as pages show it.
type entry struct {
	client.LogEntry
	ID      string            `json:"id"`
	Time    time.Time         `json:"time"`
	Type    string            `json:"type"`
	Outcome string            `json:"outcome"`
	Reason  string            `json:"reason"`
	Org     string            `json:"org"`
	Kind    string            `json:"actorKind"`
	Actor   string            `json:"actor"`
	Of      string            `json:"actorOrg"`
	Action  string            `json:"action"`
	Object  string            `json:"object"`
	Request string            `json:"request"`
	Detail  map[string]string `json:"detail"`
}

// entries reads the leaves. One that is no event is shown as what it is.
func entries(page client.LogPage) []entry {
	all := make([]entry, len(page.Entries))
	for i, e := range page.Entries {
		if json.Unmarshal([]byte(e.Leaf), &all[i], jsontext.AllowDuplicateNames(true)) != nil {
			all[i] = entry{Type: "unreadable", Outcome: "failure"}
		}
		all[i].LogEntry = e
	}
	return all
}

// Words is the type in words.
func (e entry) Words() string { return label(e.Type) }

// By is who did it. A name is what a token says, so it never stands alone.
func (e entry) By() string {
	by := e.Actor
	switch {
	case e.Actor == "":
		return "nobody known"
	case e.Kind == "node":
		by = "key " + e.Actor[:min(8, len(e.Actor))]
	case e.Name != "":
		by = e.Name + " (" + e.Actor + ")"
	}
	if e.Of != "" && e.Of != e.Org {
		by += ", of " + e.Of
	}
	return by
}

// Bad reports whether it did not succeed.
func (e entry) Bad() bool { return e.Outcome != "success" || e.Type == "enrollment.conflict" }
