#!/usr/bin/env bash
# HashiCorp Vault 1.21.0, AppRole: a login that is refused because of secret_id_bound_cidrs counts as a use of the SecretID. One
# with secret_id_num_uses=1 is deleted by it, though no token was issued, and the next login, from the right address, is
# told "invalid role or secret ID", as if it had never been there. The manual has the number count the tokens that a SecretID
# gets. With the RoleID of another role nothing is used up.
#
# Why it matters: the address is what Vault sees, and behind a new load balancer that is the balancer's. Each start of a service uses
# up a SecretID that was delivered for one start; once the list of addresses is put right, the very same
# SecretID looks wrong or stolen, which is how a wrapped one that somebody else unwrapped looks too. The reason is in the first
# answer only. A new SecretID is needed after each such refusal.
#
# Seen:
#   with another role's RoleID:          invalid role or secret ID
#   uses left:                           1
#   from 192.0.2.1, not in 10.0.0.0/8:   source address "192.0.2.1" unauthorized by CIDR restrictions on the role
#   uses left:                           none, no such SecretID
#   from 10.0.0.1:                       invalid role or secret ID
#
# Needs Go; Vault's AppRole runs as a library. Exits with 1 if it behaves otherwise.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
cat >main.go <<'GO'
package main

import (
	"context"
	"fmt"
	"log"
	"strings"

	"github.com/hashicorp/vault/builtin/credential/approle"
	"github.com/hashicorp/vault/sdk/logical"
)

func main() {
	ctx := context.Background()
	storage := &logical.InmemStorage{}
	b, err := approle.Factory(ctx, &logical.BackendConfig{StorageView: storage, System: logical.TestSystemView()})
	if err != nil {
		log.Fatal(err)
	}
	// Backends get ready at their first request.
	if err := b.Initialize(ctx, &logical.InitializationRequest{Storage: storage}); err != nil {
		log.Fatal(err)
	}
	call := func(op logical.Operation, path, from string, data map[string]any) *logical.Response {
		r, err := b.HandleRequest(ctx, &logical.Request{
			Storage: storage, Operation: op, Path: path, Data: data, Connection: &logical.Connection{RemoteAddr: from},
		})
		if r == nil && err != nil {
			log.Fatalf("%s: %v", path, err)
		}
		return r
	}
	for _, role := range []string{"service", "other"} {
		call(logical.CreateOperation, "role/"+role, "", map[string]any{"secret_id_num_uses": 1, "secret_id_bound_cidrs": "10.0.0.0/8"})
	}
	roleID := func(role string) any { return call(logical.ReadOperation, "role/"+role+"/role-id", "", nil).Data["role_id"] }
	secretID := call(logical.UpdateOperation, "role/service/secret-id", "", nil).Data["secret_id"]
	login := func(role, from string) string {
		r := call(logical.UpdateOperation, "login", from, map[string]any{"role_id": roleID(role), "secret_id": secretID})
		if r.IsError() {
			answer, _, _ := strings.Cut(r.Error().Error(), ": %!w") // what it says of the reason is no text
			return answer
		}
		return "logged in"
	}
	left := func() string {
		r := call(logical.UpdateOperation, "role/service/secret-id/lookup", "", map[string]any{"secret_id": secretID})
		if r == nil || r.Data["secret_id_num_uses"] == nil {
			return "none, no such SecretID"
		}
		return fmt.Sprint(r.Data["secret_id_num_uses"])
	}
	var seen strings.Builder
	say := func(what, answer string) { fmt.Fprintf(&seen, "%-36s %s\n", what, answer) }
	say("with another role's RoleID:", login("other", "10.0.0.1"))
	say("uses left:", left())
	say("from 192.0.2.1, not in 10.0.0.0/8:", login("service", "192.0.2.1"))
	say("uses left:", left())
	say("from 10.0.0.1:", login("service", "10.0.0.1"))
	fmt.Print(seen.String())
	// Without the refusal in between.
	secretID = call(logical.UpdateOperation, "role/service/secret-id", "", nil).Data["secret_id"]
	if login("service", "10.0.0.1") != "logged in" {
		log.Fatal("the right address alone is refused too")
	}
}
GO
cat >go.mod <<'MOD'
module finding

go 1.24

require (
	github.com/hashicorp/vault v1.21.0
)
MOD
GOFLAGS=-mod=mod go run . >seen 2>log || { cat seen log >&2 && exit 1; }
cat seen
diff seen - <<'SEEN'
with another role's RoleID:          invalid role or secret ID
uses left:                           1
from 192.0.2.1, not in 10.0.0.0/8:   source address "192.0.2.1" unauthorized by CIDR restrictions on the role
uses left:                           none, no such SecretID
from 10.0.0.1:                       invalid role or secret ID
SEEN
