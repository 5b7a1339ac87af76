package config

import (
	"fmt"

	"github.com/orgkeys/orgkeys/internal/pkcs11uri"
)

// Token says which PKCS#11 token, and which sealing key in it.
type Token struct {
	InitArgs     string
	Label        string
	Serial       string
	Manufacturer string
	Model        string
	Slot         *uint
	KeyLabel     string
	KeyID        string // a CKA_ID, its bytes
	URI          pkcs11uri.URI
}

// defaultTokenLabel is that of a token which nothing else names.
const defaultTokenLabel = "orgkeys"

// fillToken takes over what the URI says. What another setting says too is an
// error, if it is something else.
func (c *Config) fillToken() error {
	u := c.Token.URI
	c.Token.URI = pkcs11uri.URI{}
	for _, part := range []struct {
		attribute, setting, value string
		field                     *string
	}{
		{"token", "ORGKEYS_PKCS11_TOKEN_LABEL", u.Token, &c.Token.Label},
		{"serial", "ORGKEYS_PKCS11_TOKEN_SERIAL", u.Serial, &c.Token.Serial},
		{"module-path", "ORGKEYS_PKCS11_MODULE", u.ModulePath, &c.PKCS11Module},
		{"pin-source", "ORGKEYS_PKCS11_PIN_FILE", u.PINFile, &c.PINFile},
		{"manufacturer", "", u.Manufacturer, &c.Token.Manufacturer},
		{"model", "", u.Model, &c.Token.Model},
		{"object", "", u.Object, &c.Token.KeyLabel},
		{"id", "", u.ID, &c.Token.KeyID},
	} {
		if part.value == "" {
			continue
		}
		if *part.field != "" && *part.field != part.value {
			return fmt.Errorf("ORGKEYS_PKCS11_URI has another %s than %s says: give one of them", part.attribute, part.setting)
		}
		*part.field = part.value
	}
	if u.Slot != nil {
		if c.Token.Slot != nil && *c.Token.Slot != *u.Slot {
			return fmt.Errorf("ORGKEYS_PKCS11_URI has another slot-id than ORGKEYS_PKCS11_SLOT says: give one of them")
		}
		c.Token.Slot = u.Slot
	}
	if t := c.Token; t.Label == "" && t.Serial == "" && t.Slot == nil && t.Manufacturer == "" && t.Model == "" {
		c.Token.Label = defaultTokenLabel
	}
	return nil
}
