package node

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/orgkeys/orgkeys/internal/audit"
	"github.com/orgkeys/orgkeys/internal/authz"
	"github.com/orgkeys/orgkeys/internal/gate"
	"github.com/orgkeys/orgkeys/internal/org"
	"github.com/orgkeys/orgkeys/internal/orgkey"
	"github.com/orgkeys/orgkeys/internal/shares"
)

// What answers with secrets may hold of memory, in bytes, shared out among
// organizations. An organization's secrets can be 4 MiB, and whoever fetches them may be
// slow to read, or mean to be. A node's usual few hundred bytes do not count.
const (
	answersMemory   = 96 << 20
	answerPreparing = 6               // times what is stored, while it is read, opened and sealed
	answerWriting   = 2               // the same while it is written
	answerPatience  = 2 * time.Second // how long a request waits for memory
)

// Envelope is a boot secret, sealed to the key that asked for it.
type Envelope struct {
	Name string
	Text []byte // JSON; see package envelope
}

// Secrets has deliver write out the boot secrets of the organization that the
// body names. None is delivered before its event is acknowledged by every
// required sink. Its memory counts until deliver returns, so that deliver must
// not wait for a slow reader for long.
func (s *Service) Secrets(ctx context.Context, from Origin, body []byte, deliver func([]Envelope) error) error {
	return s.acting(ctx, from, fetch, authz.FetchSecrets, body, func(r signed) error { return s.secrets(ctx, r, deliver) })
}

// secrets measures the organization's secrets only if they are not as large as they
// were last, or smaller.
func (s *Service) secrets(ctx context.Context, r signed, deliver func([]Envelope) error) error {
	if size, known := s.sizes.Get(r.org); known {
		if err := s.upTo(ctx, r, size, deliver); !errors.Is(err, ErrLarger) {
			return err
		}
	}
	size, err := s.store.SecretsSize(ctx, r.org)
	if err != nil {
		return s.gate.Failed(ctx, r.pass, audit.RequestFailed, gate.ReasonFor(ctx, "unavailable"), fmt.Errorf("measuring secrets: %w", err))
	}
	err = s.upTo(ctx, r, size, deliver)
	if errors.Is(err, ErrLarger) { // and have grown again since
		err = s.gate.Failed(ctx, r.pass, audit.RequestFailed, "overloaded", ErrBusy)
	}
	return err
}

// upTo delivers secrets that are stored in at most size bytes, or reports ErrLarger.
func (s *Service) upTo(ctx context.Context, r signed, size int64, deliver func([]Envelope) error) error {
	waiting, cancel := context.WithTimeout(ctx, answerPatience)
	defer cancel()
	counted := shares.Counted(size)
	keep := s.memory.Await(waiting, r.org, answerPreparing*counted)
	if keep == nil {
		return s.gate.Failed(ctx, r.pass, audit.RequestFailed, "overloaded", cmp.Or(ctx.Err(), ErrBusy))
	}
	defer keep(0)
	envelopes, err := s.fetch(ctx, r, size)
	if err != nil {
		return err
	}
	keep(answerWriting * counted)
	return deliver(envelopes)
}

func (s *Service) fetch(ctx context.Context, r signed, size int64) ([]Envelope, error) {
	var event audit.Event
	sealed, err := s.store.Secrets(ctx, r.org, r.Signer, r.addr, size, func(names []string) audit.Event {
		event = r.event(audit.SecretsFetched, "", "")
		event.Detail["secrets"] = strings.Join(names, ",")
		return event
	})
	if err := s.concluded(ctx, r, err); err != nil {
		return nil, err
	}
	size = 0
	for _, secret := range sealed {
		size += int64(len(secret.Sealed))
	}
	s.sizes.Add(r.org, size)
	// A registration writes this down itself.
	s.seen.node(Contact{Ref{r.org, r.addr}, r.Key}, s.now())
	envelopes, err := s.envelop(ctx, r, sealed)
	if err != nil {
		reason := gate.ReasonFor(ctx, "unavailable")
		if errors.Is(err, ErrSecretBroken) {
			reason = "secret_broken"
		}
		return nil, s.gate.Failed(ctx, r.pass, audit.RequestFailed, reason, err)
	}
	acknowledged, cancel := context.WithTimeout(ctx, s.auditDeadline)
	defer cancel()
	if err := s.gate.AuditLog.Acknowledged(acknowledged, event.ID); err != nil {
		return nil, fmt.Errorf("%w: %w", gate.ErrAudit, err)
	}
	return envelopes, nil
}

// envelop seals the stored secrets to r's key, those that were not sealed to it lately.
func (s *Service) envelop(ctx context.Context, r signed, stored []SealedSecret) ([]Envelope, error) {
	envelopes := make([]Envelope, len(stored))
	ids := make([]envelopeID, len(stored))
	var sealed []orgkey.Sealed
	var places []int
	recipient := r.public.Fingerprint()
	for i, secret := range stored {
		item := orgkey.Sealed{Binding: secretBinding(r.org, secret.Name), Ciphertext: secret.Sealed}
		ids[i] = identify(recipient, item)
		envelopes[i] = Envelope{secret.Name, s.envelopes.get(ids[i], s.now())}
		if envelopes[i].Text == nil {
			sealed, places = append(sealed, item), append(places, i)
		}
	}
	if len(sealed) == 0 {
		return envelopes, nil
	}
	opened, err := s.sealer.Open(ctx, sealed)
	if errors.Is(err, orgkey.ErrSealBroken) {
		return nil, fmt.Errorf("%w: %w", ErrSecretBroken, err)
	}
	if err != nil {
		return nil, fmt.Errorf("decrypting secrets: %w", err)
	}
	defer func() {
		for _, secret := range opened {
			clear(secret)
		}
	}()
	for n, secret := range opened {
		i := places[n]
		text, err := r.public.Envelope(secret)
		if err != nil {
			return nil, fmt.Errorf("sealing secret %s to key %s: %w", stored[i].Name, r.Key, err)
		}
		envelopes[i].Text = text
		s.envelopes.add(ids[i], text, s.now())
	}
	return envelopes, nil
}

func secretBinding(org org.ID, name string) orgkey.Binding {
	return orgkey.Binding{Purpose: orgkey.BootSecret, Org: string(org), ID: name}
}
