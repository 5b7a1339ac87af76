// Package vault holds what orgkeys expects in HashiCorp Vault. The README beside
// it says how it gets there.
package vault

import "embed"

// Policies are the policies of the service's token, as vault/setup loads them.
//
//go:embed service.hcl reaper.hcl
var Policies embed.FS
