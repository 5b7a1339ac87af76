package verdict

import (
	"strings"
	"testing"
	"time"

	"github.com/orgkeys/orgkeys/internal/audit/archive"
)

// Nobody checks whether every node's file was given: it is said of what time the
// files speak, and a time that they must reach can be asked for.
func TestVaultsFilesSpeakOfTheirTime(t *testing.T) {
	at := time.Date(2026, 1, 31, 12, 0, 0, 0, time.UTC)
	report := archive.VaultReport{AsOf: at, Newer: 2, Files: []archive.VaultSpan{{Name: "n1", First: at.Add(-time.Hour), Last: at, Entries: 7}}}
	for _, c := range []struct {
		name       string
		asOf       time.Time
		torn, text []string
		code       int
		says       string
	}{
		{"no time asked for", time.Time{}, nil, nil, 0, "truncation excluded as of 2026-01-31T12:00:00Z, when the newest entry given was written"},
		{"a time that they reach", at, nil, nil, 0, "as of 2026-01-31T12:00:00Z"},
		{"a later time", at.Add(time.Second), nil, nil, 3, "its newest entry is of 2026-01-31T12:00:00Z, before 2026-01-31T12:00:01Z"},
		{"a torn line", time.Time{}, []string{"n1:3"}, nil, 3, "incomplete, the first at n1:3"},
		{"text before an entry", time.Time{}, nil, []string{"n1:3"}, 0, "1 lines of Vault's audit file have text before a complete entry, the first at n1:3"},
	} {
		var out strings.Builder
		report.Torn, report.Behind = c.torn, c.text
		code, said := judged(&out, vaultVouched(&out, 40, report, c.asOf))
		if code != c.code || !strings.Contains(said, c.says) || !strings.Contains(said, "n1: 7 entries from 2026-01-31T11:00:00Z to 2026-01-31T12:00:00Z") {
			t.Errorf("%s: %d\n%s", c.name, code, said)
		}
	}
}

// An export's key says that its events are genuine, and not that none came after them.
func TestAnExportNeedsACheckpointOfItsEnd(t *testing.T) {
	for _, c := range []struct {
		covered int64
		code    int
		says    string
	}{
		{0, CodeNotExcluded, "truncation not excluded: the export ends with the signed checkpoint of 40 events"},
		{39, CodeNotExcluded, "truncation not excluded: the given checkpoint covers 39 of 40 events"},
		{40, 0, "truncation excluded: the given checkpoint covers 40 of 40 events\n"},
	} {
		var out strings.Builder
		code, said := judged(&out, exportVouched(&out, archive.Report{Manifest: archive.Manifest{Size: 40}, Covered: c.covered}, time.Time{}))
		if code != c.code || !strings.Contains(said, c.says) {
			t.Errorf("%d covered: exit code %d\n%s", c.covered, code, said)
		}
	}
}

// An auditor reads how a sealed key came to its holder, and above all whether somebody
// checked that it arrived.
func TestHowAKeyCameToItsHolderIsTold(t *testing.T) {
	at := func(index int64) *archive.Moment {
		return &archive.Moment{Index: index, Time: "2026-01-31T12:00:00Z", Kind: "admin", Actor: "ann"}
	}
	for _, c := range []struct {
		name    string
		e       archive.Enrolled
		says    []string
		saysNot string
	}{
		{"signed for", archive.Enrolled{Enrollment: "e1", Claimed: at(2), From: "10.0.0.7", Answers: 2, Received: at(5), Receipt: archive.Signed},
			[]string{"claimed by enrollment e1 from 10.0.0.7 (event 2", "went out 2 times; received: the holder of the private key signed for them (event 5"}, "NOT"},
		{"not checked", archive.Enrolled{Delivered: at(4), Answers: 1, Received: at(5), Receipt: archive.Unchecked, Unchecked: "the key was deleted"},
			[]string{"received (event 5), and the signature was NOT checked: the key was deleted"}, "signed for them"},
		{"in use", archive.Enrolled{Delivered: at(4), Received: at(5), Receipt: archive.Used},
			[]string{"went out at least once (event 4); nobody signed for them, and requests were signed with the key (event 5)"}, "went out 0 times"},
		{"on its way", archive.Enrolled{Delivered: at(4), Receipt: archive.None}, []string{"went out at least once (event 4); nobody has signed for them"}, "received"},
		{"never asked for", archive.Enrolled{Claimed: at(2), Receipt: archive.None}, []string{"from an address that is not recorded", "did not go out; nobody has signed for them"}, "received"},
		{"approved", archive.Enrolled{Approved: at(3), Nodes: []archive.LifeNode{{IP: "10.0.0.7"}}, Receipt: archive.None}, []string{", node 10.0.0.7: permitted by admin ann (event 1", "approved by admin ann (event 3)"}, "claimed"},
	} {
		c.e.Key, c.e.Org, c.e.Scope, c.e.Permitted, c.e.Sealed, c.e.Recipient, c.e.SHA256 = "k1", "acme", "node", at(1), at(3), "r1", "abcd"
		said := enrolled(c.e)
		for _, says := range append(c.says, "sealed key k1 of acme, for its node", "the bytes abcd sealed to recipient r1 (event 3)") {
			if !strings.Contains(said, says) {
				t.Errorf("%s: %q is missing in %q", c.name, says, said)
			}
		}
		if strings.Contains(said, c.saysNot) {
			t.Errorf("%s: %q", c.name, said)
		}
	}
}

// What was not compared with what administrators permitted is said, and nothing is said
// where there was nothing to compare.
func TestWhatIsNotCheckedIsSaid(t *testing.T) {
	if said := permitted(archive.Report{}); len(said) != 0 {
		t.Errorf("of no enrollment: %q", said)
	}
	said := strings.Join(permitted(archive.Report{Enrollments: 7, InPart: 3, Proofs: 5, Unproven: 2}), "\n")
	for _, want := range []string{"7 enrollments: their", "NOT checked: 3 enrollments", "5 proofs of keys that their holders made, each signed", "NOT checked: 2 proofs of keys that their holders made, whose public keys are not in the export"} {
		if !strings.Contains(said, want) {
			t.Errorf("%q is missing in\n%s", want, said)
		}
	}
}
