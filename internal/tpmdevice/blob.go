package tpmdevice

import (
	"encoding/asn1"
	"encoding/hex"
	"encoding/pem"
	"fmt"
	"regexp"
)

// blob is a key as a file keeps it: only the TPM that made it loads it.
type blob struct {
	parent  []byte // the Name of the storage root key
	public  []byte // TPM2B_PUBLIC
	private []byte // TPM2B_PRIVATE
}

// pemType is that of "ASN.1 Specification for TPM 2.0 Key Files", which the TPM
// providers of OpenSSL read too.
const pemType = "TSS2 PRIVATE KEY"

// ownerHierarchy as a parent means a storage root key on P-256 by the TCG's
// template, made when it is needed.
const ownerHierarchy = 0x40000001

var loadableKey = asn1.ObjectIdentifier{2, 23, 133, 10, 1, 3}

type keyFile struct {
	Type      asn1.ObjectIdentifier
	EmptyAuth bool `asn1:"optional,explicit,tag:0"`
	Parent    int64
	Public    []byte
	Private   []byte
}

var parentLine = regexp.MustCompile(`(?m)^Parent: ([0-9a-f]{4,140})$`)

// IsKey reports whether a PEM text is a key in a TPM.
func IsKey(text []byte) bool {
	block, _ := pem.Decode(text)
	return block != nil && block.Type == pemType
}

// PEM is the key as text. A line before it has the Name of the key's parent,
// which alone tells a TPM that was cleared from a damaged file.
func (k *Key) PEM() ([]byte, error) {
	der, err := asn1.Marshal(keyFile{loadableKey, true, ownerHierarchy, k.blob.public, k.private})
	if err != nil {
		return nil, fmt.Errorf("encoding a key in a TPM: %w", err)
	}
	text := fmt.Appendf(nil, "Parent: %x\n", k.parent)
	return append(text, pem.EncodeToMemory(&pem.Block{Type: pemType, Bytes: der})...), nil
}

// Parse reads a key's text. It asks no TPM.
func (d Device) Parse(text []byte) (*Key, error) {
	block, _ := pem.Decode(text)
	if block == nil || block.Type != pemType {
		return nil, fmt.Errorf("%w: it is not PEM of a key in a TPM", ErrBlob)
	}
	var f keyFile
	rest, err := asn1.Unmarshal(block.Bytes, &f)
	if err != nil || len(rest) > 0 || !f.Type.Equal(loadableKey) || f.Parent != ownerHierarchy {
		return nil, fmt.Errorf("%w: it is not a key of orgkeys-node", ErrBlob)
	}
	line := parentLine.FindSubmatch(text)
	if line == nil {
		return nil, fmt.Errorf("%w: the line with its parent is missing", ErrBlob)
	}
	parent, err := hex.DecodeString(string(line[1]))
	if err != nil {
		return nil, fmt.Errorf("%w: its parent is not hex", ErrBlob)
	}
	return d.key(blob{parent, f.Public, f.Private})
}
