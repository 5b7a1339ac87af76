package archive

import (
	"archive/tar"
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"
	"io/fs"
	"slices"
	"strings"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"
	"github.com/klauspost/compress/gzip"

	"github.com/orgkeys/orgkeys/internal/audit"
	"github.com/orgkeys/orgkeys/internal/audit/verify"
	"github.com/orgkeys/orgkeys/internal/authz"
)

// Report is the result of verifying an export without errors.
type Report struct {
	Manifest    Manifest
	Checkpoints int64 // each signed by a given key
	Receipts    int64 // each signed by a given key
	Keys        int64 // in the inventory
	PublicKeys  int64 // that match the log's fingerprints
	Enrolled    []Enrolled
	Proofs      int64 // of keys that their holders made, each signed by that key
	Unproven    int64 // of such keys, whose public keys are not in the export
	Enrollments int64 // whose claims and keys are as was permitted
	InPart      int64 // of those that were claimed, of which the log does not have all that was permitted
	Rollbacks   []audit.Rollback
	Covered     int64        // events that evidence from outside covers
	Vault       *VaultReport // nil without Vault's audit file
}

// Outside is the evidence from elsewhere with which an export is compared.
type Outside struct {
	Vault      *VaultFile // nil: none
	Checkpoint string     // a signed checkpoint; empty: none
}

// Verify checks an export against verifier keys and evidence from elsewhere. An
// error in the export is a *Problem. It reads the archive once. It needs memory for
// each key, and with Vault's audit file also for each event.
func Verify(ctx context.Context, r io.Reader, vkeys []string, outside Outside, progress verify.Progress) (Report, error) {
	keys, err := audit.ParseKeys(vkeys...)
	if err != nil {
		return Report{}, err
	}
	x := verifier{deliveries: newDeliveries(), keys: keys, vkeys: vkeys, vault: outside.Vault, progress: progress.Ticking(), policies: map[string]bool{}}
	if outside.Checkpoint != "" {
		if x.kept, err = keys.Open(outside.Checkpoint); err != nil {
			return Report{}, fmt.Errorf("the checkpoint given: %w", err)
		}
	}
	if err := x.read(ctx, r); err != nil {
		return Report{}, err
	}
	return x.report, nil
}

type verifier struct {
	keys     audit.Keys
	vkeys    []string
	vault    *VaultFile
	kept     audit.Signed // by somebody outside; size 0: none
	progress func(done, all int64)

	report   Report
	left     []Member // not read yet
	tree     verify.Frontier
	points   []audit.Checkpoint // that are signed, and not passed yet; without their origin
	newest   audit.Checkpoint
	accepted []verify.AcceptedRollback
	receipts map[string]audit.ReceiptKeys
	policies map[string]bool // whose text is in the export
	policy   policyText      // that is being read
	lives    inventory

	deliveries deliveries
}

func wrong(format string, args ...any) error { return verify.Problemf(-1, format, args...) }

func (x *verifier) read(ctx context.Context, r io.Reader) error {
	compressed := bufio.NewReaderSize(r, 64<<10)
	packed, err := gzip.NewReader(compressed)
	if err != nil {
		return wrong("it is not an export: %v", err)
	}
	packed.Multistream(false)
	in := tar.NewReader(packed)
	if err := x.readManifest(in); err != nil {
		return err
	}
	for {
		h, err := in.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return wrong("the archive is damaged: %v", err)
		}
		if err := x.member(ctx, h, in); err != nil {
			return err
		}
	}
	if len(x.left) > 0 {
		return wrong("%s is missing", x.left[0].Name)
	}
	if err := checkEnd(packed, compressed); err != nil {
		return err
	}
	return x.finish()
}

// checkEnd reports data after the archive's last member: only padding is allowed, so
// that no other program reads more than was verified.
func checkEnd(packed io.Reader, compressed io.ByteReader) error {
	rest := make([]byte, 32<<10)
	for {
		n, err := packed.Read(rest)
		if slices.ContainsFunc(rest[:n], func(b byte) bool { return b != 0 }) {
			return wrong("there is data after the end of the archive")
		}
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil { // gzip's own checksum among them
			return wrong("the archive is damaged: %v", err)
		}
	}
	if _, err := compressed.ReadByte(); !errors.Is(err, io.EOF) {
		return wrong("there is data after the end of the archive")
	}
	return nil
}

func (x *verifier) readManifest(in *tar.Reader) error {
	h, err := in.Next()
	if err != nil {
		return wrong("the archive is damaged: %v", err)
	}
	if h.Name != manifestName || h.Typeflag != tar.TypeReg {
		return wrong("%s is not the first member: it is not an export", manifestName)
	}
	if h.Size > maxManifest {
		return tooLarge(h.Size)
	}
	m := &x.report.Manifest
	if err := json.UnmarshalRead(in, m, json.RejectUnknownMembers(true), json.WithUnmarshalers(json.UnmarshalFromFunc(readMember))); err != nil {
		return wrong("%s cannot be read: %v", manifestName, err)
	}
	if m.Format != exportFormat && m.Format != exportWithKeys {
		return wrong("its format is %q; this version of orgkeys reads %s and %s", m.Format, exportFormat, exportWithKeys)
	}
	x.left = m.Members
	return checkMembers(m.Members, m.Format == exportWithKeys)
}

// readMember refuses what no export has before it takes memory.
func readMember(in *jsontext.Decoder, m *Member) error {
	type plain Member
	if err := json.UnmarshalDecode(in, (*plain)(m)); err != nil {
		return err
	}
	if memberPlace(m.Name) < 0 {
		return fmt.Errorf("%q is not a member of an export", m.Name)
	}
	return nil
}

// memberOrder is the order of an export's members; the policies' have names of
// their own.
var memberOrder = []string{checkpointsName, receiptKeysName, policiesDir, eventsName, inventoryName, publicKeysName}

// memberPlace is a member's position in that order, or -1 if no export has it. A name
// cannot lead outside the directory in which the archive is unpacked.
func memberPlace(name string) int {
	parts := strings.SplitN(name, "/", 3)
	if len(parts) == 3 && parts[0] == policiesDir && fs.ValidPath(name) && !strings.Contains(name, `\`) {
		return slices.Index(memberOrder, policiesDir)
	}
	if name == policiesDir {
		return -1
	}
	return slices.Index(memberOrder, name)
}

// checkMembers reports unexpected members, and those out of order.
func checkMembers(members []Member, withKeys bool) error {
	place, seen := 0, map[string]bool{}
	for _, m := range members {
		at := memberPlace(m.Name)
		switch {
		case seen[m.Name]:
			return wrong("%s is in the archive twice", m.Name)
		case at < place:
			return wrong("%s is out of order", m.Name)
		}
		place, seen[m.Name] = at, true
	}
	for _, name := range memberOrder {
		if name != policiesDir && name != publicKeysName && !seen[name] {
			return wrong("%s is missing", name)
		}
	}
	switch {
	case withKeys && !seen[publicKeysName]:
		return wrong("%s is missing", publicKeysName)
	case !withKeys && seen[publicKeysName]:
		return wrong("%q is no member of an export of this format", publicKeysName)
	}
	return nil
}

func tooLarge(size int64) error {
	return wrong("a member has %d bytes, which is larger than orgkeys writes", size)
}

func readAllOf(r io.Reader, size, limit int64) ([]byte, error) {
	if size > limit {
		return nil, tooLarge(size)
	}
	b, err := io.ReadAll(io.LimitReader(r, limit))
	if err != nil {
		return nil, wrong("the archive is damaged: %v", err)
	}
	return b, nil
}

// member reads the next member, which must be the next in the manifest.
func (x *verifier) member(ctx context.Context, h *tar.Header, in io.Reader) error {
	if len(x.left) == 0 || x.left[0].Name != h.Name || h.Typeflag != tar.TypeReg {
		return wrong("%s is not the member that the manifest lists at this position", h.Name)
	}
	want := x.left[0]
	x.left = x.left[1:]
	hashed := &hashing{r: in, sum: sha256.New()}
	var err error
	if h.Name == eventsName {
		err = x.readEvents(ctx, hashed)
	} else {
		err = x.content(h, hashed)
	}
	if err != nil {
		return err
	}
	if hashed.size != want.Size || hex.EncodeToString(hashed.sum.Sum(nil)) != want.SHA256 {
		return wrong("%s does not have the size and SHA-256 in the manifest", h.Name)
	}
	return nil
}

type hashing struct {
	r    io.Reader
	sum  hash.Hash
	size int64
}

func (h *hashing) Read(b []byte) (int, error) {
	n, err := h.r.Read(b)
	h.add(b[:n])
	return n, err
}

func (h *hashing) Write(b []byte) (int, error) {
	h.add(b)
	return len(b), nil
}

func (h *hashing) add(b []byte) {
	h.sum.Write(b)
	h.size += int64(len(b))
}

func (x *verifier) content(h *tar.Header, in io.Reader) error {
	switch h.Name {
	case checkpointsName:
		return x.readCheckpoints(in)
	case receiptKeysName:
		return x.readReceiptKeys(in, h.Size)
	case inventoryName:
		return x.readInventory(in)
	case publicKeysName:
		return x.readPublicKeys(in)
	}
	return x.readPolicy(h, in)
}

// lines calls do for each line, without its end.
func lines(name string, in io.Reader, do func(n int64, line []byte) error) error {
	r := bufio.NewReaderSize(in, maxLine)
	for n := int64(0); ; n++ {
		raw, err := r.ReadSlice('\n')
		switch {
		case errors.Is(err, io.EOF) && len(raw) == 0:
			return nil
		case err != nil:
			return wrong("%s: line %d is incomplete or too long: %v", name, n+1, err)
		}
		if err := do(n, raw[:len(raw)-1]); err != nil {
			return err
		}
	}
}

func (x *verifier) readCheckpoints(in io.Reader) error {
	return lines(checkpointsName, in, func(n int64, raw []byte) error {
		var l audit.Line
		if err := json.Unmarshal(raw, &l, json.RejectUnknownMembers(true)); err != nil || l.Checkpoint == "" {
			return wrong("%s: line %d is not a checkpoint", checkpointsName, n+1)
		}
		s, err := x.keys.Open(l.Checkpoint)
		if err != nil {
			return wrong("%s: line %d: %v", checkpointsName, n+1, err)
		}
		m := x.report.Manifest
		if s.Origin != m.Origin || s.Size < x.newest.Size {
			return wrong("%s: line %d is out of order, or belongs to another log", checkpointsName, n+1)
		}
		x.points = append(x.points, audit.Checkpoint{Size: s.Size, Root: s.Root})
		x.newest = s.Checkpoint
		x.report.Checkpoints++
		return nil
	})
}

// readReceiptKeys uses a receipt key only if the verifier was given it: the same key
// signs checkpoints.
func (x *verifier) readReceiptKeys(in io.Reader, size int64) error {
	b, err := readAllOf(in, size, maxSmallMember)
	if err != nil {
		return err
	}
	var list []audit.ReceiptKey
	if err := json.Unmarshal(b, &list, json.RejectUnknownMembers(true)); err != nil {
		return wrong("%s cannot be read: %v", receiptKeysName, err)
	}
	x.receipts = map[string]audit.ReceiptKeys{}
	for _, k := range list {
		if x.receipts[k.Sink] == nil {
			x.receipts[k.Sink] = audit.ReceiptKeys{}
		}
		for _, vkey := range x.vkeys {
			if public, err := audit.PublicKey(vkey); err == nil && bytes.Equal(public, k.Public) {
				x.receipts[k.Sink][k.Version] = public
			}
		}
	}
	return nil
}

// policyText is the files of a policy. They follow one another, so that no more than
// one policy is held at once.
type policyText struct {
	revision string
	files    map[string][]byte
	size     int64
}

func (x *verifier) readPolicy(h *tar.Header, in io.Reader) error {
	parts := strings.SplitN(h.Name, "/", 3) // checkMembers has seen it
	revision, name := parts[1], parts[2]
	if revision != x.policy.revision {
		if err := x.endPolicy(); err != nil {
			return err
		}
		x.policy = policyText{revision: revision, files: map[string][]byte{}}
	}
	b, err := readAllOf(in, h.Size, maxPolicy-x.policy.size)
	if err != nil {
		return err
	}
	x.policy.size += int64(len(b))
	x.policy.files[name] = b
	return nil
}

// endPolicy reports a policy whose text does not match its revision, a hash.
func (x *verifier) endPolicy() error {
	p := x.policy
	x.policy = policyText{}
	if p.files == nil {
		return nil
	}
	if authz.Revision(p.files) != p.revision {
		return wrong("the text of policy %s does not match its revision", p.revision)
	}
	x.policies[p.revision] = true
	return nil
}

// checkRoot compares the tree, at its present size, with the checkpoints of that size.
func (x *verifier) checkRoot() error {
	for len(x.points) > 0 && x.points[0].Size <= x.tree.Size() {
		if x.points[0].Size == x.tree.Size() && x.points[0].Root != x.tree.Root() {
			return verify.Problemf(x.tree.Size()-1, "the events up to it do not match the signed checkpoint: at least one was changed, removed, inserted or moved")
		}
		x.points = x.points[1:]
	}
	if x.kept.Size == x.tree.Size() && (x.kept.Origin != x.report.Manifest.Origin || x.kept.Root != x.tree.Root()) {
		return verify.Problemf(x.tree.Size()-1, "the events up to it do not match the given checkpoint: the log was rewritten, or it is another log")
	}
	if x.vault != nil {
		x.vault.matchRoot(x.report.Manifest.Origin, x.tree.Size(), x.tree.Root)
	}
	return nil
}

// checkPoints compares the manifest with the newest signed checkpoint.
func (x *verifier) checkPoints() error {
	m := x.report.Manifest
	if x.report.Checkpoints == 0 {
		return wrong("no checkpoint is signed by a given key: nothing proves the events")
	}
	if m.Size != x.newest.Size || m.Root != base64.StdEncoding.EncodeToString(x.newest.Root[:]) {
		return wrong("the manifest's size (%d events) and root do not match the newest signed checkpoint (%d events)", m.Size, x.newest.Size)
	}
	return nil
}

// readInventory compares the inventory with what the events give, of which it reads no
// more: a line is as long as its key has nodes.
func (x *verifier) readInventory(in io.Reader) error {
	if err := x.complete(); err != nil {
		return err
	}
	r := bufio.NewReaderSize(in, 64<<10)
	var want, got []byte
	for life := range x.lives.all() {
		var err error
		if want, err = x.lives.appendLine(want[:0], life); err != nil {
			return err
		}
		want = append(want, '\n')
		got = slices.Grow(got[:0], len(want))[:len(want)]
		n, err := io.ReadFull(r, got)
		switch {
		case errors.Is(err, io.EOF):
			return verify.Problemf(life.created.index, "key %s is missing from the inventory", x.lives.key(life))
		case !bytes.Equal(got[:n], want[:n]):
			return verify.Problemf(life.created.index, "line %d of the inventory, about key %s, does not agree with the events", x.report.Keys+1, x.lives.key(life))
		case err != nil:
			return wrong("%s: line %d is incomplete: %v", inventoryName, x.report.Keys+1, err)
		}
		x.report.Keys++
	}
	switch _, err := r.ReadByte(); {
	case err == nil:
		return wrong("%s: line %d is about a key that is in no event", inventoryName, x.report.Keys+1)
	case !errors.Is(err, io.EOF):
		return wrong("the archive is damaged: %v", err)
	}
	return nil
}

// readPublicKeys takes the public halves of the keys that live, each vouched
// for by its fingerprint in the log, and checks with them what they signed.
func (x *verifier) readPublicKeys(in io.Reader) error {
	for life := range x.lives.all() {
		if life.ended != nil {
			x.deliveries.withoutKey(x.lives.key(life))
		}
	}
	live := x.lives.live()
	read := 0
	err := lines(publicKeysName, in, func(n int64, raw []byte) error {
		var l publicKeyLine
		if err := json.Unmarshal(raw, &l, json.RejectUnknownMembers(true)); err != nil || (l.PublicKey == nil) != l.Deleted {
			return wrong("%s: line %d is not a public key", publicKeysName, n+1)
		}
		if n >= int64(len(live)) || l.Key != x.lives.key(live[n]) {
			return wrong("%s: line %d is of key %s, which is not the next that lives", publicKeysName, n+1, l.Key)
		}
		read++
		if l.Deleted {
			x.deliveries.withoutKey(l.Key)
			return nil
		}
		public, err := l.vouched(x.lives.fingerprint(live[n]))
		if err != nil {
			return verify.Problemf(live[n].created.index, "%v", err)
		}
		x.report.PublicKeys++
		return x.deliveries.check(x.report.Manifest.Origin, l.Key, public)
	})
	if err == nil && read < len(live) {
		return verify.Problemf(live[read].created.index, "the public key of key %s is missing", x.lives.key(live[read]))
	}
	return err
}

// complete reports events that are missing at the end, or too many.
func (x *verifier) complete() error {
	m := x.report.Manifest
	switch {
	case x.tree.Size() < m.Size:
		return verify.Problemf(x.tree.Size(), "it is missing: the signed checkpoint covers %d events", m.Size)
	case x.tree.Size() > m.Size:
		return verify.Problemf(m.Size, "the signed checkpoint covers %d events: this one was appended", m.Size)
	}
	return nil
}

func (x *verifier) finish() error {
	if err := x.complete(); err != nil {
		return err
	}
	if x.kept.Size > x.tree.Size() {
		return verify.Problemf(x.tree.Size(), "it is missing: the checkpoint given covers %d events; the export is older, or the log was truncated: make a new export", x.kept.Size)
	}
	x.report.Covered, x.report.Enrolled = x.kept.Size, x.deliveries.told(&x.lives)
	x.report.Proofs, x.report.Unproven = x.deliveries.proven, int64(len(x.deliveries.own))-x.deliveries.proven
	x.report.Enrollments, x.report.InPart = x.deliveries.compared()
	if x.vault == nil {
		return nil
	}
	report, err := x.vault.finish(x.report.Manifest.Origin, x.accepted)
	x.report.Vault, x.report.Covered = &report, x.tree.Size()
	return err
}
