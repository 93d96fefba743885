"""keyvault's SQL, as it is sent; each module has the statements of one part of keyvault."""
