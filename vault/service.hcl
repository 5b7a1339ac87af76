# What the orgkeys service may do in Vault. Loaded as "orgkeys-service" by
# vault/setup; the service compares its token with this at every start.

# Keys in the making, keys made ahead, and, made without a type, blanks in the place of
# deleted keys. Creating needs only "update": Transit has no existence check there.
# "read" is how the service confirms that a key is gone; it shows public halves.
path "orgkeys/keys/+" {
  capabilities       = ["read", "update", "delete"]
  allowed_parameters = {
    "type"       = ["rsa-2048"]
    "exportable" = [true]
  }
}

path "orgkeys/keys/+/config" {
  capabilities       = ["update"]
  allowed_parameters = {
    "deletion_allowed" = [true]
  }
}

path "orgkeys/export/encryption-key/+/1" {
  capabilities = ["read"]
}

# Keys that leave only wrapped to a recipient's public key, and those recipients:
# each is there for a fraction of a second, under a random name; keys made ahead
# wait there until they are taken. No other way out
# is allowed, nor another hash than Transit's default, SHA-256.
path "orgkeys-sealed/keys/+" {
  capabilities       = ["read", "update", "delete"]
  allowed_parameters = {
    "type"       = ["rsa-2048"]
    "exportable" = [true]
  }
}

path "orgkeys-sealed/keys/+/import" {
  capabilities       = ["update"]
  allowed_parameters = {
    "type"       = ["rsa-2048", "rsa-3072", "rsa-4096"]
    "public_key" = []
  }
}

path "orgkeys-sealed/keys/+/config" {
  capabilities       = ["update"]
  allowed_parameters = {
    "deletion_allowed" = [true]
  }
}

path "orgkeys-sealed/byok-export/+/+/1" {
  capabilities      = ["read"]
  denied_parameters = {
    "hash" = []
  }
}

# Sealing. Not "create": with it, Transit would make a missing key silently.
path "orgkeys-seal/encrypt/seal" {
  capabilities = ["update"]
}

path "orgkeys-seal/decrypt/seal" {
  capabilities = ["update"]
}

path "orgkeys-seal/rewrap/seal" {
  capabilities = ["update"]
}

path "orgkeys-seal/keys/seal" {
  capabilities = ["read"]
}

# The audit trail: signed receipts, and the newest checkpoint, which can be
# overwritten but not deleted.
path "orgkeys-audit/sign/receipt" {
  capabilities = ["update"]
}

path "orgkeys-audit/keys/receipt" {
  capabilities = ["read"]
}

path "orgkeys-state/data/checkpoint" {
  capabilities = ["create", "read", "update"]
}

# Checks, at start and while it serves. Listing the audit devices needs sudo; this one path is all
# it is given for, and devices live below it, at sys/audit/NAME.
path "sys/audit" {
  capabilities = ["read", "sudo"]
}

path "sys/mounts/orgkeys/tune" {
  capabilities = ["read"]
}

path "sys/mounts/orgkeys-sealed/tune" {
  capabilities = ["read"]
}

path "sys/mounts/orgkeys-seal/tune" {
  capabilities = ["read"]
}

path "sys/mounts/orgkeys-audit/tune" {
  capabilities = ["read"]
}

path "sys/mounts/orgkeys-state/tune" {
  capabilities = ["read"]
}

# Whether the server that answers runs with disable_cache. Vault leaves secrets
# out of what it shows here.
path "sys/config/state/sanitized" {
  capabilities = ["read"]
}

path "sys/policies/acl/orgkeys-service" {
  capabilities = ["read"]
}

path "sys/policies/acl/orgkeys-reaper" {
  capabilities = ["read"]
}

path "sys/capabilities-self" {
  capabilities = ["update"]
}

# Its own token. The role leaves the default policy out, which has these.
path "auth/token/lookup-self" {
  capabilities = ["read"]
}

path "auth/token/renew-self" {
  capabilities = ["update"]
}

path "auth/token/revoke-self" {
  capabilities = ["update"]
}
