"""SQL of keyvault: rows in and out, no rules."""
