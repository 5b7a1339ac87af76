package node

import (
	"context"
	"errors"
	"fmt"
	"regexp"

	"github.com/orgkeys/orgkeys/internal/audit"
	"github.com/orgkeys/orgkeys/internal/authz"
	"github.com/orgkeys/orgkeys/internal/envelope"
	"github.com/orgkeys/orgkeys/internal/gate"
	"github.com/orgkeys/orgkeys/internal/org"
)

var secretName = regexp.MustCompile(`^[a-z][a-z0-9_]{0,63}$`)

// List returns org's nodes, the newest registration first, deleted ones left out.
func (s *Service) List(ctx context.Context, call gate.Call, org org.ID) ([]Node, error) {
	pass, err := s.gate.Decide(ctx, call, authz.ListNodes, org, "")
	if err != nil {
		return nil, err
	}
	nodes, err := s.store.Nodes(ctx, org)
	if err != nil {
		return nil, s.gate.Failed(ctx, pass, audit.NodesListed, gate.ReasonFor(ctx, "unavailable"), fmt.Errorf("reading nodes: %w", err))
	}
	return nodes, s.gate.Record(ctx, pass.Event(audit.NodesListed))
}

// Delete deletes org's node id with its node keys. The node may come back by
// registering with an organization key, or by a new enrollment.
func (s *Service) Delete(ctx context.Context, call gate.Call, org org.ID, id string) error {
	pass, err := s.gate.Decide(ctx, call, authz.DeleteNode, org, id)
	if err != nil {
		return err
	}
	ctx, cancel := gate.Outlive(ctx)
	defer cancel()
	return s.recordFailure(ctx, pass, s.store.DeleteNode(ctx, org, id, pass.Event(audit.NodeDeleted), func(keyID string) audit.Event {
		event := pass.Event(audit.KeyDeleted)
		event.Object, event.Reason = keyID, "node_deleted"
		return event
	}))
}

// recordFailure records that an allowed change failed, and returns why.
func (s *Service) recordFailure(ctx context.Context, pass gate.Pass, err error) error {
	if err == nil {
		return nil
	}
	reason := "unavailable"
	switch {
	case errors.Is(err, ErrNodeNotFound), errors.Is(err, ErrSecretNotFound):
		reason = "not_found"
	case errors.Is(err, ErrAlreadyDeleted):
		reason = "already_deleted"
	case errors.Is(err, ErrTooManySecrets):
		reason = "too_many_secrets"
	}
	return s.gate.Failed(ctx, pass, audit.RequestFailed, reason, err)
}

// PutSecret stores value, 1 to envelope.MaxSecret bytes, as org's boot secret
// name. The caller clears value.
func (s *Service) PutSecret(ctx context.Context, call gate.Call, org org.ID, name string, value []byte) error {
	pass, err := s.gate.Decide(ctx, call, authz.PutSecret, org, name)
	if err != nil {
		return err
	}
	if wrong := checkSecret(name, value); wrong != nil {
		return s.gate.Failed(ctx, pass, audit.RequestFailed, "invalid", wrong)
	}
	ctx, cancel := gate.Outlive(ctx)
	defer cancel()
	sealed, err := s.sealer.Seal(ctx, secretBinding(org, name), value)
	if err != nil {
		return s.recordFailure(ctx, pass, fmt.Errorf("sealing a secret: %w", err))
	}
	return s.recordFailure(ctx, pass, s.store.PutSecret(ctx, org, SealedSecret{name, sealed}, MaxSecrets, pass.Event(audit.SecretPut)))
}

func checkSecret(name string, value []byte) error {
	switch {
	case !secretName.MatchString(name):
		return &InputError{Field: "name", Problem: "is not a lower-case letter followed by up to 63 lower-case letters, digits and underscores"}
	case len(value) == 0:
		// An upload that went wrong would otherwise blank every node's secret.
		return &InputError{Field: "", Problem: "the secret is empty"}
	case len(value) > envelope.MaxSecret:
		return &InputError{Field: "", Problem: fmt.Sprintf("the secret is longer than %d bytes", envelope.MaxSecret)}
	}
	return nil
}

// ListSecrets returns the names and times of org's secrets, by name.
func (s *Service) ListSecrets(ctx context.Context, call gate.Call, org org.ID) ([]Secret, error) {
	pass, err := s.gate.Decide(ctx, call, authz.ListSecrets, org, "")
	if err != nil {
		return nil, err
	}
	secrets, err := s.store.SecretNames(ctx, org)
	if err != nil {
		return nil, s.gate.Failed(ctx, pass, audit.SecretsListed, gate.ReasonFor(ctx, "unavailable"), fmt.Errorf("reading secrets: %w", err))
	}
	return secrets, s.gate.Record(ctx, pass.Event(audit.SecretsListed))
}

// DeleteSecret ends org's secret name. Nodes keep what they fetched.
func (s *Service) DeleteSecret(ctx context.Context, call gate.Call, org org.ID, name string) error {
	pass, err := s.gate.Decide(ctx, call, authz.DeleteSecret, org, name)
	if err != nil {
		return err
	}
	if !secretName.MatchString(name) { // such a secret cannot exist
		return s.recordFailure(ctx, pass, ErrSecretNotFound)
	}
	ctx, cancel := gate.Outlive(ctx)
	defer cancel()
	return s.recordFailure(ctx, pass, s.store.DeleteSecret(ctx, org, name, pass.Event(audit.SecretDeleted)))
}
