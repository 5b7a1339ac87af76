package sqlstore_test

import (
	"bytes"
	"compress/flate"
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"fmt"
	"os"
	"runtime"
	"slices"
	"testing"

	"github.com/orgkeys/orgkeys/internal/audit"
	"github.com/orgkeys/orgkeys/internal/audit/tiles"
	"github.com/orgkeys/orgkeys/internal/sqlstore"
)

// persons are the actors and the personal parts of a bundle: those that are in testdata.
func persons() (actors, personal [][]byte) {
	for i := range tiles.Width {
		actor, part := fmt.Appendf(nil, "u-%d", i%7), []byte(nil)
		salt := sha256.Sum256([]byte{byte(i)})
		switch text := base64.StdEncoding.EncodeToString(salt[:audit.SaltSize]); i % 5 {
		case 0:
			actor = nil // has none
		case 1:
			part = fmt.Appendf(nil, `{"salt":"%s","name":"Ada Łovelace","email":"ada@acme.example","address":"2001:db8::%x"}`, text, i)
		case 2:
			part = fmt.Appendf(nil, `{"salt":"%s","note":"a \"reason\" <%d>"}`, text, i)
		default:
			part = fmt.Appendf(nil, `{"salt":"%s","address":"198.51.100.%d"}`, text, i)
		}
		actors, personal = append(actors, actor), append(personal, part)
	}
	return actors, personal
}

func sameTexts(a, b [][]byte) bool { return slices.EqualFunc(a, b, bytes.Equal) }

func wantPersons(t *testing.T, content []byte, actors, personal [][]byte) {
	t.Helper()
	a, p, err := sqlstore.UnpackPersons(content)
	if err != nil {
		t.Fatal(err)
	}
	if !sameTexts(a, actors) || !sameTexts(p, personal) {
		t.Errorf("%q and %q come back, want %q and %q", a, p, actors, personal)
	}
}

func pack(t *testing.T, actors, personal [][]byte) []byte {
	t.Helper()
	content, err := sqlstore.PackPersons(actors, personal)
	must(t, err)
	return content
}

// Every byte comes back, also of parts that look like what is stored and are not: a leaf
// has the digest of all bytes.
func TestPersonalPartsComeBackAsTheyWere(t *testing.T) {
	actors, personal := persons()
	wantPersons(t, pack(t, actors, personal), actors, personal)

	for i, odd := range []string{
		`{"salt":"AAAAAAAAAAAAAAAAAAAAAA==`,   // ends there
		`{"salt":"AAAAAAAAAAAAAAAAAAAAAA=="`,  // without an end
		`{"salt":"AAAAAAAAAAAAAAAAAAAAAB=="}`, // the same salt in other letters
		`{"salt":"AAAAAAAAAAAAAAAAAAAA` + "\n\n" + `=="}`,
		`{"salt":"AAAAAAAAAAAAAAAAAAAAAAAA"}`, // 18 bytes
		`{"salt":"AAAAAAAAAAAAAAAAAAAAAA==AAAA"}`,
		`{"salt":"----------------------=="}`,
		`{"salt":"AAAAAAAAAAAAAAAAAAAAAA==` + "\x00",
		`{"salt":""}`, `{"Salt":"AAAAAAAAAAAAAAAAAAAAAA=="}`, `{}`, `"`, "\x00", "\x00\"", "\x06",
	} {
		personal[i*3] = []byte(odd)
	}
	wantPersons(t, pack(t, actors, personal), actors, personal)

	none := make([][]byte, tiles.Width)
	wantPersons(t, pack(t, none, none), none, none)
}

// What was packed before salts were apart is read as it was then.
func TestPersonalPartsOfTheFormBeforeAreRead(t *testing.T) {
	before, err := os.ReadFile("testdata/persons-deflate")
	must(t, err)
	actors, personal := persons()
	wantPersons(t, before, actors, personal)

	now := pack(t, actors, personal)
	if len(now) >= len(before)*15/16 {
		t.Errorf("%d bytes were packed before, and %d now", len(before), len(now))
	}
	// It is the first byte alone that is no DEFLATE: after any other a reader wants more.
	if _, err := flate.NewReader(bytes.NewReader(now[:1])).Read(make([]byte, 1)); !errors.As(err, new(flate.CorruptInputError)) {
		t.Errorf("%#x as DEFLATE: %v", now[0], err)
	}
}

// A damaged row is an error, and takes no more memory than a whole one may.
func TestDamagedPersonalPartsAreAnError(t *testing.T) {
	actors, personal := persons()
	now := pack(t, actors, personal)
	before, err := os.ReadFile("testdata/persons-deflate")
	must(t, err)
	for _, content := range [][]byte{now, before} {
		for n := len(content) - 1; n >= 0; n -= 1 + (len(content)-n)/64 {
			if _, _, err := sqlstore.UnpackPersons(content[:n]); err == nil {
				t.Errorf("%d of %d bytes are taken", n, len(content))
			}
		}
		for i := 0; i < len(content); i += 1 + i/64 {
			changed := slices.Clone(content)
			changed[i] ^= 0x10
			sqlstore.UnpackPersons(changed) // some is not noticed before the digests are compared
		}
	}
	if _, _, err := sqlstore.UnpackPersons(append(slices.Clone(now), make([]byte, audit.SaltSize)...)); err == nil {
		t.Error("a salt too many is taken")
	}

	var zeros bytes.Buffer
	w, err := flate.NewWriter(&zeros, flate.BestSpeed)
	must(t, err)
	for range 40 {
		_, err := w.Write(make([]byte, 1<<20))
		must(t, err)
	}
	must(t, w.Close())
	for _, content := range [][]byte{zeros.Bytes(), append([]byte{now[0]}, zeros.Bytes()...)} {
		var begin, end runtime.MemStats
		runtime.ReadMemStats(&begin)
		if _, _, err := sqlstore.UnpackPersons(content); err == nil {
			t.Error("40 MiB of nothing is taken")
		}
		runtime.ReadMemStats(&end)
		took := end.TotalAlloc - begin.TotalAlloc
		if took > 256<<20 {
			t.Errorf("40 MiB of nothing takes %d bytes", took)
		}
	}
}
