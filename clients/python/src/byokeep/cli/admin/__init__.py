"""`byokeep admin`, `tenant` and `caller`: for operators."""
