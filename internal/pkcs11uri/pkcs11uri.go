// Package pkcs11uri reads PKCS#11 URIs (RFC 7512).
package pkcs11uri

import (
	"errors"
	"fmt"
	"net/url"
	"path/filepath"
	"strconv"
	"strings"
)

// URI is what a URI says. Attributes that it does not have are empty.
type URI struct {
	Token        string
	Serial       string
	Manufacturer string
	Model        string
	Slot         *uint  // slot-id; nil: not given
	Object       string // the label of a key
	ID           string // the CKA_ID of a key, its bytes
	ModulePath   string
	PINFile      string // pin-source
}

const scheme = "pkcs11:"

// Parse reads a URI. An attribute that is given twice, is unknown, or names
// something that orgkeys does not use is an error: ignored, it might select
// another token than was meant.
func Parse(text string) (URI, error) {
	rest, ok := strings.CutPrefix(text, scheme)
	if !ok {
		return URI{}, fmt.Errorf("is not a PKCS#11 URI: it begins with %s (RFC 7512)", scheme)
	}
	path, query, _ := strings.Cut(rest, "?")
	var u URI
	seen := map[string]bool{}
	for _, part := range []struct {
		text, separator string
		set             func(*URI, string, string) error
	}{{path, ";", setPath}, {query, "&", setQuery}} {
		for _, pair := range strings.Split(part.text, part.separator) {
			if pair == "" {
				continue
			}
			name, raw, _ := strings.Cut(pair, "=")
			value, err := url.PathUnescape(raw)
			if err != nil {
				return URI{}, fmt.Errorf("has a %s that is not percent-encoded as RFC 7512 wants it", name)
			}
			if seen[name] {
				return URI{}, fmt.Errorf("has %s twice", name)
			}
			seen[name] = true
			if value == "" {
				return URI{}, fmt.Errorf("has an empty %s", name)
			}
			if err := part.set(&u, name, value); err != nil {
				return URI{}, err
			}
		}
	}
	return u, nil
}

func setPath(u *URI, name, value string) error {
	switch name {
	case "token":
		u.Token = value
	case "serial":
		u.Serial = value
	case "manufacturer":
		u.Manufacturer = value
	case "model":
		u.Model = value
	case "object":
		u.Object = value
	case "id":
		u.ID = value
	case "type":
		if value != "secret-key" {
			return fmt.Errorf("has the type %s: the sealing key is a secret-key", value)
		}
	case "slot-id":
		n, err := strconv.ParseUint(value, 10, 0)
		if err != nil {
			return errors.New("has a slot-id that is no number")
		}
		slot := uint(n)
		u.Slot = &slot
	default:
		return fmt.Errorf("has %s, which orgkeys does not use: it knows token, serial, manufacturer, model, slot-id, object, id and type", name)
	}
	return nil
}

func setQuery(u *URI, name, value string) (err error) {
	switch name {
	case "module-path":
		u.ModulePath = value
	case "pin-source":
		u.PINFile, err = pinFile(value)
	case "pin-value":
		return errors.New("has a pin-value: a PIN in a setting is seen by too many; use pin-source=file:/path")
	default:
		return fmt.Errorf("has %s, which orgkeys does not use: it knows module-path and pin-source", name)
	}
	return err
}

// pinFile takes what section 2.4 of the RFC allows of a pin-source that is a
// file: an absolute path, or a file URI.
func pinFile(source string) (string, error) {
	path := source
	if rest, ok := strings.CutPrefix(source, "file:"); ok {
		if path = rest; strings.HasPrefix(rest, "//") {
			host, after, _ := strings.Cut(rest[2:], "/")
			if host != "" && host != "localhost" {
				return "", errors.New("has a pin-source on another host")
			}
			path = "/" + after
		}
	}
	if !filepath.IsAbs(path) {
		return "", errors.New("has a pin-source that is not a file with an absolute path: write pin-source=file:/path")
	}
	return path, nil
}
