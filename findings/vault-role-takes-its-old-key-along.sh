#!/usr/bin/env bash
# HashiCorp Vault 1.21.0, identity tokens: identity/oidc/.well-known/keys has the keys that some role names now, and "default", whatever they
# have signed. When a role is given another key, the public half of its old one is gone from there at once, and
# Vault itself says of a token that it issued a moment ago that it is not active ("unable to validate the token signature").
# verification_ttl, "24h" here, only holds for keys that a rotation of the same name has replaced. Nor was the new key ever there
# before it signs. A second role that names the old key, and that nobody uses, brings it back.
#
# Why it matters: giving a role a key of another algorithm, which is how RS256 becomes ES256, is one command that
# succeeds without a warning and ends every live token of every service that verifies them, for up to the role's ttl; those who got a
# token first notice. Make the second role first, and delete it when the last token of the old key has expired.
#
# Seen:
#   the token, a moment old:            key published, active: true, keys for ES256: 0
#   its key rotated:                    key published, active: true, keys for ES256: 0
#   the role has another key:           key not published, active: false, keys for ES256: 2
#   a second role has the first key:    key published, active: true, keys for ES256: 2
#
# Needs Go, and up to six minutes of computing where nothing of Vault has been compiled yet: its core runs as a
# library. Exits with 1 if it behaves otherwise.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
cat >finding_test.go <<'GO'
package finding

import (
	"encoding/json"
	"fmt"
	"os"
	"testing"

	"github.com/go-jose/go-jose/v4"
	"github.com/hashicorp/vault/builtin/credential/userpass"
	"github.com/hashicorp/vault/helper/namespace"
	"github.com/hashicorp/vault/sdk/logical"
	"github.com/hashicorp/vault/vault"
)

func TestFinding(t *testing.T) {
	core, _, root := vault.TestCoreUnsealedWithConfig(t, &vault.CoreConfig{CredentialBackends: map[string]logical.Factory{"userpass": userpass.Factory}})
	ctx := namespace.RootContext(t.Context())
	as := func(token string, op logical.Operation, path string, data map[string]any) *logical.Response {
		t.Helper()
		r, err := core.HandleRequest(ctx, &logical.Request{Operation: op, Path: path, Data: data, ClientToken: token, Connection: &logical.Connection{}})
		if err != nil || r.IsError() {
			t.Fatalf("%s: %v %v", path, err, r)
		}
		return r
	}
	write := func(path string, data map[string]any) *logical.Response {
		return as(root, logical.UpdateOperation, path, data)
	}

	write("sys/auth/userpass", map[string]any{"type": "userpass"})
	write("sys/policies/acl/tokens", map[string]any{"policy": `path "identity/oidc/token/*" { capabilities = ["read"] }`})
	write("auth/userpass/users/ada", map[string]any{"password": "of this finding", "token_policies": "tokens"})
	ada := as("", logical.UpdateOperation, "auth/userpass/login/ada", map[string]any{"password": "of this finding"}).Auth.ClientToken
	write("identity/oidc/key/first", map[string]any{"allowed_client_ids": "*", "algorithm": "RS256", "verification_ttl": "24h"})
	write("identity/oidc/key/second", map[string]any{"allowed_client_ids": "*", "algorithm": "ES256", "verification_ttl": "24h"})
	role := func(name, key string) {
		write("identity/oidc/role/"+name, map[string]any{"key": key, "ttl": "1h", "client_id": "service"})
	}
	role("service", "first")
	token := as(ada, logical.ReadOperation, "identity/oidc/token/service", nil).Data["token"].(string)
	parsed, err := jose.ParseSigned(token, []jose.SignatureAlgorithm{jose.RS256})
	if err != nil {
		t.Fatal(err)
	}
	var seen string
	say := func(when string) {
		var set jose.JSONWebKeySet
		r := as("", logical.ReadOperation, "identity/oidc/.well-known/keys", nil)
		if err := json.Unmarshal(r.Data[logical.HTTPRawBody].([]byte), &set); err != nil {
			t.Fatal(err)
		}
		published := "key not published"
		var es256 int
		for _, k := range set.Keys {
			if k.Algorithm == "ES256" {
				es256++
			}
		}
		for _, k := range set.Key(parsed.Signatures[0].Header.KeyID) {
			if _, err := parsed.Verify(k); err == nil {
				published = "key published"
			}
		}
		r = write("identity/oidc/introspect", map[string]any{"token": token})
		var answer struct{ Active bool }
		if err := json.Unmarshal(r.Data[logical.HTTPRawBody].([]byte), &answer); err != nil {
			t.Fatal(err)
		}
		seen += fmt.Sprintf("%-35s %s, active: %t, keys for ES256: %d\n", when, published, answer.Active, es256)
	}
	say("the token, a moment old:")
	write("identity/oidc/key/first/rotate", nil)
	say("its key rotated:")
	role("service", "second")
	say("the role has another key:")
	role("keeps-first", "first")
	say("a second role has the first key:")
	if err := os.WriteFile("seen", []byte(seen), 0o600); err != nil {
		t.Fatal(err)
	}
}
GO
cat >go.mod <<'MOD'
module finding

go 1.25.1

require (
	github.com/go-jose/go-jose/v4 v4.1.2
	github.com/hashicorp/vault v1.21.0
	github.com/hashicorp/vault/sdk v0.20.0
)

replace (
	github.com/99designs/keyring => github.com/Jeffail/keyring v1.2.3
	github.com/hashicorp/vault/sdk => github.com/hashicorp/vault/sdk v0.20.0
	github.com/ma314smith/signedxml v1.1.1 => github.com/moov-io/signedxml v1.1.1
)
MOD
GOFLAGS=-mod=mod go test -vet=off -count=1 . >log 2>&1 || { cat log >&2 && exit 1; }
cat seen
diff seen - <<'SEEN'
the token, a moment old:            key published, active: true, keys for ES256: 0
its key rotated:                    key published, active: true, keys for ES256: 0
the role has another key:           key not published, active: false, keys for ES256: 2
a second role has the first key:    key published, active: true, keys for ES256: 2
SEEN
