"""`byokeep key`, and `byokeep key trail`."""
