package harness

import (
	"bufio"
	"bytes"
	"database/sql"
	"encoding/json"
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	_ "github.com/mattn/go-sqlite3" // the driver of the database that the tests read
)

// SoftHSM is the PKCS#11 module of the default set-up.
const SoftHSM = "/usr/lib/softhsm/libsofthsm2.so"

// Leaf is an event as the log holds it.
type Leaf struct {
	ID      string            `json:"id"`
	Time    string            `json:"time"`
	Type    string            `json:"type"`
	Outcome string            `json:"outcome"`
	Reason  string            `json:"reason"`
	Org     string            `json:"org"`
	Kind    string            `json:"actorKind"`
	Actor   string            `json:"actor"`
	Action  string            `json:"action"`
	Object  string            `json:"object"`
	Request string            `json:"request"`
	Policy  string            `json:"policy"`
	Detail  map[string]string `json:"detail"`
}

// SunkEvent is an event's line in the file sink.
type SunkEvent struct {
	Index int64
	Leaf  Leaf
	Raw   []byte // the leaf, verbatim
}

// Sink is what a file sink holds.
type Sink struct {
	Events      []SunkEvent
	Checkpoints []string
}

// AuditFile is the path of the server's file sink.
func (s *Server) AuditFile() string {
	if f := s.env["ORGKEYS_AUDIT_FILE"]; f != "" {
		return f
	}
	return filepath.Join(s.Dir, "audit.jsonl")
}

// Sink reads the server's file sink. A line that is still being written at the
// end is left out.
func (s *Server) Sink(t testing.TB) Sink {
	t.Helper()
	return ReadSink(t, s.AuditFile())
}

// ReadSink reads a file sink.
func ReadSink(t testing.TB, path string) Sink {
	t.Helper()
	b, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return Sink{}
	}
	if err != nil {
		t.Fatal(err)
	}
	var sink Sink
	r := bufio.NewReader(bytes.NewReader(b))
	for {
		line, err := r.ReadBytes('\n')
		if err != nil {
			return sink
		}
		var l struct {
			Index      *int64          `json:"index"`
			Event      json.RawMessage `json:"event"`
			Checkpoint string          `json:"checkpoint"`
		}
		if err := json.Unmarshal(line, &l); err != nil {
			t.Fatalf("file sink: line %q: %v", line, err)
		}
		if l.Index == nil {
			sink.Checkpoints = append(sink.Checkpoints, l.Checkpoint)
			continue
		}
		e := SunkEvent{Index: *l.Index, Raw: l.Event}
		if err := json.Unmarshal(l.Event, &e.Leaf); err != nil {
			t.Fatalf("file sink: event %q: %v", l.Event, err)
		}
		sink.Events = append(sink.Events, e)
	}
}

// Find returns the events for which is holds, in the log's order.
func (s Sink) Find(is func(Leaf) bool) []Leaf {
	var found []Leaf
	for _, e := range s.Events {
		if is(e.Leaf) {
			found = append(found, e.Leaf)
		}
	}
	return found
}

// Database opens the server's SQLite file. The test's end closes it.
func (s *Server) Database(t testing.TB) *sql.DB {
	t.Helper()
	return OpenDatabase(t, s.Dir)
}

// OpenDatabase opens the SQLite file of a data directory.
func OpenDatabase(t testing.TB, dir string) *sql.DB {
	t.Helper()
	path := filepath.Join(dir, "orgkeys.db")
	if _, err := os.Stat(path); err != nil {
		t.Fatal(err)
	}
	db, err := sql.Open("sqlite3", "file:"+path+"?_busy_timeout=10000")
	if err != nil {
		t.Fatal(err)
	}
	db.SetMaxOpenConns(1)
	t.Cleanup(func() { db.Close() })
	return db
}

// Unprotect drops every trigger, as whoever may write the file can.
func Unprotect(t testing.TB, db *sql.DB) {
	t.Helper()
	for _, name := range Strings(t, db, `SELECT name FROM sqlite_master WHERE type = 'trigger'`) {
		Exec(t, db, `DROP TRIGGER "`+name+`"`)
	}
}

// Exec runs a statement that must succeed and returns the rows it touched.
func Exec(t testing.TB, db *sql.DB, statement string, args ...any) int64 {
	t.Helper()
	r, err := db.Exec(statement, args...)
	if err != nil {
		t.Fatalf("%s: %v", statement, err)
	}
	n, err := r.RowsAffected()
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// Strings is the first column of a query's result.
func Strings(t testing.TB, db *sql.DB, query string, args ...any) []string {
	t.Helper()
	rows, err := db.Query(query, args...)
	if err != nil {
		t.Fatalf("%s: %v", query, err)
	}
	defer rows.Close()
	var all []string
	for rows.Next() {
		var v string
		if err := rows.Scan(&v); err != nil {
			t.Fatalf("%s: %v", query, err)
		}
		all = append(all, v)
	}
	if err := rows.Err(); err != nil {
		t.Fatalf("%s: %v", query, err)
	}
	return all
}

// Number is a query's one number.
func Number(t testing.TB, db *sql.DB, query string, args ...any) int64 {
	t.Helper()
	var n int64
	if err := db.QueryRow(query, args...).Scan(&n); err != nil {
		t.Fatalf("%s: %v", query, err)
	}
	return n
}

// NewToken makes a SoftHSM token as an operator would and returns the path of
// the configuration that leads to it.
func NewToken(t testing.TB, label, pin string) (conf string) {
	t.Helper()
	dir := t.TempDir()
	conf = filepath.Join(dir, "softhsm2.conf")
	tokens := filepath.Join(dir, "tokens")
	if err := os.Mkdir(tokens, 0o700); err != nil {
		t.Fatal(err)
	}
	text := "directories.tokendir = " + tokens + "\nobjectstore.backend = file\nlog.level = ERROR\n"
	if err := os.WriteFile(conf, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("softhsm2-util", "--init-token", "--free", "--label", label, "--so-pin", "security-officer", "--pin", pin)
	cmd.Env = []string{"PATH=" + os.Getenv("PATH"), "SOFTHSM2_CONF=" + conf}
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("making a token: %v\n%s", err, out)
	}
	return conf
}

// TokenObjects lists the objects of the server's SoftHSM token, private ones
// included, one line of pkcs11-tool's a kind of object.
func (s *Server) TokenObjects(t testing.TB) []string {
	t.Helper()
	pin, err := os.ReadFile(s.pinFile())
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("pkcs11-tool", "--module", SoftHSM, "--login", "--pin", "env:TOKEN_PIN", "--list-objects")
	cmd.Env = []string{"PATH=" + os.Getenv("PATH"), "SOFTHSM2_CONF=" + filepath.Join(s.Dir, "softhsm2.conf"), "TOKEN_PIN=" + strings.TrimSpace(string(pin))}
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("listing the token's objects: %v\n%s", err, out)
	}
	var objects []string
	for line := range strings.Lines(string(out)) {
		if strings.Contains(line, " Object") {
			objects = append(objects, strings.TrimSpace(line))
		}
	}
	slices.Sort(objects)
	return objects
}

func (s *Server) pinFile() string {
	if f := s.env["ORGKEYS_PKCS11_PIN_FILE"]; f != "" {
		return f
	}
	return filepath.Join(s.Dir, "pin")
}

// Copy copies a stopped server's data directory.
func Copy(t testing.TB, from string) string {
	t.Helper()
	to := filepath.Join(t.TempDir(), "data")
	if err := os.CopyFS(to, os.DirFS(from)); err != nil {
		t.Fatal(err)
	}
	Tighten(t, to)
	return to
}

// Tighten gives a copied data directory the permissions of the original, which
// CopyFS widens.
func Tighten(t testing.TB, dir string) {
	t.Helper()
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() {
			return os.Chmod(path, 0o700)
		}
		return os.Chmod(path, 0o600)
	})
	if err != nil {
		t.Fatal(err)
	}
}
