package verify

import (
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/go-json-experiment/json/jsontext"

	"github.com/orgkeys/orgkeys/internal/audit"
)

// NewestIn returns the largest checkpoint in text, as a text that
// audit.ParseCheckpoint or audit.Keys.Open reads. It takes every form in which a
// sink has checkpoints: one by itself, signed or not; lines of the file sink;
// what "vault kv get -format=json" prints of the entry in Vault; and entries of
// Vault's audit file. Sinks also hold unsigned checkpoints; with signed, these do not count.
func NewestIn(text string, signed bool) (string, error) {
	if !strings.HasPrefix(strings.TrimSpace(text), "{") {
		text = strings.TrimLeft(text, "\n")
		if !strings.HasSuffix(text, "\n") { // a shell's $(…) takes it away
			text += "\n"
		}
		_, err := audit.ParseCheckpoint(text)
		return text, err
	}
	newest, size := "", int64(-1)
	err := eachString(text, func(name, value string) {
		if name != "checkpoint" && name != "event" {
			return
		}
		c, err := audit.ParseCheckpoint(value)
		if err == nil && c.Size >= size && (!signed || value != c.Text()) {
			newest, size = value, c.Size
		}
	})
	switch {
	case size >= 0: // a last line may be torn
		return newest, nil
	case err != nil:
		return "", fmt.Errorf("reading a sink's lines: %w", err)
	}
	if signed {
		return "", errors.New("it holds no signed checkpoint")
	}
	return "", errors.New("it holds no checkpoint")
}

// eachString calls do for every string in a sequence of JSON values that is a
// member of an object.
func eachString(text string, do func(name, value string)) error {
	in := jsontext.NewDecoder(strings.NewReader(text), jsontext.AllowDuplicateNames(true), jsontext.AllowInvalidUTF8(true))
	names := map[int]string{}
	for {
		token, err := in.ReadToken()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		depth := in.StackDepth()
		kind, length := in.StackIndex(depth)
		switch {
		case kind != '{' || token.Kind() != '"':
		case length%2 == 1:
			names[depth] = token.String()
		default:
			do(names[depth], token.String())
		}
	}
}
