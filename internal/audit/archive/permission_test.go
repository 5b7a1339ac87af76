package archive_test

import (
	"crypto"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/orgkeys/orgkeys/internal/audit"
	"github.com/orgkeys/orgkeys/internal/audit/audittest"
	"github.com/orgkeys/orgkeys/internal/envelope"
	"github.com/orgkeys/orgkeys/internal/orgkey"
)

// detail is that of an event: the usual one, with what is given in its place.
func detail(usual map[string]string, pairs ...string) map[string]string {
	all := maps.Clone(usual)
	for i := 0; i < len(pairs); i += 2 {
		if all[pairs[i]] = pairs[i+1]; pairs[i+1] == "" {
			delete(all, pairs[i])
		}
	}
	return all
}

// elsewhere makes an event another organization's.
func elsewhere(e audit.Event) audit.Event {
	e.Org = "other"
	return e
}

// permits is an enrollment's creation. Without pairs it is for one node.
func (l enrolling) permits(pairs ...string) audit.Event {
	e := l.Key(audit.EnrollmentCreated, "e-1")
	e.Detail = detail(map[string]string{"scope": "node", "uses": "1", "seconds": "86400", "approval": "false"}, pairs...)
	return e
}

func (l enrolling) claims(key string, pairs ...string) audit.Event {
	return l.event(audit.EnrollmentClaimed, "e-1", detail(map[string]string{"key": key, "recipient": "r-" + key, "from": claimant}, pairs...))
}

func (l enrolling) approves(recipient string) audit.Event {
	e := l.Key(audit.EnrollmentApproved, "e-1")
	e.Detail = map[string]string{"recipient": recipient}
	return e
}

// ends is an enrollment's end, revoked or expired.
func (l enrolling) ends(how audit.Type) audit.Event {
	e := l.Key(how, "e-1")
	e.Detail = nil
	return e
}

func (l enrolling) creates(key string, pairs ...string) audit.Event {
	return l.event(audit.KeyCreated, key, detail(map[string]string{
		"backend": "pkcs11", "algorithm": "rsa-2048", "fingerprint": "f-" + key, "scope": "node", "enrollment": "e-1",
	}, pairs...))
}

func (l enrolling) seals(key string, pairs ...string) audit.Event {
	return l.event(audit.KeySealed, key, detail(map[string]string{"recipient": "r-" + key, "alg": "a", "sealed": "d-" + key, "enrollment": "e-1"}, pairs...))
}

// adds is a key that its holder made, by an enrollment.
func (l enrolling) adds(key string) audit.Event {
	return l.creates(key, "backend", "node", "recipient", "r-"+key, "signature", "AAAA")
}

// What was not permitted is found in the export alone, by both implementations, each
// of which names it.
func TestKeysThatNobodyPermittedAreFound(t *testing.T) {
	const ek, another = "sha256-aa", "sha256-bb"
	for name, c := range map[string]struct {
		log          func(l enrolling) []audit.Event
		ours, theirs string // what they say
	}{
		"one use, two keys": {func(l enrolling) []audit.Event {
			return []audit.Event{l.permits(), l.claims("k-a"), l.creates("k-a"), l.seals("k-a"), l.claims("k-b"), l.creates("k-b"), l.seals("k-b")}
		}, "once more than the 1 times", "once more than the 1 times"},
		"two uses, three claims": {func(l enrolling) []audit.Event {
			return []audit.Event{l.permits("uses", "2"), l.claims("k-a"), l.claims("k-b"), l.claims("k-c")}
		}, "once more than the 2 times", "once more than the 2 times"},
		"permitted a second time": {func(l enrolling) []audit.Event {
			return []audit.Event{l.permits(), l.claims("k-a"), l.permits(), l.claims("k-b")}
		}, "created a second time", "created a second time"},
		"a key that claimed nothing": {func(l enrolling) []audit.Event {
			return []audit.Event{l.permits(), l.creates("k-a")}
		}, "did not claim enrollment e-1", "did not claim the enrollment"},
		"made, and not approved": {func(l enrolling) []audit.Event {
			return []audit.Event{l.permits("approval", "true"), l.claims("k-a"), l.creates("k-a")}
		}, "nobody approved", "nobody approved"},
		"sealed, and not approved": {func(l enrolling) []audit.Event {
			return []audit.Event{l.permits("approval", "true"), l.claims("k-a"), l.creates("k-a", "enrollment", ""), l.seals("k-a")}
		}, "nobody approved", "nobody approved"},
		"approved afterwards": {func(l enrolling) []audit.Event {
			return []audit.Event{l.permits("approval", "true"), l.claims("k-a"), l.creates("k-a"), l.seals("k-a"), l.approves("r-k-a")}
		}, "nobody approved", "nobody approved"},
		"another one was approved": {func(l enrolling) []audit.Event {
			return []audit.Event{l.permits("approval", "true", "uses", "2"), l.claims("k-a"), l.claims("k-b"), l.approves("r-k-b"), l.creates("k-a")}
		}, "nobody approved", "nobody approved"},
		"a node's own key, not approved": {func(l enrolling) []audit.Event {
			return []audit.Event{l.permits("approval", "true", "origin", "node"), l.claims("k-a"), l.adds("k-a")}
		}, "nobody approved", "nobody approved"},
		"another recipient": {func(l enrolling) []audit.Event {
			return []audit.Event{l.permits("recipient", "r-k-b"), l.claims("k-a")}
		}, "another recipient", "another recipient"},
		"another TPM": {func(l enrolling) []audit.Event {
			return []audit.Event{l.permits("tpm", ek), l.claims("k-a", "ek", another)}
		}, "without the TPM that was permitted", "without the TPM that was permitted"},
		"no TPM": {func(l enrolling) []audit.Event {
			return []audit.Event{l.permits("tpm", ek), l.claims("k-a")}
		}, "without the TPM that was permitted", "without the TPM that was permitted"},
		"not any TPM": {func(l enrolling) []audit.Event {
			return []audit.Event{l.permits("tpm", "allowed"), l.claims("k-a")}
		}, "without a TPM", "without the TPM that was permitted"},
		"made in another TPM": {func(l enrolling) []audit.Event {
			return []audit.Event{l.permits("tpm", ek), l.claims("k-a", "ek", ek), l.creates("k-a", "ek", another)}
		}, "in another TPM", "in another TPM"},
		"an organization's key in place of a node's": {func(l enrolling) []audit.Event {
			return []audit.Event{l.permits(), l.claims("k-a"), l.creates("k-a", "scope", "organization")}
		}, "for its organization", "of another scope"},
		"the same, without saying so": {func(l enrolling) []audit.Event {
			return []audit.Event{l.permits(), l.claims("k-a"), l.creates("k-a", "scope", "")}
		}, "for its organization", "of another scope"},
		"made by the node": {func(l enrolling) []audit.Event {
			return []audit.Event{l.permits(), l.claims("k-a"), l.adds("k-a")}
		}, `permits one of the origin "backend"`, "of another origin"},
		"made by the back end": {func(l enrolling) []audit.Event {
			return []audit.Event{l.permits("origin", "node"), l.claims("k-a"), l.creates("k-a")}
		}, `permits one of the origin "node"`, "of another origin"},
		"claimed for another organization": {func(l enrolling) []audit.Event {
			return []audit.Event{l.permits(), elsewhere(l.claims("k-a"))}
		}, "is claimed for other", "of another organization"},
		"a key of another organization": {func(l enrolling) []audit.Event {
			return []audit.Event{l.permits(), l.claims("k-a"), elsewhere(l.creates("k-a"))}
		}, "is of other, and enrollment", "of another organization"},
		"claimed behind the revocation": {func(l enrolling) []audit.Event {
			return []audit.Event{l.permits(), l.ends(audit.EnrollmentRevoked), l.claims("k-a")}
		}, "and was over", "and was over"},
		"claimed behind the expiry": {func(l enrolling) []audit.Event {
			return []audit.Event{l.permits(), l.ends(audit.EnrollmentExpired), l.claims("k-a")}
		}, "and was over", "and was over"},
		"approved behind the revocation": {func(l enrolling) []audit.Event {
			return []audit.Event{l.permits("approval", "true"), l.claims("k-a"), l.ends(audit.EnrollmentRevoked), l.approves("r-k-a")}
		}, "and it was revoked", "the enrollment was revoked"},
	} {
		t.Run(name, func(t *testing.T) {
			l := newEnrolling(t)
			l.Record(t, c.log(l)...)
			packed := l.export(t, nil).pack(t)
			if _, err := verifyExport(t, packed, l.VKey(t)); err == nil || !strings.Contains(err.Error(), c.ours) {
				t.Errorf("ours says %v", err)
			}
			if said, ok := byPython(t, packed, l.VKey(t)); ok || !strings.Contains(said, c.theirs) {
				t.Errorf("the independent implementation says %q", said)
			}
		})
	}
}

// compared is what both implementations count of enrollments and proofs.
type compared struct{ Enrollments, TermsUnchecked, Proofs, ProofsUnchecked int64 }

func (l enrolling) compared(t *testing.T, m *members) (compared, string) {
	t.Helper()
	packed := m.pack(t)
	r, err := verifyExport(t, packed, l.VKey(t))
	if err != nil {
		t.Fatalf("ours says %v", err)
	}
	path := filepath.Join(t.TempDir(), "export.tar.gz")
	audittest.Must(t, os.WriteFile(path, packed, 0o600))
	out, _ := exec.Command("python3", "../../../contrib/verify_export.py", path, "--key", l.VKey(t), "--json").Output() // its exit code is 3
	var theirs struct {
		compared
		Error      string
		NotChecked []string
	}
	audittest.Must(t, json.Unmarshal(out, &theirs))
	if ours := (compared{r.Enrollments, r.InPart, r.Proofs, r.Unproven}); ours != theirs.compared || theirs.Error != "" {
		t.Fatalf("ours counts %+v, and the independent implementation %+v: %s", ours, theirs.compared, theirs.Error)
	}
	return theirs.compared, strings.Join(theirs.NotChecked, "\n")
}

// Nobody is accused of what the service does, or of what an earlier version did not record.
func TestWhatTheProtocolAllowsIsNoFault(t *testing.T) {
	const ek = "sha256-aa"
	for name, c := range map[string]struct {
		log    func(l enrolling) []audit.Event
		inPart int64
	}{
		"as many as there are uses": {log: func(l enrolling) []audit.Event {
			return []audit.Event{l.permits("uses", "2"), l.claims("k-a"), l.claims("k-b"), l.creates("k-b"), l.seals("k-b"), l.creates("k-a"), l.seals("k-a")}
		}},
		"approved": {log: func(l enrolling) []audit.Event {
			return []audit.Event{l.permits("approval", "true"), l.claims("k-a"), l.approves("r-k-a"), l.creates("k-a"), l.seals("k-a")}
		}},
		"bound to a recipient": {log: func(l enrolling) []audit.Event {
			return []audit.Event{l.permits("recipient", "r-k-a"), l.claims("k-a"), l.creates("k-a"), l.seals("k-a")}
		}},
		"bound to a TPM": {log: func(l enrolling) []audit.Event {
			return []audit.Event{l.permits("tpm", ek), l.claims("k-a", "ek", ek), l.creates("k-a", "ek", ek), l.seals("k-a", "ek", ek)}
		}},
		"in any TPM, by the node": {log: func(l enrolling) []audit.Event {
			return []audit.Event{l.permits("tpm", "allowed", "origin", "node"), l.claims("k-a", "ek", ek), l.adds("k-a")}
		}},
		"an organization's key": {log: func(l enrolling) []audit.Event {
			return []audit.Event{l.permits("scope", "organization"), l.claims("k-a"), l.creates("k-a", "scope", "organization"), l.seals("k-a")}
		}},
		"received behind the expiry": {log: func(l enrolling) []audit.Event {
			return []audit.Event{l.permits("uses", "2"), l.claims("k-a"), l.ends(audit.EnrollmentExpired), l.creates("k-a"), l.seals("k-a"), l.event(audit.KeyReceived, "k-a", nil)}
		}},
		// The sweeper ends enrollments before it ends their claims.
		"approved behind the expiry": {log: func(l enrolling) []audit.Event {
			return []audit.Event{l.permits("uses", "2", "approval", "true"), l.claims("k-a"), l.ends(audit.EnrollmentExpired), l.approves("r-k-a"), l.creates("k-a"), l.seals("k-a")}
		}},
		"claimed behind a claim that brought no key": {log: func(l enrolling) []audit.Event {
			back := l.ends(audit.EnrollmentExpired)
			back.Reason = "not_made"
			return []audit.Event{l.permits("uses", "2"), l.claims("k-a"), back, l.claims("k-b"), l.creates("k-b"), l.seals("k-b")}
		}},
		// With PostgreSQL the revocation waits for the sealing, and was recorded before.
		"sealed while it is revoked": {log: func(l enrolling) []audit.Event {
			return []audit.Event{l.permits(), l.claims("k-a"), l.ends(audit.EnrollmentRevoked), l.creates("k-a"), l.seals("k-a"), l.Key(audit.KeyWithdrawn, "k-a")}
		}},
		"a rollback is accepted": {log: func(l enrolling) []audit.Event {
			return []audit.Event{l.permits("uses", "2"), l.claims("k-a"), l.creates("k-a"), l.seals("k-a"), l.ends(audit.EnrollmentRevoked), l.Key(audit.KeyWithdrawn, "k-a")}
		}},
		"nothing recorded of what was permitted": {log: func(l enrolling) []audit.Event {
			e := l.permits()
			e.Detail = nil
			return []audit.Event{e, l.claims("k-a"), l.claims("k-b"), l.adds("k-a"), l.creates("k-b", "scope", ""), l.seals("k-b")}
		}, inPart: 1},
		"a number of uses that is none": {log: func(l enrolling) []audit.Event {
			return []audit.Event{l.permits("uses", "+1"), l.claims("k-a"), l.claims("k-b")}
		}, inPart: 1},
		"more uses than a number can be": {log: func(l enrolling) []audit.Event {
			return []audit.Event{l.permits("uses", "00000000002147483648"), l.claims("k-a"), l.claims("k-b")}
		}, inPart: 1},
		"not claimed": {log: func(l enrolling) []audit.Event {
			return []audit.Event{l.permits("uses", ""), l.ends(audit.EnrollmentRevoked)}
		}},
	} {
		t.Run(name, func(t *testing.T) {
			l := newEnrolling(t)
			l.Record(t, c.log(l)...)
			said, not := l.compared(t, l.export(t, nil))
			if said.Enrollments != 1 || said.TermsUnchecked != c.inPart || strings.Contains(not, "does not have all that was permitted") != (c.inPart > 0) {
				t.Errorf("%+v\n%s", said, not)
			}
		})
	}
}

// That a holder's proof was not checked, because their key was deleted or the export was
// made without public keys, is said by both implementations.
func TestProofsThatAreNotCheckedAreCounted(t *testing.T) {
	l := newEnrolling(t)
	l.Record(t, l.permits("uses", "2", "origin", "node"))
	for _, key := range []string{"k-lives", "k-deleted"} {
		private, err := rsa.GenerateKey(rand.Reader, 2048)
		audittest.Must(t, err)
		l.keys[key] = private
		text := sha256.Sum256(envelope.ClaimText("e-1", "r-"+key))
		signature, err := rsa.SignPKCS1v15(nil, private, crypto.SHA256, text[:])
		audittest.Must(t, err)
		own := l.adds(key)
		own.Detail["fingerprint"], own.Detail["signature"] = orgkey.NewPublic(&private.PublicKey).Fingerprint(), base64.StdEncoding.EncodeToString(signature)
		l.Record(t, l.claims(key), own)
	}
	l.Record(t, l.Key(audit.KeyDeleted, "k-deleted"))
	gone := l.export(t, l.open)
	gone.edit(t, "public-keys.jsonl", func(lines []string) []string { // as if it were deleted while the export is made
		lines[len(lines)-1] = `{"deleted":true,"key":"k-lives"}` + "\n"
		return lines
	})
	gone.relist(t)
	for name, c := range map[string]struct {
		export *members
		want   compared
		says   string
	}{
		"one is deleted":      {l.export(t, l.open), compared{Enrollments: 1, Proofs: 1, ProofsUnchecked: 1}, "1 proofs of keys that their holders made, whose public keys are not in the export"},
		"both are":            {gone, compared{Enrollments: 1, ProofsUnchecked: 2}, "2 proofs of keys that their holders made, whose"},
		"without public keys": {l.export(t, nil), compared{Enrollments: 1, ProofsUnchecked: 2}, "2 proofs of keys that their holders made, whose"},
	} {
		if said, not := l.compared(t, c.export); said != c.want || !strings.Contains(not, c.says) {
			t.Errorf("%s: %+v\n%s", name, said, not)
		}
	}
}
