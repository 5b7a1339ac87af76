package verify

import (
	"context"
	"fmt"
	"maps"
	"math"
	"slices"

	"github.com/orgkeys/orgkeys/internal/audit"
	"github.com/orgkeys/orgkeys/internal/authz"
)

// The tables beside the log are compared with it: the tree does not cover them, but
// their content follows from the events.

// checkPolicies requires the text of every policy that decided. A new one may not be
// stored yet; it is stored before a checkpoint is signed.
func (v *verification) checkPolicies(ctx context.Context, s Snapshot) error {
	there := map[string]bool{}
	err := s.Policies(ctx, func(revision string, files map[string][]byte) error {
		there[revision] = true
		if authz.Revision(files) == revision {
			return nil
		}
		index, named := v.policies[revision]
		if !named {
			index = -1
		}
		return &Problem{index, fmt.Sprintf("the text of policy %s was changed", revision)}
	})
	if err != nil {
		return err
	}
	for _, revision := range slices.Sorted(maps.Keys(v.policies)) {
		if index := v.policies[revision]; !there[revision] && index < v.Signed {
			return &Problem{index, fmt.Sprintf("the text of the policy that decided, %s, is missing", revision)}
		}
	}
	return nil
}

// checkErasures requires a PersonErased event after every event whose personal part is
// missing.
func (v *verification) checkErasures(ctx context.Context, s Snapshot) error {
	erasing, err := s.Erasing(ctx)
	if err != nil {
		return err
	}
	for _, person := range erasing {
		v.erased[person] = math.MaxInt64
	}
	for _, person := range slices.Sorted(maps.Keys(v.missing)) {
		if at, erased := v.erased[person]; !erased || at < v.missing[person] {
			return &Problem{v.missing[person], "its personal part is missing, and no event says that it was erased"}
		}
	}
	return nil
}

type receiptOf struct {
	index int64
	sink  string
}

// openReceipts reads the keys that receipts must be signed with.
func (v *verification) openReceipts(ctx context.Context, s interface {
	ReceiptSinks(ctx context.Context) ([]string, error)
	ReceiptKeys(ctx context.Context) ([]audit.ReceiptKey, error)
},
) error {
	keys, err := s.ReceiptKeys(ctx)
	if err != nil {
		return err
	}
	sinks, err := s.ReceiptSinks(ctx)
	v.receiptKeys = map[string]audit.ReceiptKeys{}
	for _, sink := range sinks {
		v.receiptKeys[sink] = audit.ReceiptKeys{}
	}
	for _, k := range keys {
		if v.receiptKeys[k.Sink] == nil { // all of its receipts may be in the archive
			v.receiptKeys[k.Sink] = audit.ReceiptKeys{}
		}
		v.receiptKeys[k.Sink][k.Version] = k.Public
	}
	return err
}

// checkReceipts checks the receipts of an event, which it reads in pages.
func (v *verification) checkReceipts(ctx context.Context, s Snapshot, row Row) error {
	if v.receipts == nil || row.Index%pageSize == 0 {
		v.receipts = map[receiptOf][]byte{}
		for sink := range v.receiptKeys {
			page, err := s.Receipts(ctx, sink, row.Index, row.Index-row.Index%pageSize+pageSize)
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
