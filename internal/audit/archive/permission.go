package archive

import (
	"cmp"
	"fmt"
	"strconv"

	"github.com/orgkeys/orgkeys/internal/audit"
	"github.com/orgkeys/orgkeys/internal/org"
)

// permission is what an enrollment permits, as the event of its creation has it, and
// what came of it. What that event does not say is not held against anybody.
//
// The order of events is the evidence here, not their times. A claim, an approval and
// an enrollment's end each have its lock, so that none comes behind the end. A key may: when
// PostgreSQL has both, a revocation waits for what is being sealed, and its event can
// have the lower index.
type permission struct {
	at                            *Moment
	org                           org.ID
	scope, origin, tpm, recipient string
	approval                      bool
	uses                          int  // 0: the log does not say
	whole                         bool // whether the log has all of it: what is not there was not asked for

	claims           int
	revoked, expired bool
}

// anyTPM is the TPM of an enrollment for any that the organization allows.
const anyTPM = "allowed"

func permissionOf(index int64, e audit.Event) *permission {
	p := &permission{
		at: momentOf(index, e), org: e.Org, scope: e.Detail["scope"], origin: e.Detail["origin"],
		tpm: e.Detail["tpm"], recipient: e.Detail["recipient"], approval: e.Detail["approval"] == "true",
	}
	if n, err := strconv.ParseUint(e.Detail["uses"], 10, 31); err == nil {
		p.uses = int(n)
	}
	p.whole = p.uses > 0 && p.scope != "" && e.Detail["approval"] != ""
	return p
}

// claim takes a claim into account, and says why it is not permitted.
func (p *permission) claim(e audit.Event) error {
	p.claims++
	ek := e.Detail["ek"]
	switch {
	case e.Org != p.org:
		return fmt.Errorf("enrollment %s of %s is claimed for %s", e.Object, p.org, e.Org)
	case p.revoked || p.expired:
		return fmt.Errorf("enrollment %s is claimed, and was over", e.Object)
	case p.uses > 0 && p.claims > p.uses:
		return fmt.Errorf("enrollment %s is claimed once more than the %d times that were permitted", e.Object, p.uses)
	case p.recipient != "" && e.Detail["recipient"] != p.recipient:
		return fmt.Errorf("enrollment %s is claimed by another recipient than the one that was permitted", e.Object)
	case p.tpm == anyTPM && ek == "":
		return fmt.Errorf("enrollment %s is claimed without a TPM", e.Object)
	case p.tpm != "" && p.tpm != anyTPM && ek != p.tpm:
		return fmt.Errorf("enrollment %s is claimed without the TPM that was permitted", e.Object)
	}
	return nil
}

// placeBack is the reason of enrollment.expired for places of claims that brought no
// key: it does not end the enrollment.
const placeBack = "not_made"

// permit takes an event of an enrollment into account.
func (d *deliveries) permit(index int64, e audit.Event) error {
	p := d.permitted[e.Object]
	switch e.Type {
	case audit.EnrollmentCreated:
		if p != nil {
			return fmt.Errorf("enrollment %s is created a second time", e.Object)
		}
		d.permitted[e.Object] = permissionOf(index, e)
	case audit.EnrollmentRevoked, audit.EnrollmentExpired:
		if p != nil && e.Reason != placeBack {
			p.revoked, p.expired = p.revoked || e.Type == audit.EnrollmentRevoked, p.expired || e.Type == audit.EnrollmentExpired
		}
	case audit.EnrollmentApproved:
		if p != nil && p.revoked { // the sweeper may come late to an expired one
			return fmt.Errorf("a claim of enrollment %s is approved, and it was revoked", e.Object)
		}
		d.approvals[e.Object+"/"+e.Detail["recipient"]] = momentOf(index, e)
	case audit.EnrollmentClaimed:
		if p == nil {
			return fmt.Errorf("enrollment %s is claimed, and nobody created it", e.Object)
		}
		if err := p.claim(e); err != nil {
			return err
		}
		d.claims[e.Detail["key"]] = &claimed{momentOf(index, e), e.Detail["from"], e.Detail["recipient"], e.Object, e.Detail["ek"]}
	}
	return nil
}

// keeps reports why a key of an event is not one that its enrollment permits.
func (d *deliveries) keeps(e audit.Event, lives *inventory) error {
	id := e.Detail["enrollment"]
	if id == "" {
		return nil
	}
	claim := d.claims[e.Object]
	if claim == nil || claim.enrollment != id {
		return fmt.Errorf("key %s did not claim enrollment %s, by which it came", e.Object, id)
	}
	p, kind := d.permitted[id], lives.kinds.get(lives.find(e.Object).kind)
	switch {
	case kind.org != p.org:
		return fmt.Errorf("key %s is of %s, and enrollment %s of %s", e.Object, kind.org, id, p.org)
	case p.scope != "" && kind.scope != p.scope:
		return fmt.Errorf("key %s is for its %s, and enrollment %s permits one for its %s", e.Object, kind.scope, id, p.scope)
	case p.whole && (kind.generatedIn == nodeMade) != (p.origin == nodeMade):
		return fmt.Errorf("key %s was made in %q, and enrollment %s permits one of the origin %q", e.Object, kind.generatedIn, id, cmp.Or(p.origin, "backend"))
	case p.approval && d.approvals[id+"/"+claim.recipient] == nil:
		return fmt.Errorf("key %s was made, and nobody approved its claim of enrollment %s", e.Object, id)
	case cmp.Or(e.Detail["ek"], claim.ek) != claim.ek:
		return fmt.Errorf("key %s is in another TPM than claimed enrollment %s", e.Object, id)
	}
	return nil
}

// compared returns how many enrollments the log has, and of how many that were claimed
// it does not have all that they permit.
func (d *deliveries) compared() (all, inPart int64) {
	for _, p := range d.permitted {
		if p.claims > 0 && !p.whole {
			inPart++
		}
	}
	return int64(len(d.permitted)), inPart
}
