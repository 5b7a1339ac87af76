package authz

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/fstest"
	"time"

	"github.com/orgkeys/orgkeys/policies"
)

const denyAll = `package orgkeys.authz

decision := {"allow": false, "reason": "closed_for_now", "scope": ""}
`

func TestPolicyThatAllowsTheImpossibleDoesNotLoad(t *testing.T) {
	yes := `decision := {"allow": true, "reason": "allowed", "scope": "organization"}`
	for name, fsys := range map[string]fs.FS{
		"everything":                      only(yes),
		"two empty organizations":         rules(yes + ` if { input.caller.org == input.org; input.action == "secret.fetch" }`),
		"an unknown action":               rules(yes + ` if { input.org != ""; input.action != "" }`),
		"incomplete input":                rules(yes + ` if not input.action`),
		"no answer to an empty input":     only(yes + ` if input.org != ""`),
		"an error for an empty input":     rules(yes + ` if { x := object.get(input, "org", 1); startswith(x, "a") }`),
		"no decision object":              only(`allow := false`),
		"a decision that is a bare false": only(`decision := false`),
	} {
		t.Run(name, func(t *testing.T) {
			if p, err := Load(t.Context(), fsys); !errors.Is(err, ErrUnsafe) || p != nil {
				t.Errorf("got %v, want %v", err, ErrUnsafe)
			}
		})
	}
}

func TestPolicyWhoseOwnTestsFailDoesNotLoad(t *testing.T) {
	for name, test := range map[string]string{
		"a failing test":    `test_it if data.orgkeys.authz.decision.allow`,
		"an error":          `test_it if json.unmarshal("{") == {}`,
		"a skipped test":    `todo_test_it if true`,
		"a file of no test": `nothing := true`,
	} {
		t.Run(name, func(t *testing.T) {
			_, err := Load(t.Context(), fstest.MapFS{
				"p.rego":      {Data: []byte(denyAll)},
				"p_test.rego": {Data: []byte("package orgkeys.authz_test\n\n" + test + "\n")},
			})
			if !errors.Is(err, ErrUnsafe) {
				t.Errorf("got %v, want %v", err, ErrUnsafe)
			}
		})
	}
}

func TestPolicyCannotReachOutsideItsInput(t *testing.T) {
	for _, call := range []string{
		`http.send({"method": "get", "url": "http://127.0.0.1"})`,
		`net.lookup_ip_addr("localhost")`,
		`net.cidr_contains("10.0.0.0/8", "10.0.0.1")`,
		`opa.runtime()`,
		`time.now_ns()`,
		`rand.intn("x", 2)`,
		`uuid.rfc4122("x")`,
	} {
		t.Run(call, func(t *testing.T) {
			_, err := Load(t.Context(), rules(`x := `+call))
			if err == nil || !strings.Contains(err.Error(), "undefined function") {
				t.Errorf("got %v", err)
			}
		})
	}
}

func TestDoubtfulPolicyFilesDoNotLoad(t *testing.T) {
	for name, fsys := range map[string]fstest.MapFS{
		"an empty directory":            {},
		"tests alone":                   {"p_test.rego": {Data: []byte(denyAll)}},
		"a syntax error":                {"p.rego": {Data: []byte(denyAll + "decision := {")}},
		"an unused variable (strict)":   {"p.rego": {Data: []byte(denyAll + "f(x) := y if { y := 1; z := 2 }")}},
		"data that is not JSON":         {"p.rego": {Data: []byte(denyAll)}, "d.json": {Data: []byte("{")}},
		"data that is no object":        {"p.rego": {Data: []byte(denyAll)}, "d.json": {Data: []byte("[]")}},
		"one name in two data files":    {"p.rego": {Data: []byte(denyAll)}, "a.json": {Data: []byte(`{"x":1}`)}, "b.json": {Data: []byte(`{"x":1}`)}},
		"a misspelt package":            {"p.rego": {Data: []byte(denyAll)}, "claims.rego": {Data: []byte("package orgkeys.claim\n\ncaller := {}\n")}},
		"another below orgkeys":         {"p.rego": {Data: []byte(denyAll)}, "x.rego": {Data: []byte("package orgkeys.claim\n\ncaller := {}\n")}},
		"orgkeys itself":                {"p.rego": {Data: []byte(denyAll)}, "x.rego": {Data: []byte("package orgkeys\n\nx := 1\n")}},
		"a name that begins so":         {"p.rego": {Data: []byte(denyAll)}, "x.rego": {Data: []byte("package orgkeys.claimsx\n\ncaller := {}\n")}},
		"claims.rego of another's":      {"p.rego": {Data: []byte(denyAll)}, "claims.rego": {Data: []byte("package claims\n\ncaller := {}\n")}},
		"tests of a misspelt package":   {"p.rego": {Data: []byte(denyAll)}, "x_test.rego": {Data: []byte("package orgkeys.authzz_test\n\ntest_x if true\n")}},
		"data as YAML":                  {"p.rego": {Data: []byte(denyAll)}, "d.yaml": {Data: []byte("x: 1")}},
		"data in a subdirectory":        {"p.rego": {Data: []byte(denyAll)}, "x/d.json": {Data: []byte(`{"x":1}`)}},
		"a directory named like a file": {"p.rego": {Mode: fs.ModeSymlink, Data: []byte("x")}, "x": {Mode: fs.ModeDir}},
		"a backslash in a name":         {"p.rego": {Data: []byte(denyAll)}, `x\y.rego`: {Data: []byte(denyAll)}},
		"a name that is not UTF-8":      {"p.rego": {Data: []byte(denyAll)}, "x\xff.json": {Data: []byte("{}")}},
		"more than 4 MiB":               {"p.rego": {Data: []byte(denyAll)}, "d.json": {Data: []byte(`{"x":"` + strings.Repeat("x", maxBytes) + `"}`)}},
	} {
		t.Run(name, func(t *testing.T) {
			if p, err := Load(t.Context(), fsys); err == nil || p != nil {
				t.Error("it loaded")
			}
		})
	}
}

func TestRuleInASubdirectoryCounts(t *testing.T) {
	d, err := decideWith(t, fstest.MapFS{
		"p.rego":      {Data: []byte("package orgkeys.authz\n\ndecision := {\"allow\": false, \"reason\": data.extra.reason, \"scope\": \"\"}\n")},
		"sub/p.rego":  {Data: []byte("package extra\n\nreason := \"from_below\"\n")},
		"lib.rego":    {Data: []byte("package orgkeys.authz.lib\n\nx := 1\n")},
		".git/p.rego": {Data: []byte("not Rego")},
		".p.rego":     {Data: []byte("not Rego")},
		"README.md":   {Data: []byte("not Rego")},
	}, ListKeys)
	if err != nil || d.Reason != "from_below" {
		t.Errorf("got %+v, %v", d, err)
	}
}

func TestRevisionIsTheDigestOfNamesAndContentsWithTheirLengths(t *testing.T) {
	length := func(n byte) string { return "\x00\x00\x00\x00\x00\x00\x00" + string(rune(n)) }
	sum := sha256.Sum256([]byte(length(1) + "a" + length(2) + "xy" + length(1) + "b" + length(0)))
	if got, want := (source{"b": nil, "a": []byte("xy")}).revision(), "sha256:"+hex.EncodeToString(sum[:]); got != want {
		t.Errorf("got %s, want %s", got, want)
	}
}

func TestRevisionChangesWithAnyFile(t *testing.T) {
	base := source{"a.rego": []byte("x"), "b.json": []byte("y")}
	seen := map[string]string{base.revision(): "base"}
	for name, change := range map[string]func(source){
		"content":          func(s source) { s["a.rego"] = []byte("z") },
		"name":             func(s source) { s["c.rego"] = s["a.rego"]; delete(s, "a.rego") },
		"file more":        func(s source) { s["c.rego"] = nil },
		"file less":        func(s source) { delete(s, "b.json") },
		"contents swapped": func(s source) { s["a.rego"], s["b.json"] = s["b.json"], s["a.rego"] },
		"boundary moved":   func(s source) { delete(s, "a.rego"); s["a.reg"] = []byte("ox") },
	} {
		changed := maps.Clone(base)
		change(changed)
		if other, taken := seen[changed.revision()]; taken {
			t.Errorf("%s: the same revision as %s", name, other)
		}
		seen[changed.revision()] = name
	}
}

func TestRolesHaveExactNamesAndIntegers(t *testing.T) {
	for name, want := range map[string]Role{
		"OWNER": Owner, "ADMINISTRATOR": Administrator, "ADMINISTRATORS": Administrator,
		"WORKSPACES": Workspaces, "BILLING": Billing, "USER": User,
		"": "", "owner": "", "OWNER ": "", "OWNERS": "", "255": "", "ADMIN": "", "USER\x00": "", "ОWNER": "",
	} {
		if got, ok := ParseRole(name); got != want || ok != (want != "") {
			t.Errorf("ParseRole(%q) = %q, %t, want %q", name, got, ok, want)
		}
	}
	for n, want := range map[int64]Role{
		255: Owner, 254: Administrator, 2: Workspaces, 1: Billing, 0: User, -1: "", 3: "", 253: "", 256: "", 1<<32 + 255: "", -1 << 63: "",
	} {
		if got, ok := RoleFromInteger(n); got != want || ok != (want != "") {
			t.Errorf("RoleFromInteger(%d) = %q, %t, want %q", n, got, ok, want)
		}
	}
}

// directory is a copy of the shipped policy that a test may change.
func directory(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	if err := os.CopyFS(dir, policies.Files); err != nil {
		t.Fatal(err)
	}
	return dir
}

func write(t *testing.T, name, content string) {
	t.Helper()
	if err := os.WriteFile(name, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
}

// billingAllowed is the shipped policy with BILLING allowed to generate keys.
func billingAllowed(t *testing.T) string {
	t.Helper()
	content, err := fs.ReadFile(policies.Files, "authz.rego")
	if err != nil {
		t.Fatal(err)
	}
	before := `"orgkey.generate": {`
	if strings.Count(string(content), before) != 1 {
		t.Fatal("the policy no longer says in one line who generates keys")
	}
	return strings.Replace(string(content), before, before+`"BILLING": "organization", `, 1)
}

type report struct {
	revision string
	err      error
}

// followed opens dir and follows it until the test ends.
func followed(t *testing.T, dir string) (*Directory, <-chan report) {
	return followedKeeping(t, dir, func(context.Context, *Policy) error { return nil })
}

func followedKeeping(t *testing.T, dir string, keep func(context.Context, *Policy) error) (*Directory, <-chan report) {
	t.Helper()
	d, err := Open(t.Context(), dir)
	if err != nil {
		t.Fatal(err)
	}
	reports, done := make(chan report, 16), make(chan struct{})
	go func() {
		defer close(done)
		d.Follow(t.Context(), keep, func(revision string, err error) { reports <- report{revision, err} })
	}()
	t.Cleanup(func() { <-done })
	return d, reports
}

func next(t *testing.T, reports <-chan report) report {
	t.Helper()
	select {
	case r := <-reports:
		return r
	case <-time.After(20 * time.Second):
		t.Fatal("nothing was reported")
		return report{}
	}
}

func reasonFor(t *testing.T, d *Directory, role Role) Reason {
	t.Helper()
	got, err := d.Decide(t.Context(), Request{Caller{Kind: Person, Subject: "u-1", Org: "acme", Roles: []Role{role}}, GenerateKey, "acme"})
	if err != nil {
		t.Fatal(err)
	}
	if got.Revision != d.Revision() {
		t.Errorf("decided by %s, in force is %s", got.Revision, d.Revision())
	}
	return got.Reason
}

func TestBehaviourFollowsThePolicyDirectory(t *testing.T) {
	dir := directory(t)
	d, reports := followed(t, dir)
	if got := reasonFor(t, d, Billing); got != InsufficientRole {
		t.Fatalf("at first: %s", got)
	}
	shippedRevision := d.Revision()

	for _, name := range []string{"authz_test.rego", "decisions.json"} {
		if err := os.Remove(filepath.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
	}
	write(t, filepath.Join(dir, "authz.rego"), billingAllowed(t))
	for billing := InsufficientRole; billing != Allowed; billing = reasonFor(t, d, Billing) {
		if r := next(t, reports); r.err != nil || r.revision == shippedRevision {
			t.Fatalf("got %+v", r)
		}
	}

	write(t, filepath.Join(dir, "authz.rego"), denyAll)
	if r := next(t, reports); r.err != nil || r.revision != d.Revision() {
		t.Fatalf("got %+v", r)
	}
	if got := reasonFor(t, d, Owner); got != "closed_for_now" {
		t.Errorf("with the policy that denies all: %s", got)
	}
}

func TestOldPolicyStaysInForceWhileTheDirectoryIsUnusable(t *testing.T) {
	for name, spoil := range map[string]func(t *testing.T, dir string){
		"a syntax error":            func(t *testing.T, dir string) { write(t, filepath.Join(dir, "authz.rego"), "package") },
		"a change its tests refuse": func(t *testing.T, dir string) { write(t, filepath.Join(dir, "authz.rego"), billingAllowed(t)) },
		"everybody may change it":   func(t *testing.T, dir string) { chmod(t, dir, 0o777) },
		"the directory gone": func(t *testing.T, dir string) {
			if err := os.Rename(dir, dir+".gone"); err != nil {
				t.Fatal(err)
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dir := filepath.Join(t.TempDir(), "policies")
			if err := os.CopyFS(dir, policies.Files); err != nil {
				t.Fatal(err)
			}
			d, reports := followed(t, dir)
			revision := d.Revision()
			spoil(t, dir)
			if r := next(t, reports); r.err == nil || r.revision != revision {
				t.Fatalf("got %+v", r)
			}
			if got := reasonFor(t, d, Billing); got != InsufficientRole || d.Revision() != revision {
				t.Errorf("BILLING: %s, by %s", got, d.Revision())
			}

			if err := os.RemoveAll(dir); err != nil {
				t.Fatal(err)
			}
			if err := os.CopyFS(dir, policies.Files); err != nil {
				t.Fatal(err)
			}
			for r := next(t, reports); r.err != nil; r = next(t, reports) {
				if r.revision != revision {
					t.Fatalf("got %+v", r)
				}
			}
			if d.Revision() != revision {
				t.Errorf("in force is %s, want %s", d.Revision(), revision)
			}
		})
	}
}

// What decides is in the log by its revision, whose text auditors need.
func TestAPolicyDecidesNothingBeforeItsTextIsStored(t *testing.T) {
	shipped, closed, dir := directory(t), t.TempDir(), filepath.Join(t.TempDir(), "policy")
	write(t, filepath.Join(closed, "authz.rego"), denyAll)
	link := func(to string) { // at once: no reading finds half of it
		if err := errors.Join(os.Symlink(to, dir+".new"), os.Rename(dir+".new", dir)); err != nil {
			t.Fatal(err)
		}
	}
	link(shipped)
	stored := make(chan error)
	d, reports := followedKeeping(t, dir, func(ctx context.Context, p *Policy) error {
		if string(p.Files()["authz.rego"]) != denyAll {
			t.Errorf("stored is %q", p.Files())
		}
		select {
		case err := <-stored:
			return err
		case <-ctx.Done():
			return ctx.Err()
		}
	})
	revision := d.Revision()
	unchanged := func(while string) {
		t.Helper()
		if got := reasonFor(t, d, Owner); got != Allowed || d.Revision() != revision {
			t.Errorf("%s: %s, by %s", while, got, d.Revision())
		}
	}
	link(closed)
	failure := errors.New("the database is away")
	stored <- failure // whoever sends finds the call under way
	if r := next(t, reports); !errors.Is(r.err, failure) || r.revision != revision {
		t.Fatalf("got %+v", r)
	}
	unchanged("after it failed")
	stored <- failure
	unchanged("while it is tried again")
	stored <- nil
	if r := next(t, reports); r.err != nil || r.revision == revision || r.revision != d.Revision() {
		t.Fatalf("got %+v", r)
	}
	if got := reasonFor(t, d, Owner); got != "closed_for_now" {
		t.Errorf("with its text stored: %s", got)
	}
}

func TestDirectoryBehindKubernetesLinksIsReadAndFollowed(t *testing.T) {
	dir := t.TempDir()
	for _, version := range []string{"..1", "..2"} {
		if err := os.Mkdir(filepath.Join(dir, version), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	write(t, filepath.Join(dir, "..1", "p.rego"), strings.Replace(denyAll, "closed_for_now", "first", 1))
	write(t, filepath.Join(dir, "..2", "p.rego"), strings.Replace(denyAll, "closed_for_now", "second", 1))
	link := func(target, name string) {
		if err := os.Symlink(target, filepath.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
	}
	link("..1", "..data")
	link(filepath.Join("..data", "p.rego"), "p.rego")
	d, reports := followed(t, dir)
	if got := reasonFor(t, d, Owner); got != "first" {
		t.Fatalf("at first: %s", got)
	}
	link("..2", "..data_tmp")
	if err := os.Rename(filepath.Join(dir, "..data_tmp"), filepath.Join(dir, "..data")); err != nil {
		t.Fatal(err)
	}
	if r := next(t, reports); r.err != nil {
		t.Fatal(r.err)
	}
	if got := reasonFor(t, d, Owner); got != "second" {
		t.Errorf("after the link moved: %s", got)
	}
}

func chmod(t *testing.T, path string, mode os.FileMode) {
	t.Helper()
	if err := os.Chmod(path, mode); err != nil {
		t.Fatal(err)
	}
}

func TestOpenRefusesWhatEverybodyMayWrite(t *testing.T) {
	for _, path := range []string{".", "authz.rego", "below", "below/more.rego"} {
		t.Run(path, func(t *testing.T) {
			dir := directory(t)
			if err := os.Mkdir(filepath.Join(dir, "below"), 0o700); err != nil {
				t.Fatal(err)
			}
			write(t, filepath.Join(dir, "below", "more.rego"), "package below")
			if _, err := Open(t.Context(), dir); err != nil {
				t.Fatal(err)
			}
			spoiled := filepath.Join(dir, path)
			chmod(t, spoiled, 0o777)
			if _, err := Open(t.Context(), dir); err == nil || !strings.Contains(err.Error(), "chmod o-w "+spoiled) {
				t.Errorf("%v", err)
			}
		})
	}
}

func TestOpenRefusesADirectoryThatIsNotThere(t *testing.T) {
	if d, err := Open(t.Context(), filepath.Join(t.TempDir(), "none")); !errors.Is(err, fs.ErrNotExist) || d != nil {
		t.Errorf("got %v, want %v", err, fs.ErrNotExist)
	}
}
