package harness

import (
	"bytes"
	"encoding/base64"
	"encoding/hex"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// A Scanner searches bytes for secrets in every form in which they could have
// leaked: as they are, in hexadecimal of either case, and in base64, standard
// and URL-safe, at any of the three alignments; the texts with or without line
// breaks or escaped line breaks in between.
type Scanner struct{ forms []form }

type form struct {
	name string
	want []byte
	text bool // may be broken by line breaks
}

// piece is how many bytes of a secret count as the secret: a copy that was cut
// off or overwritten in part is a leak as well.
const piece = 24

// AddSecret adds a secret of at least 8 bytes.
func (sc *Scanner) AddSecret(name string, secret []byte) {
	for _, p := range pieces(secret) {
		sc.forms = append(sc.forms, encodings(name, p)...)
	}
}

// AddKey adds what must not be found of a released key: its primes, its
// private exponent, its modulus, and the PEM's lines, which a careless log
// encodes once more.
func (sc *Scanner) AddKey(k Key) {
	sc.AddSecret(k.ID+" p", k.Private.Primes[0].Bytes())
	sc.AddSecret(k.ID+" q", k.Private.Primes[1].Bytes())
	sc.AddSecret(k.ID+" d", k.Private.D.Bytes())
	sc.AddSecret(k.ID+" n", k.Private.N.Bytes())
	lines := bytes.Split(bytes.TrimSpace(k.PEM), []byte("\n"))
	for _, line := range lines[1 : len(lines)-1] {
		sc.AddSecret(k.ID+" as PEM", line)
	}
}

// pieces are the first, middle and last bytes of a long secret.
func pieces(secret []byte) [][]byte {
	if len(secret) <= 2*piece {
		return [][]byte{secret}
	}
	middle := len(secret) / 2
	return [][]byte{secret[:piece], secret[middle : middle+piece], secret[len(secret)-piece:]}
}

func encodings(name string, p []byte) []form {
	hexed := hex.EncodeToString(p)
	forms := []form{
		{name + " in binary", p, false},
		{name + " in hexadecimal", []byte(hexed), true},
		{name + " in upper-case hexadecimal", []byte(strings.ToUpper(hexed)), true},
	}
	for offset := range 3 {
		std := aligned(p, offset)
		forms = append(forms, form{name + " in base64", std, true})
		forms = append(forms, form{name + " in URL-safe base64", []byte(urlSafe.Replace(string(std))), true})
	}
	return forms
}

var urlSafe = strings.NewReplacer("+", "-", "/", "_")

// aligned is what of p's base64 does not depend on the bytes around it when
// offset bytes precede it in its group of three.
func aligned(p []byte, offset int) []byte {
	padded := append(make([]byte, offset), p...)
	text := base64.StdEncoding.EncodeToString(padded[:len(padded)/3*3])
	if offset > 0 {
		text = text[4:]
	}
	return []byte(text)
}

// Scan returns the names of the forms found in b.
func (sc *Scanner) Scan(b []byte) []string {
	joined := unbroken(b)
	var found []string
	for _, f := range sc.forms {
		if bytes.Contains(b, f.want) || f.text && bytes.Contains(joined, f.want) {
			found = append(found, f.name)
		}
	}
	slices.Sort(found)
	return slices.Compact(found)
}

// unbroken is b without line breaks, as they are and as JSON escapes them, and
// without the colons that some tools put between hexadecimal digits.
func unbroken(b []byte) []byte {
	return []byte(strings.NewReplacer(
		"\r", "", "\n", "", " ", "", "\t", "", ":", "", `\r`, "", `\n`, "", `\\n`, "", `\u000a`, "", `\u000d`, "",
	).Replace(string(b)))
}

// ScanTree scans every file under dir and returns path and form of each find.
func (sc *Scanner) ScanTree(t testing.TB, dir string) []string {
	t.Helper()
	var found []string
	files := 0
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		b, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		files++
		for _, f := range sc.Scan(b) {
			found = append(found, path+": "+f)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if files == 0 {
		t.Fatalf("nothing to scan under %s", dir)
	}
	return found
}
