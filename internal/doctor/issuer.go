package doctor

import (
	"cmp"
	"context"
	"crypto/x509"
	"errors"

	"github.com/orgkeys/orgkeys/internal/authn"
)

func (d *doctor) tokenKeys(ctx context.Context) {
	if d.cfg.Development() {
		d.warn("token keys", "set ORGKEYS_ISSUER and ORGKEYS_AUDIENCE", "the development issuer signs them: anybody who can read the data directory can impersonate anybody")
		return
	}
	configured, err := authn.Configured(d.cfg)
	var issuers []authn.Issuer
	if err == nil {
		issuers, err = authn.Open(configured, d.cfg.JWKSInterval, d.log)
	}
	if err != nil {
		d.fail("token keys", "fix the settings of the issuer: orgkeys serve --help lists them", "%v", err)
		return
	}
	for n, issuer := range issuers {
		d.issuer(ctx, configured[n], issuer)
	}
}

// issuer reads the issuer's keys, and compares the settings with the issuer's
// metadata.
func (d *doctor) issuer(ctx context.Context, c authn.IssuerConfig, issuer authn.Issuer) {
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	const exactly = "set the issuer to exactly the value of the tokens' claim iss: orgkeys token explain < token"
	var mismatch *authn.IssuerMismatchError
	var unknown x509.UnknownAuthorityError
	switch err := issuer.Keys.Read(ctx); {
	case errors.As(err, &mismatch):
		d.fail("issuer", exactly, "%v", err)
		return
	case errors.As(err, &unknown):
		d.fail("token keys", "name its certificate authority in ORGKEYS_JWKS_CA_FILE, or jwksCaFile in the file of issuers", "%s: %v", c.Issuer, err)
		return
	case err != nil:
		d.fail("token keys", "make sure that ORGKEYS_JWKS, or the issuer's metadata, names the issuer's JWKS and that it can be read from here", "%s: %v", c.Issuer, err)
		return
	}
	d.ok("token keys", "%s: read from %s", c.Issuer, cmp.Or(c.JWKS, "the URL in the issuer's metadata"))
	if !c.IsRemote() {
		return // its provider may be unreachable on purpose
	}
	switch where, err := authn.Discover(ctx, c); {
	case errors.As(err, &mismatch):
		d.fail("issuer", exactly, "%v", err)
	case err != nil:
		d.warn("issuer", "a provider without metadata needs nothing; compare with orgkeys token explain < token", "%s cannot be compared with its metadata: %v", c.Issuer, err)
	case c.JWKS != "" && where != c.JWKS:
		d.warn("issuer", "unset ORGKEYS_JWKS, and the metadata is used", "the metadata of %s says that its keys are at %s, but %s is configured", c.Issuer, where, c.JWKS)
	default:
		d.ok("issuer", "%s: the metadata has the same name", c.Issuer)
	}
}
