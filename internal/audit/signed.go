package audit

import (
	"context"
	"crypto/ed25519"
	"encoding/base64"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/mod/sumdb/note"
	"golang.org/x/mod/sumdb/tlog"
)

// Signer signs checkpoints. Its implementations are hsm.Token, vault.Sink and
// LocalSigner.
type Signer interface {
	// SignCheckpoint returns the Ed25519 signature of text (RFC 8032, pure) and
	// the public key that it verifies under, which may change when keys rotate.
	SignCheckpoint(ctx context.Context, text []byte) (signature []byte, public ed25519.PublicKey, err error)
}

// Signed is a checkpoint as a signed note.
type Signed struct {
	Checkpoint
	Seq  int64  // its number among the stored ones, from 1
	Note string // C2SP tlog-checkpoint, a C2SP signed-note
}

// VerifierKey is a log's key in the form for verifiers (C2SP signed-note): the
// origin, the key's hash, and the key.
func VerifierKey(origin string, public ed25519.PublicKey) (string, error) {
	return note.NewEd25519VerifierKey(origin, public)
}

// sign makes a signed note of c.
func sign(ctx context.Context, s Signer, c Checkpoint) (Signed, string, error) {
	text := c.Text()
	signature, public, err := s.SignCheckpoint(ctx, []byte(text))
	if err != nil {
		return Signed{}, "", fmt.Errorf("signing a checkpoint: %w", err)
	}
	vkey, err := VerifierKey(c.Origin, public)
	if err != nil {
		return Signed{}, "", fmt.Errorf("naming the checkpoint key: %w", err)
	}
	verifier, err := note.NewVerifier(vkey)
	if err != nil {
		return Signed{}, "", fmt.Errorf("reading the checkpoint key: %w", err)
	}
	text, err = signedNote(text, verifier, signature)
	if err != nil {
		return Signed{}, "", err
	}
	signed, err := Keys{verifier}.Open(text)
	return signed, vkey, err
}

// presigned is a note.Signer with an existing signature: a signer that calls Vault
// needs a context, and note.Signer has none.
type presigned struct {
	note.Verifier
	signature []byte
}

func (p presigned) Sign([]byte) ([]byte, error) { return p.signature, nil }

func signedNote(text string, v note.Verifier, signature []byte) (string, error) {
	signed, err := note.Sign(&note.Note{Text: text}, presigned{v, signature})
	if err != nil {
		return "", fmt.Errorf("making a note of a checkpoint: %w", err)
	}
	return string(signed), nil
}

// Keys are trusted verifier keys.
type Keys []note.Verifier

// ParseKeys reads verifier keys, as "orgkeys audit key" prints them.
func ParseKeys(vkeys ...string) (Keys, error) {
	keys := make(Keys, len(vkeys))
	for i, text := range vkeys {
		v, err := note.NewVerifier(strings.TrimSpace(text))
		if err != nil {
			return nil, fmt.Errorf("%q is not a verifier key: %w", text, err)
		}
		keys[i] = v
	}
	return keys, nil
}

// errUnsigned: a checkpoint has no signature by one of the keys.
var errUnsigned = errors.New("none of the given keys has signed it")

// Open reads a signed checkpoint. It must be signed by one of the keys, under the
// log's origin.
func (k Keys) Open(text string) (Signed, error) {
	n, err := note.Open([]byte(text), note.VerifierList(k...))
	var unverified *note.UnverifiedNoteError
	if errors.As(err, &unverified) {
		return Signed{}, fmt.Errorf("%w: %s", errUnsigned, signers(unverified.Note))
	}
	if err != nil {
		return Signed{}, fmt.Errorf("reading a signed checkpoint: %w", err)
	}
	c, err := ParseCheckpoint(n.Text)
	if err != nil {
		return Signed{}, err
	}
	if n.Text != c.Text() {
		return Signed{}, errors.New("reading a signed checkpoint: it has lines that this version of orgkeys does not know")
	}
	for _, s := range n.Sigs {
		if s.Name == c.Origin {
			return Signed{Checkpoint: c, Note: text}, nil
		}
	}
	return Signed{}, fmt.Errorf("%w: its origin is %s", errUnsigned, c.Origin)
}

func signers(n *note.Note) string {
	var all []string
	for _, s := range n.UnverifiedSigs {
		all = append(all, fmt.Sprintf("%s+%08x", s.Name, s.Hash))
	}
	return "it is signed by " + strings.Join(all, ", ")
}

// SignerOf returns the hash of the key that says it has signed a note, of which nothing
// is verified.
func SignerOf(text string) (uint32, error) {
	var unverified *note.UnverifiedNoteError
	if _, err := note.Open([]byte(text), note.VerifierList()); !errors.As(err, &unverified) {
		return 0, fmt.Errorf("reading a signed note: %w", err)
	}
	return unverified.Note.UnverifiedSigs[0].Hash, nil
}

// PublicKey returns the Ed25519 key within a verifier key.
func PublicKey(vkey string) (ed25519.PublicKey, error) {
	if _, err := ParseKeys(vkey); err != nil {
		return nil, err
	}
	encoded := strings.SplitN(strings.TrimSpace(vkey), "+", 3)[2]
	b, err := base64.StdEncoding.DecodeString(encoded)
	if err != nil || len(b) != 1+ed25519.PublicKeySize {
		return nil, fmt.Errorf("%q holds no Ed25519 key", vkey)
	}
	return b[1:], nil
}

// LocalSigner signs with a key in memory, for HSMs without Ed25519; its seed is
// stored sealed by the HSM.
type LocalSigner struct{ Private ed25519.PrivateKey }

// SignCheckpoint implements Signer.
func (s LocalSigner) SignCheckpoint(_ context.Context, text []byte) ([]byte, ed25519.PublicKey, error) {
	return ed25519.Sign(s.Private, text), s.Private.Public().(ed25519.PublicKey), nil
}

// CheckpointStore keeps signed checkpoints. Its implementation is sqlstore.
type CheckpointStore interface {
	Head(ctx context.Context) (Checkpoint, error)
	Durable(ctx context.Context, held Checkpoint, limit int) ([]Entry, Checkpoint, error) // see Store
	Exclusive(ctx context.Context, name string, do func(context.Context) error) (bool, error)
	// Consistency proves that a log of size extends one of the smaller size old.
	Consistency(ctx context.Context, size, old int64) (tlog.TreeProof, error)
	// LastSigned returns the newest signed checkpoint; Seq 0 if there is none.
	LastSigned(ctx context.Context) (Signed, error)
	// KeepSigned stores a signed checkpoint and the verifier key of its signer, unless a
	// larger one is stored, which covers it: their sizes never fall.
	KeepSigned(ctx context.Context, s Signed, vkey string) error
	// ThinSigned deletes old ones that are not needed any more.
	ThinSigned(ctx context.Context) error
}

// RewrittenError says that the log does not extend its newest signed checkpoint.
type RewrittenError struct {
	Signed Checkpoint
	Log    Checkpoint
}

func (e *RewrittenError) Error() string {
	if e.Log.Size < e.Signed.Size {
		return fmt.Sprintf("the log holds %d events, but its newest signed checkpoint covers %d: events were lost", e.Log.Size, e.Signed.Size)
	}
	return fmt.Sprintf("the log's first %d events differ from those of its newest signed checkpoint: the log was rewritten", e.Signed.Size)
}

// Checkpointer signs a checkpoint at an interval, when the log has grown.
type Checkpointer struct {
	auditLog *Log
	store    CheckpointStore
	signer   Signer
	interval time.Duration
	log      *slog.Logger

	// Prepare stores the texts of policies that the log refers to, before a checkpoint
	// is signed. It may be nil.
	Prepare func(context.Context) error

	asked atomic.Bool   // whether the log was found to extend what the sinks hold
	turn  chan struct{} // holds a value while a checkpoint is being signed

	mu      sync.Mutex
	last    Checkpoint // the newest that this process knows to be signed
	at      time.Time  // when the log was last known to be covered by a signed checkpoint
	trouble error
}

// NewCheckpointer returns a checkpointer for the log that auditLog follows.
func NewCheckpointer(auditLog *Log, store CheckpointStore, signer Signer, interval time.Duration, log *slog.Logger) *Checkpointer {
	return &Checkpointer{auditLog: auditLog, store: store, signer: signer, interval: interval, log: log, turn: make(chan struct{}, 1), at: time.Now()}
}

// Run signs at the interval until ctx ends.
func (c *Checkpointer) Run(ctx context.Context) {
	ticker := time.NewTicker(c.interval)
	defer ticker.Stop()
	for {
		if err := c.Sign(ctx); err != nil && ctx.Err() == nil {
			c.log.Error("no checkpoint could be signed", "error", err)
		}
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		}
	}
}

// CheckpointStatus is the state of signing checkpoints.
type CheckpointStatus struct {
	Size    int64     // events that the newest signed checkpoint covers
	Covered time.Time // when the whole log was last covered by one
	Err     error     // why not now, nil if it is
}

// Status returns the state of signing.
func (c *Checkpointer) Status() CheckpointStatus {
	c.mu.Lock()
	defer c.mu.Unlock()
	return CheckpointStatus{c.last.Size, c.at, c.trouble}
}

// Sign signs a checkpoint of the log as it is, unless the newest one covers it
// already, and has every sink record it. Before that it checks that the log
// extends the newest signed checkpoint, and reports *RewrittenError if not, and
// what the sinks hold, and reports *RollbackError if not.
func (c *Checkpointer) Sign(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, sinkDeadline)
	defer cancel()
	// Exclusive holds off other processes only.
	select {
	case c.turn <- struct{}{}:
		defer func() { <-c.turn }()
	case <-ctx.Done():
		return fmt.Errorf("waiting for a checkpoint that is being signed: %w", ctx.Err())
	}
	mine, err := c.store.Exclusive(ctx, "checkpointer", c.sign)
	var last Signed
	if err == nil {
		last, err = c.store.LastSigned(ctx) // another replica's, where that one holds the lock
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if err == nil && !mine {
		err = c.trouble // this process has not looked again
	}
	c.trouble = err
	if err != nil {
		return err
	}
	c.at = time.Now()
	if last.Size >= c.last.Size {
		c.last = last.Checkpoint
	}
	c.auditLog.offer(last.Seq)
	return nil
}

// sign asks every sink first: it signs nothing if a sink's copy does not agree with
// the log, or a sink does not answer. Later the last signed checkpoint of this process
// is compared instead of the sinks.
func (c *Checkpointer) sign(ctx context.Context) error {
	if !c.asked.Load() {
		if err := c.auditLog.CheckExtends(ctx); err != nil {
			return err
		}
		c.asked.Store(true)
	}
	head, last, err := c.Check(ctx)
	if err != nil || head.Size == last.Size {
		return err
	}
	if c.Prepare != nil {
		if err := c.Prepare(ctx); err != nil {
			return err
		}
	}
	// Signing leaves a record, for example in Vault's audit file.
	if _, _, err := c.store.Durable(ctx, head, 0); err != nil {
		return err
	}
	signed, vkey, err := sign(ctx, c.signer, head)
	if err != nil {
		return err
	}
	if err := c.store.KeepSigned(ctx, signed, vkey); err != nil {
		return err
	}
	if err := c.store.ThinSigned(ctx); err != nil {
		c.log.Warn("old signed checkpoints could not be deleted; this is tried again", "error", err)
	}
	return nil
}

// Check reports *RewrittenError unless the log extends its newest signed
// checkpoint: the stored one, and the one that this process saw last; and
// *RollbackError unless it extends what each sink has acknowledged, which is
// more. It returns the log's present checkpoint and the stored signed one.
func (c *Checkpointer) Check(ctx context.Context) (head Checkpoint, last Signed, err error) {
	sinks := c.auditLog.Sinks() // before the head, which keeps growing
	if last, err = c.store.LastSigned(ctx); err != nil {
		return head, last, err
	}
	if head, err = c.store.Head(ctx); err != nil {
		return head, last, err
	}
	c.mu.Lock()
	seen := c.last
	c.mu.Unlock()
	for _, held := range []Checkpoint{last.Checkpoint, seen} {
		if err := extends(ctx, c.store, head, held); err != nil {
			return head, last, err
		}
	}
	for _, s := range sinks {
		if errors.As(s.Err, new(*RollbackError)) {
			return head, last, s.Err
		}
		err := extends(ctx, c.store, head, s.Held)
		if errors.As(err, new(*RewrittenError)) {
			err = &RollbackError{s.Name, s.Held, head}
		}
		if err != nil {
			return head, last, err
		}
	}
	return head, last, nil
}

// extends reports *RewrittenError unless head extends held, by a consistency
// proof (RFC 6962, 2.1.2) from the stored hashes.
func extends(ctx context.Context, store CheckpointStore, head, held Checkpoint) error {
	switch {
	case held.Size == 0:
		return nil
	case head.Size < held.Size, head.Origin != held.Origin:
		return &RewrittenError{held, head}
	case head.Size == held.Size:
		if head.Root != held.Root {
			return &RewrittenError{held, head}
		}
		return nil
	}
	proof, err := store.Consistency(ctx, head.Size, held.Size)
	if err != nil {
		return fmt.Errorf("proving that the log extends its signed checkpoint: %w", err)
	}
	if tlog.CheckTree(proof, head.Size, head.Root, held.Size, held.Root) != nil {
		return &RewrittenError{held, head}
	}
	return nil
}
