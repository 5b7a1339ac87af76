// Package keypem writes private keys as PEM (RFC 7468) without leaving copies behind.
package keypem

import (
	"encoding/base64"
	"slices"
)

// Encode returns what pem.EncodeToMemory does, which leaves parts of the key in buffers
// of its own. Here the only one is what is returned: it never grows, so none is left
// behind. Whoever has it clears it.
func Encode(blockType string, der []byte) []byte {
	const line = 48 // bytes, in 64 characters
	begin, end := "-----BEGIN "+blockType+"-----\n", "-----END "+blockType+"-----\n"
	lines := (len(der) + line - 1) / line
	text := make([]byte, 0, len(begin)+base64.StdEncoding.EncodedLen(len(der))+lines+len(end))
	text = append(text, begin...)
	for part := range slices.Chunk(der, line) {
		text = append(base64.StdEncoding.AppendEncode(text, part), '\n')
	}
	return append(text, end...)
}
