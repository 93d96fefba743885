"""What keyvault does beside its calls, level-triggered: it follows from tenants' states alone."""
