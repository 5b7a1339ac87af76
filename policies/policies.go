// Package policies holds the Rego policy that decides every request, its tests,
// and the decision table that the Rego tests, the Go tests, SECURITY.md and
// README.md share.
package policies

import "embed"

// Files is the policy that is used where no directory replaces it, with its
// tests and their data.
//
//go:embed *.rego *.json
var Files embed.FS

//go:generate go run ./decisiontable -summary ../SECURITY.md
//go:generate go run ./decisiontable README.md
