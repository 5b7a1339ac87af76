# What deleting left-behind keys needs. Loaded as "orgkeys-reaper" by
# vault/setup. The reaper runs inside the service, which alone knows what
# generations are under way, so the service's role has both policies; this one is
# apart because listing the keys is needed for nothing else.

path "orgkeys/keys" {
  capabilities = ["list"]
}

path "orgkeys/keys/+" {
  capabilities = ["read", "delete"]
}

path "orgkeys/keys/+/config" {
  capabilities       = ["update"]
  allowed_parameters = {
    "deletion_allowed" = [true]
  }
}

path "orgkeys-sealed/keys" {
  capabilities = ["list"]
}

path "orgkeys-sealed/keys/+" {
  capabilities = ["read", "delete"]
}

path "orgkeys-sealed/keys/+/config" {
  capabilities       = ["update"]
  allowed_parameters = {
    "deletion_allowed" = [true]
  }
}
