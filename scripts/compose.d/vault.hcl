# Vault as docker-compose.yml runs it: server mode, file storage, TLS. The audit
# device is enabled by the set-up step, before anything else is.
storage "file" {
  path = "/vault/file"
}

listener "tcp" {
  address       = "0.0.0.0:8200"
  tls_cert_file = "/run/secrets/vault_cert"
  tls_key_file  = "/run/secrets/vault_key"
}

api_addr = "https://vault:8200"

# The container has no capabilities, so memory cannot be locked: the host's swap
# must be off or encrypted.
disable_mlock = true
