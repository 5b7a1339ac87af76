package authn

import (
	"testing"

	"github.com/orgkeys/orgkeys/internal/config"
)

// TestWhichSubjectsArePersonal: with an issuer's subject prefix, or a provider's own,
// an address is one all the same.
func TestWhichSubjectsArePersonal(t *testing.T) {
	for subject, want := range map[string]bool{
		"ada@acme.example":                   true,
		"corp:ada@acme.example":              true,
		"mailto:ada%40acme.example":          true,
		"+4917012345678":                     true,
		"tel:+4917012345678":                 true,
		"TEL:%2B4917012345678":               true,
		"corp:+4917012345678":                true,
		"corp:tel:+4917012345678":            true,
		"corp:%2b4917012345678":              true,
		"sms|+4917012345678":                 true,
		"corp:sms|+4917012345678":            true,
		"u-1":                                false,
		"corp:u-1":                           false,
		"a+1":                                false,
		"corp:a+1":                           false,
		"corp:+":                             false,
		"auth0|66f0c1d2e3a4b5c6d7e8f901":     false,
		"repo:acme/a@b/c:ref:refs/heads/v1":  false,
		"repo:acme/app:ref:refs/heads/c++11": false,
	} {
		if got := IsPersonal(config.PseudonymAddresses, subject); got != want {
			t.Errorf("%q: personal is %v, want %v", subject, got, want)
		}
	}
}
