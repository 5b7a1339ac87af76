# What vault/setup needs, for a short-lived token of the operator who runs it:
#
#   vault policy write orgkeys-setup vault/setup.hcl
#   vault token create -policy=orgkeys-setup -ttl=15m
#
# Whoever holds such a token decides what the service may do, so it is as
# powerful as the keys themselves. It can read no key and open nothing.

path "sys/mounts" {
  capabilities = ["read"]
}

path "sys/mounts/orgkeys" {
  capabilities = ["create", "update"]
}

path "sys/mounts/orgkeys-sealed" {
  capabilities = ["create", "update"]
}

path "sys/mounts/orgkeys-seal" {
  capabilities = ["create", "update"]
}

path "sys/mounts/orgkeys-audit" {
  capabilities = ["create", "update"]
}

path "sys/mounts/orgkeys-state" {
  capabilities = ["create", "update"]
}

path "sys/mounts/orgkeys/tune" {
  capabilities = ["read", "create", "update"]
}

path "sys/mounts/orgkeys-sealed/tune" {
  capabilities = ["read", "create", "update"]
}

path "sys/mounts/orgkeys-seal/tune" {
  capabilities = ["read", "create", "update"]
}

path "sys/mounts/orgkeys-audit/tune" {
  capabilities = ["read", "create", "update"]
}

path "sys/mounts/orgkeys-state/tune" {
  capabilities = ["read", "create", "update"]
}

path "orgkeys/config/keys" {
  capabilities = ["read", "create", "update"]
}

path "orgkeys-sealed/config/keys" {
  capabilities = ["read", "create", "update"]
}

path "orgkeys-seal/config/keys" {
  capabilities = ["read", "create", "update"]
}

path "orgkeys-audit/config/keys" {
  capabilities = ["read", "create", "update"]
}

path "orgkeys-seal/keys/seal" {
  capabilities       = ["read", "create", "update"]
  allowed_parameters = {
    "type"    = ["aes256-gcm96"]
    "derived" = ["true"]
  }
}

path "orgkeys-audit/keys/receipt" {
  capabilities       = ["read", "create", "update"]
  allowed_parameters = {
    "type"    = ["ed25519"]
    "derived" = ["false"]
  }
}

path "orgkeys-state/config" {
  capabilities = ["read", "create", "update"]
}

path "sys/audit" {
  capabilities = ["read", "sudo"]
}

path "sys/config/auditing/request-headers/x-correlation-id" {
  capabilities = ["read", "create", "update", "sudo"]
}

path "sys/config/state/sanitized" {
  capabilities = ["read"]
}

path "sys/policies/acl/orgkeys-service" {
  capabilities = ["read", "create", "update"]
}

path "sys/policies/acl/orgkeys-reaper" {
  capabilities = ["read", "create", "update"]
}

path "sys/auth/approle" {
  capabilities = ["read", "create", "update", "sudo"]
}

path "sys/auth/approle/tune" {
  capabilities = ["read", "create", "update", "sudo"]
}

path "auth/approle/role/orgkeys" {
  capabilities = ["read", "create", "update"]
}

path "auth/approle/role/orgkeys/role-id" {
  capabilities = ["read"]
}

path "auth/approle/role/orgkeys/secret-id" {
  capabilities = ["create", "update"]
}

# Whether the files that --credentials finds are still good.
path "auth/approle/role/orgkeys/secret-id/lookup" {
  capabilities = ["create", "update"]
}

path "sys/wrapping/lookup" {
  capabilities = ["update"]
}
