"""`byokeep audit`."""
