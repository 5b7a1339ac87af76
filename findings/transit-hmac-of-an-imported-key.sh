#!/usr/bin/env bash
# HashiCorp Vault 1.21.0, Transit: hmac with a key that was imported does not use that key, unless its type is
# hmac. Every other key gets an HMAC key of its own when it comes in, which Vault draws and shows nobody.
#
# Why it matters: an HMAC by "the same key" cannot be verified outside Vault, nor by another Vault that imported it,
# nor by this one after the key was deleted and imported again, as a disaster plan that keeps the key material
# elsewhere does. Encryption and signatures with that key go on. Only a backup by Vault has the HMAC key.
#
# Seen:
#   aes256-gcm96: as HMAC-SHA256 with that key: false, the same after the key was imported again: false
#   hmac: as HMAC-SHA256 with that key: true, the same after the key was imported again: true
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
	"crypto/hmac"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
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
	wrapping, _ := pem.Decode([]byte(do(logical.ReadOperation, "wrapping_key", nil)["public_key"].(string)))
	public, err := x509.ParsePKIXPublicKey(wrapping.Bytes)
	if err != nil {
		log.Fatal(err)
	}
	key, ephemeral := make([]byte, 32), make([]byte, 32)
	rand.Read(key)
	rand.Read(ephemeral)
	kwp, err := subtle.NewKWP(ephemeral)
	if err != nil {
		log.Fatal(err)
	}
	wrapped, err := kwp.Wrap(key)
	if err != nil {
		log.Fatal(err)
	}
	sealed, err := rsa.EncryptOAEP(sha256.New(), rand.Reader, public.(*rsa.PublicKey), ephemeral, nil)
	if err != nil {
		log.Fatal(err)
	}
	text := base64.StdEncoding.EncodeToString([]byte("text"))
	importedMAC := func(kind string) string {
		do(logical.UpdateOperation, "keys/k/import", map[string]any{"type": kind, "ciphertext": base64.StdEncoding.EncodeToString(append(sealed, wrapped...))})
		mac := do(logical.UpdateOperation, "hmac/k", map[string]any{"input": text})["hmac"].(string)
		do(logical.UpdateOperation, "keys/k/config", map[string]any{"deletion_allowed": true})
		do(logical.DeleteOperation, "keys/k", nil)
		return mac
	}
	h := hmac.New(sha256.New, key)
	h.Write([]byte("text"))
	outside := "vault:v1:" + base64.StdEncoding.EncodeToString(h.Sum(nil))
	otherwise := false
	for _, kind := range []string{"aes256-gcm96", "hmac"} {
		first, again := importedMAC(kind), importedMAC(kind)
		fmt.Printf("%s: as HMAC-SHA256 with that key: %t, the same after the key was imported again: %t\n", kind, first == outside, first == again)
		is := kind == "hmac"
		otherwise = otherwise || (first == outside) != is || (first == again) != is
	}
	if otherwise {
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
