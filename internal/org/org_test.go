package org_test

import (
	"errors"
	"strings"
	"testing"

	"github.com/orgkeys/orgkeys/internal/org"
)

func TestOrganizationIDs(t *testing.T) {
	for _, good := range []string{"a", "A-1_b", "0", strings.Repeat("x", 128)} {
		if id, err := org.Parse(good); err != nil || string(id) != good {
			t.Errorf("%q: %q, %v", good, id, err)
		}
	}
	for _, bad := range []string{"", "-a", "_a", "a b", "a/b", "..", "a\n", "a\x00", "é", strings.Repeat("x", 129), "a%2fb", "ａ"} {
		if id, err := org.Parse(bad); !errors.Is(err, org.ErrForm) || id != "" {
			t.Errorf("%q: %q, %v", bad, id, err)
		}
	}
}
