//go:build cgo

package hsm

import (
	"fmt"
	"strings"

	"github.com/miekg/pkcs11"
)

// findToken returns the slot of the one token that cfg names. Every part that
// is given must agree.
func (cfg Config) findToken(lib *module) (uint, error) {
	slots, err := lib.GetSlotList(true)
	if err != nil {
		return 0, fmt.Errorf("listing the slots: %w", err)
	}
	var found []uint
	var others []string
	for _, slot := range slots {
		info, err := lib.GetTokenInfo(slot)
		if err != nil {
			continue // a token that cannot be read is not ours to use
		}
		if cfg.names(slot, info) {
			found = append(found, slot)
		} else {
			others = append(others, fmt.Sprintf("%q (serial %q, slot %d)", info.Label, info.SerialNumber, slot))
		}
	}
	switch len(found) {
	case 0:
		there := "there is none"
		if len(others) > 0 {
			there = "there are " + strings.Join(others, ", ")
		}
		return 0, fmt.Errorf("no token has %s; %s: %w", cfg.tokenName(), there, pkcs11.Error(pkcs11.CKR_TOKEN_NOT_PRESENT))
	case 1:
		return found[0], nil
	}
	return 0, fmt.Errorf("%d tokens have %s: name one by its serial number or slot as well, or remove or rename the others", len(found), cfg.tokenName())
}

func (cfg Config) names(slot uint, info pkcs11.TokenInfo) bool {
	same := func(want, have string) bool { return want == "" || want == strings.TrimRight(have, " \x00") }
	return same(cfg.TokenLabel, info.Label) && same(cfg.TokenSerial, info.SerialNumber) &&
		same(cfg.TokenManufacturer, info.ManufacturerID) && same(cfg.TokenModel, info.Model) &&
		(cfg.Slot == nil || *cfg.Slot == slot)
}

func (cfg Config) tokenName() string {
	var all []string
	for _, part := range []struct{ what, value string }{
		{"label", cfg.TokenLabel}, {"serial number", cfg.TokenSerial}, {"manufacturer", cfg.TokenManufacturer}, {"model", cfg.TokenModel},
	} {
		if part.value != "" {
			all = append(all, fmt.Sprintf("the %s %q", part.what, part.value))
		}
	}
	if cfg.Slot != nil {
		all = append(all, fmt.Sprintf("slot %d", *cfg.Slot))
	}
	return strings.Join(all, " and ")
}
