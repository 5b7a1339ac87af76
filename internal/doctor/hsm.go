package doctor

import (
	"context"
	"errors"
	"os"
	"path/filepath"

	"github.com/orgkeys/orgkeys/internal/hsm"
	"github.com/orgkeys/orgkeys/internal/privatefile"
	"github.com/orgkeys/orgkeys/internal/server"
	"github.com/orgkeys/orgkeys/internal/sqlstore"
)

// hsm tries every operation that the server needs of the token, and then opens it
// as the server does. It leaves no object in the token.
func (d *doctor) hsm(ctx context.Context, db *sqlstore.DB) {
	hc, err := d.hsmConfig()
	if err != nil {
		d.fail("HSM", "install the module, or correct ORGKEYS_PKCS11_MODULE and its PIN file", "%v", err)
		return
	}
	if hc.Module == "" {
		return // the server has not made its token yet
	}
	switch err := privatefile.CheckDir(d.cfg.DataDir); {
	case errors.Is(err, os.ErrNotExist): // one that was made here would be this user's, and perhaps not the server's
		d.warn("HSM", "make the data directory as the user that runs orgkeys, chmod 700, or start orgkeys serve", "the PIN was not tried: one that the token refuses is recorded in %s, which does not exist yet", d.cfg.DataDir)
		return
	case err != nil:
		d.fail("HSM", "correct the data directory: a PIN that the token refuses is recorded there, so no PIN is used without it", "%v", err)
		return
	}
	if db != nil { // a nil *sqlstore.DB is no hsm.Register
		hc.Register = db
	}
	requirements, err := hsm.Examine(ctx, hc)
	switch {
	case errors.Is(err, hsm.ErrPIN):
		d.fail("HSM", "see docs/hsm.md, When the token refuses the PIN", "%v", err)
		return
	case err != nil:
		d.fail("HSM", "make sure that the module and the token are there; docs/hsm.md has settings for several HSMs", "%v", err)
		return
	}
	if d.requirements(requirements) {
		d.token(ctx, db, hc)
	}
}

// hsmConfig finds the module; none if orgkeys serve has not made its token yet.
func (d *doctor) hsmConfig() (hsm.Config, error) {
	hc := server.HSMConfig(d.cfg, d.cfg.DataDir)
	var err error
	switch {
	case d.cfg.PINFile == "":
		if _, statErr := os.Stat(filepath.Join(d.cfg.DataDir, "tokens")); errors.Is(statErr, os.ErrNotExist) {
			d.warn("HSM", "orgkeys serve makes it", "there is no SoftHSM token in %s yet", d.cfg.DataDir)
			return hsm.Config{}, nil
		}
		hc, err = hsm.LocateSoftHSM(d.cfg.DataDir)
	case hc.Module == "":
		hc.Module, err = hsm.FindSoftHSM()
	}
	hc.Log, hc.ChangeNothing = d.log, true
	return hc, err
}

// requirements adds a diagnosis for each requirement, and reports whether the token
// meets all that are not optional.
func (d *doctor) requirements(all []hsm.Requirement) bool {
	complete := true
	for _, r := range all {
		switch {
		case r.Met:
			d.ok("HSM", "yes: %s: %s", r.Name, r.Detail)
		case r.Optional:
			d.warn("HSM", "optional: docs/hsm.md says what orgkeys does without it", "no: %s: %s", r.Name, r.Detail)
		default:
			complete = false
			d.fail("HSM", "this token cannot be used; docs/hsm.md lists HSMs that can", "no: %s: %s", r.Name, r.Detail)
		}
	}
	return complete
}

// token opens the token without making a sealing key.
func (d *doctor) token(ctx context.Context, db *sqlstore.DB, hc hsm.Config) {
	sealed := false
	if db != nil {
		var err error
		if sealed, err = db.HasSealed(ctx); err != nil {
			d.fail("HSM", "see the database's own log", "%v", err)
			return
		}
	}
	token, err := hsm.Open(ctx, hc)
	if errors.Is(err, hsm.ErrNoSealingKey) && !sealed {
		d.warn("HSM", "orgkeys serve makes it at its first start", "the login succeeded; the token has no sealing key yet")
		return
	}
	if err != nil {
		d.fail("HSM", "make sure that it is the token that sealed the records", "%v", err)
		return
	}
	if err := token.Healthy(ctx); err != nil {
		d.fail("HSM", "see the token's own log", "%v", errors.Join(err, token.Close()))
		return
	}
	d.ok("HSM", "the login succeeded, and the token has its sealing key, CKA_ID %x", token.SealingKeyID())
	d.sealingKey(ctx, db, token)
	if err := token.Close(); err != nil {
		d.fail("HSM", "see the token's own log", "%v", err)
	}
}
