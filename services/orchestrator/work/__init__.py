"""Attempts: who runs next, on which runner, and what follows."""
