#!/usr/bin/env bash
# HashiCorp Vault 1.21.0, Transit: creating a key under a name that is taken succeeds, whatever type and properties are
# asked for, and answers the description of the key that is there. The only other sign is what that description says;
# a warning is not given.
#
# Why it matters: a program that creates "an exportable RSA key" under a name that something else has taken is told
# that it did. It must compare the type and each property that it asked for with the answer, or use names that nobody
# can have taken. For infrastructure as code it means that a changed type is never applied, and never an error.
#
# Seen:
#   asked for rsa-2048 exportable=true: answered type=aes256-gcm96 exportable=false, warnings 0
#
# Needs Go; Vault's Transit runs as a library. Exits with 1 if it behaves otherwise.
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

	"github.com/hashicorp/vault/builtin/logical/transit"
	"github.com/hashicorp/vault/sdk/logical"
)

func main() {
	ctx := context.Background()
	storage := &logical.InmemStorage{}
	b, err := transit.Factory(ctx, &logical.BackendConfig{StorageView: storage, System: logical.TestSystemView()})
	if err != nil {
		log.Fatal(err)
	}
	do := func(op logical.Operation, path string, data map[string]any) map[string]any {
		r, err := b.HandleRequest(ctx, &logical.Request{Storage: storage, Operation: op, Path: path, Data: data})
		if err != nil || r.IsError() {
			log.Fatalf("%s %s: %v %v", op, path, err, r)
		}
		if r == nil {
			return nil
		}
		return r.Data
	}
	do(logical.UpdateOperation, "keys/k", map[string]any{"type": "aes256-gcm96"})
	r, err := b.HandleRequest(ctx, &logical.Request{
		Storage: storage, Operation: logical.UpdateOperation, Path: "keys/k", Data: map[string]any{"type": "rsa-2048", "exportable": true},
	})
	if err != nil || r.IsError() {
		log.Fatalf("it behaves otherwise: %v %v", err, r)
	}
	fmt.Printf("asked for rsa-2048 exportable=true: answered type=%v exportable=%v, warnings %d\n", r.Data["type"], r.Data["exportable"], len(r.Warnings))
	if r.Data["type"] != "aes256-gcm96" || r.Data["exportable"] != false || len(r.Warnings) != 0 {
		log.Fatal("it behaves otherwise")
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
GOFLAGS=-mod=mod go run . 2>log || { cat log >&2 && exit 1; }
