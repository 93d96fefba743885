# What keyvault's admin role may do: create, rotate, trim and delete keys of tenants and of
# epochs. It can open none of them. allowed_parameters keeps out exportable and
# allow_plaintext_backup, and, since both need a ciphertext, import and import_version.

path "transit/keys/byokeep-tenant-*" {
  capabilities = ["read", "update", "delete"]
  allowed_parameters = {
    "type"                   = ["aes256-gcm96"]
    "min_decryption_version" = []
    "min_encryption_version" = []
    "min_available_version"  = []
    "deletion_allowed"       = []
  }
}
path "transit/keys/byokeep-intake-*" {
  capabilities = ["read", "update", "delete"]
  allowed_parameters = {
    "type"                   = ["aes256-gcm96"]
    "min_decryption_version" = []
    "min_encryption_version" = []
    "min_available_version"  = []
    "deletion_allowed"       = []
  }
}
path "transit/keys/byokeep-content-*" {
  capabilities = ["read", "update", "delete"]
  allowed_parameters = {
    "type"                   = ["aes256-gcm96"]
    "min_decryption_version" = []
    "min_encryption_version" = []
    "min_available_version"  = []
    "deletion_allowed"       = []
  }
}

# The key of keyvault's own keys is never deleted by keyvault.
path "transit/keys/byokeep-system" {
  capabilities       = ["read", "update"]
  allowed_parameters = { "type" = ["aes256-gcm96"] }
}
path "transit/keys/byokeep-system/rotate" {
  capabilities = ["update"]
}
path "transit/keys/byokeep-system/config" {
  capabilities       = ["update"]
  allowed_parameters = { "min_decryption_version" = [], "min_encryption_version" = [] }
}
path "transit/keys/byokeep-system/trim" {
  capabilities       = ["update"]
  allowed_parameters = { "min_available_version" = [] }
}

# keyvault's own keys (state MAC, intake signing, audit log): they open no provider key, and
# the admin role writes states and audit events as well.
path "transit/datakey/plaintext/byokeep-system" {
  capabilities = ["update"]
}
path "transit/decrypt/byokeep-system" {
  capabilities       = ["update"]
  allowed_parameters = { "ciphertext" = [] }
  denied_parameters  = { "batch_input" = [] }
}

path "byokeep/data/anchor" {
  capabilities = ["create", "update", "read"]
}
path "transit/sign/byokeep-checkpoint" {
  capabilities = ["update"]
}
path "transit/keys/byokeep-checkpoint" {
  capabilities = ["read"]
}

path "auth/token/renew-self" {
  capabilities = ["update"]
}
path "auth/token/lookup-self" {
  capabilities = ["read"]
}
