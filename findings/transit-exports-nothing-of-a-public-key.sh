#!/usr/bin/env bash
# HashiCorp Vault 1.21.0, Transit: of a key of which only the public half was imported, an export of the private key
# succeeds, with an empty text in place of the key, once the key's configuration says that it may be exported. The
# key's description does not say that there is no private half: it is the same for both.
#
# Why it matters: whoever stores what a successful export answers stores an empty file as a private key; a migration
# that counts successes counts these. The public half is under export/public-key.
#
# Seen:
#   export/encryption-key of a public key: succeeds with 0 bytes
#   described otherwise than a whole key: false
#
# Needs Go; Vault's Transit runs as a library. Exits with 1 if it behaves otherwise.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
cat >main.go <<'GO'
package main

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"log"

	"github.com/hashicorp/vault/builtin/logical/transit"
	"github.com/hashicorp/vault/sdk/logical"
	"github.com/tink-crypto/tink-go/v2/kwp/subtle"
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
	must := func(err error) {
		if err != nil {
			log.Fatal(err)
		}
	}
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	must(err)
	der, err := x509.MarshalPKIXPublicKey(&key.PublicKey)
	must(err)
	do(logical.UpdateOperation, "keys/half/import", map[string]any{
		"type": "rsa-2048", "public_key": string(pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der})),
	})

	// The whole key, by Vault's wrapping key.
	wrapping, _ := pem.Decode([]byte(do(logical.ReadOperation, "wrapping_key", nil)["public_key"].(string)))
	public, err := x509.ParsePKIXPublicKey(wrapping.Bytes)
	must(err)
	private, err := x509.MarshalPKCS8PrivateKey(key)
	must(err)
	ephemeral := make([]byte, 32)
	rand.Read(ephemeral)
	kwp, err := subtle.NewKWP(ephemeral)
	must(err)
	wrapped, err := kwp.Wrap(private)
	must(err)
	sealed, err := rsa.EncryptOAEP(sha256.New(), rand.Reader, public.(*rsa.PublicKey), ephemeral, nil)
	must(err)
	do(logical.UpdateOperation, "keys/whole/import", map[string]any{"type": "rsa-2048", "ciphertext": base64.StdEncoding.EncodeToString(append(sealed, wrapped...))})

	described := map[string][]byte{}
	for _, name := range []string{"half", "whole"} {
		do(logical.UpdateOperation, "keys/"+name+"/config", map[string]any{"exportable": true})
		about := do(logical.ReadOperation, "keys/"+name, nil)
		delete(about, "name")
		about["keys"] = len(about["keys"].(map[string]map[string]any)) // each has its time
		described[name], err = json.Marshal(about)
		must(err)
	}
	exported := do(logical.ReadOperation, "export/encryption-key/half", nil)["keys"].(map[string]string)["1"]
	whole := do(logical.ReadOperation, "export/encryption-key/whole", nil)["keys"].(map[string]string)["1"]
	differs := !bytes.Equal(described["half"], described["whole"])
	fmt.Printf("export/encryption-key of a public key: succeeds with %d bytes\n", len(exported))
	fmt.Println("described otherwise than a whole key:", differs)
	if exported != "" || len(whole) < 1000 || differs {
		log.Fatal("it behaves otherwise")
	}
}
GO
cat >go.mod <<'MOD'
module finding

go 1.24

require (
	github.com/hashicorp/vault v1.21.0
	github.com/tink-crypto/tink-go/v2 v2.4.0
)
MOD
GOFLAGS=-mod=mod go run . 2>log || { cat log >&2 && exit 1; }
