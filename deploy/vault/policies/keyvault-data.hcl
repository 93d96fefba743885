# What keyvault's data role may do: make data keys, open them, wrap them again.
# Nothing here creates, changes, exports or deletes a key: that is keyvault-admin.

path "transit/datakey/plaintext/byokeep-*" {
  capabilities = ["update"]
}

# One data key per request: a batch that fails in part answers with the others' plaintext
# inside an error.
path "transit/decrypt/byokeep-*" {
  capabilities       = ["update"]
  allowed_parameters = { "ciphertext" = [] }
  denied_parameters  = { "batch_input" = [] }
}

# Never returns a plaintext.
path "transit/rewrap/byokeep-*" {
  capabilities = ["update"]
}

# The audit log's anchor, and its checkpoints' signature. Every write needs check-and-set
# (setup.sh makes the engine demand it); older versions can't be removed from here.
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
