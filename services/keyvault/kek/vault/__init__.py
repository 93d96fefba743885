"""Backend `vault`: KEKs are keys of Vault's Transit engine (HashiCorp Vault or OpenBao)."""
