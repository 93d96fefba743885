"""Protections removed one at a time, to see that each one's test notices."""
