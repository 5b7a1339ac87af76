package authn

import (
	"testing"

	"github.com/orgkeys/orgkeys/internal/config"
)

// Who wrote a file of issuers is told its fields, and not settings that they do not use.
func TestWhatDecidesIsNamedWhereItIsSet(t *testing.T) {
	for _, c := range []struct{ setting, file, want string }{
		{"ORGKEYS_AUDIENCE", "", "ORGKEYS_AUDIENCE"},
		{"ORGKEYS_AUDIENCE", "issuers.json", "audiences in issuers.json"},
		{"ORGKEYS_CLAIM_ROLE, ORGKEYS_ROLE_MAP and ORGKEYS_ROLE_DEFAULT", "issuers.json", "claimRole, roleMap and roleDefault in issuers.json"},
		{"ORGKEYS_POLICY_DIR", "issuers.json", "ORGKEYS_POLICY_DIR"},
		{"", "issuers.json", ""},
	} {
		if got := (Finding{Setting: c.setting}).SettingIn(config.Config{IssuersFile: c.file}); got != c.want {
			t.Errorf("%q with %q: %q, want %q", c.setting, c.file, got, c.want)
		}
	}
}
