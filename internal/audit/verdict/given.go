package verdict

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	"github.com/orgkeys/orgkeys/internal/audit"
	"github.com/orgkeys/orgkeys/internal/audit/archive"
	"github.com/orgkeys/orgkeys/internal/audit/verify"
)

// Given is what somebody who verifies has from elsewhere, as they named it on the command line.
type Given struct {
	Keys       []string // verifier keys, or files of them
	Checkpoint string   // a file, or the text
	Sink       string   // a copy of the file sink
	VaultFiles []string // Vault's audit files
	AsOf       string   // the time that these must reach
}

// errNoKey: what is verified must not say itself by which key.
var errNoKey = errors.New("--key: give the log's verifier key, which must not come from the person who gave you the archive; \"orgkeys audit key\" prints it")

// requiredKeys is keys, of which there must be one.
func (g Given) requiredKeys() ([]string, error) {
	keys, err := g.keys()
	if err == nil && len(keys) == 0 {
		err = errNoKey
	}
	return keys, err
}

// Trusted returns the keys; none: none were given.
func (g Given) Trusted() (audit.Keys, error) {
	keys, err := g.keys()
	if err != nil {
		return nil, err
	}
	return audit.ParseKeys(keys...)
}

// keys are verifier keys as they stand on the command line, or in files that
// hold them, one a line.
func (g Given) keys() ([]string, error) {
	var keys []string
	for _, text := range g.Keys {
		if b, err := os.ReadFile(text); err == nil {
			text = string(b)
		} else if !strings.Contains(text, "+") {
			return nil, fmt.Errorf("--key: neither a verifier key nor a file that can be read: %w", err)
		}
		for line := range strings.Lines(text) {
			if line = strings.TrimSpace(line); line != "" && !strings.HasPrefix(line, "#") {
				keys = append(keys, line)
			}
		}
	}
	if len(g.Keys) > 0 && len(keys) == 0 {
		return nil, errors.New("--key: the file holds no key")
	}
	return keys, nil
}

// checkpoint is the newest checkpoint in what --checkpoint names: a file,
// or the text itself, in any form in which a sink has it. Empty: none was given.
func (g Given) checkpoint(signed bool) (string, error) {
	if g.Checkpoint == "" {
		return "", nil
	}
	text := g.Checkpoint
	if trimmed := strings.TrimSpace(text); !strings.HasPrefix(trimmed, "{") && !strings.Contains(trimmed, "\n") {
		b, err := os.ReadFile(g.Checkpoint)
		if err != nil {
			return "", fmt.Errorf("--checkpoint: neither a checkpoint nor a file that can be read: %w", err)
		}
		text = string(b)
	}
	newest, err := verify.NewestIn(text, signed)
	if err != nil {
		return "", fmt.Errorf("--checkpoint: %w", err)
	}
	return newest, nil
}

// asOf is the time to which Vault's audit files must reach; zero: any.
func (g Given) asOf() (time.Time, error) {
	switch {
	case g.AsOf == "":
		return time.Time{}, nil
	case len(g.VaultFiles) == 0:
		return time.Time{}, errors.New("--as-of needs Vault's audit files: give them with --vault-audit")
	}
	at, err := time.Parse(time.RFC3339, g.AsOf)
	if err != nil {
		return time.Time{}, fmt.Errorf("--as-of: %q is not a time such as 2026-01-31T12:00:00Z", g.AsOf)
	}
	return at, nil
}

// vault reads Vault's audit files; nil: none was given.
func (g Given) vault() (*archive.VaultFile, error) {
	if len(g.VaultFiles) == 0 {
		return nil, nil
	}
	vault := &archive.VaultFile{}
	for _, name := range g.VaultFiles {
		f, err := os.Open(name)
		if err != nil {
			return nil, err
		}
		if err := errors.Join(vault.Read(name, f), f.Close()); err != nil {
			return nil, err
		}
	}
	return vault, vault.CheckNotEmpty()
}

func readCheckpoint(text string, vkeys []string) (audit.Checkpoint, error) {
	if len(vkeys) == 0 {
		return audit.ParseCheckpoint(text)
	}
	keys, err := audit.ParseKeys(vkeys...)
	if err != nil {
		return audit.Checkpoint{}, err
	}
	s, err := keys.Open(text)
	return s.Checkpoint, err
}
