package audit

import (
	"context"
	"fmt"
	"maps"
	"math"
	"slices"

	"github.com/orgkeys/orgkeys/internal/authz"
)

// What is kept beside the log in the database is checked against it: no tree
// covers these tables, yet what they hold follows from the events.

// byRevision sorts policies' files.
func byRevision(files []PolicyFile) map[string]map[string][]byte {
	policies := map[string]map[string][]byte{}
	for _, f := range files {
		if policies[f.Revision] == nil {
			policies[f.Revision] = map[string][]byte{}
		}
		policies[f.Revision][f.Name] = f.Content
	}
	return policies
}

// alteredPolicy returns the revision of a policy whose text is not the one that
// it is the hash of, or "".
func alteredPolicy(policies map[string]map[string][]byte) string {
	for _, revision := range slices.Sorted(maps.Keys(policies)) {
		if authz.Revision(policies[revision]) != revision {
			return revision
		}
	}
	return ""
}

// checkPolicies wants the text of every policy that decided. One that is new may
// not be stored yet; before a checkpoint is signed, it is.
func (v *verification) checkPolicies(ctx context.Context, a Archive) error {
	files, err := a.Policies(ctx)
	if err != nil {
		return err
	}
	policies := byRevision(files)
	if revision := alteredPolicy(policies); revision != "" {
		index, named := v.policies[revision]
		if !named {
			index = -1
		}
		return &Problem{index, fmt.Sprintf("the text of policy %s was altered", revision)}
	}
	for _, revision := range slices.Sorted(maps.Keys(v.policies)) {
		if index := v.policies[revision]; policies[revision] == nil && index < v.Signed {
			return &Problem{index, fmt.Sprintf("the text of the policy that decided, %s, is missing", revision)}
		}
	}
	return nil
}

// checkErasures wants a PersonErased event behind every event whose personal
// part is gone.
func (v *verification) checkErasures(ctx context.Context, a Archive) error {
	erasing, err := a.Erasing(ctx)
	if err != nil {
		return err
	}
	for _, person := range erasing {
		v.erased[person] = math.MaxInt64
	}
	for _, person := range slices.Sorted(maps.Keys(v.missing)) {
		if at, erased := v.erased[person]; !erased || at < v.missing[person] {
			return &Problem{v.missing[person], "its personal part is gone, and no event says that it was erased"}
		}
	}
	return nil
}

type receiptOf struct {
	index int64
	sink  string
}

// openReceipts reads the keys that receipts must be signed with.
func (v *verification) openReceipts(ctx context.Context, a Archive) error {
	keys, err := a.ReceiptKeys(ctx)
	if err != nil {
		return err
	}
	sinks, err := a.ReceiptSinks(ctx)
	v.receiptKeys = map[string]ReceiptKeys{}
	for _, sink := range sinks {
		v.receiptKeys[sink] = ReceiptKeys{}
	}
	for _, k := range keys {
		if v.receiptKeys[k.Sink] != nil {
			v.receiptKeys[k.Sink][k.Version] = k.Public
		}
	}
	return err
}

// checkReceipts checks the receipts of an event, which it reads by pages.
func (v *verification) checkReceipts(ctx context.Context, a Archive, row Row) error {
	if row.Index%exportPage == 0 {
		v.receipts = map[receiptOf][]byte{}
		for sink := range v.receiptKeys {
			page, err := a.Receipts(ctx, sink, row.Index, row.Index+exportPage)
			if err != nil {
				return err
			}
			for _, r := range page {
				v.receipts[receiptOf{r.Index, sink}] = r.Receipt
			}
		}
	}
	for sink, keys := range v.receiptKeys {
		receipt, ok := v.receipts[receiptOf{row.Index, sink}]
		if !ok {
			continue
		}
		if err := keys.Verify(row.Leaf, receipt); err != nil {
			return &Problem{row.Index, fmt.Sprintf("the receipt of sink %s: %v", sink, err)}
		}
		v.Receipts++
	}
	return nil
}

// SigningKeys returns the stored verifier keys that have signed a stored
// checkpoint, oldest first: in the database anybody's could stand.
func SigningKeys(ctx context.Context, e Evidence) ([]string, error) {
	stored, err := e.CheckpointKeys(ctx)
	if err != nil {
		return nil, err
	}
	has := map[string]bool{}
	for seq := int64(0); len(has) < len(stored); {
		page, err := e.SignedAfter(ctx, seq)
		if err != nil {
			return nil, err
		}
		if len(page) == 0 {
			break
		}
		for _, s := range page {
			for _, vkey := range stored {
				if !has[vkey] && signedBy(vkey, s.Note) {
					has[vkey] = true
				}
			}
			seq = s.Seq
		}
	}
	return slices.DeleteFunc(stored, func(vkey string) bool { return !has[vkey] }), nil
}

func signedBy(vkey, note string) bool {
	keys, err := ParseKeys(vkey)
	if err == nil {
		_, err = keys.Open(note)
	}
	return err == nil
}
