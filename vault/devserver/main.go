// Command devserver is HashiCorp Vault, server and command line, built from
// HashiCorp's own Go packages, for development and tests of orgkeys only.
//
// It lives in a module of its own because those packages are under the
// Business Source License 1.1: nothing that orgkeys ships imports or links
// them. See README.md beside this file.
package main

import (
	"os"

	"github.com/hashicorp/vault/command"
)

func main() {
	os.Exit(command.Run(os.Args[1:]))
}
