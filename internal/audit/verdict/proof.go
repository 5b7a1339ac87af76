package verdict

import (
	"fmt"
	"os"

	"github.com/orgkeys/orgkeys/internal/audit/archive"
)

// Proof verifies the proof of one event in a file.
func (j *Judge) Proof(name string, g Given) error {
	keys, err := g.requiredKeys()
	if err != nil {
		return err
	}
	text, err := os.ReadFile(name)
	if err != nil {
		return err
	}
	proof, signed, err := archive.VerifyProof(text, keys)
	if err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	v := &j.verdict
	v.Origin, v.Size, v.Root, v.Covered = signed.Origin, signed.Size, signed.Root.String(), signed.Size
	v.Proof = &Proof{proof.Index, proof.Event}
	_, err = fmt.Fprintf(j.out, "event %d of log %s, which held %d events when it was signed:\n%s\n", proof.Index, signed.Origin, signed.Size, proof.Event)
	return err
}
