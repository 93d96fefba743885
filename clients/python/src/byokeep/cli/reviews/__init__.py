"""`byokeep review`."""
