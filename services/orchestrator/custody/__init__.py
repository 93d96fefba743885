"""What keyvault is asked for, and what is sealed or signed for it."""
