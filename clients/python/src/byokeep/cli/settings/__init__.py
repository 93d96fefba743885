"""A tenant's settings: `byokeep model`, `limit` and `policy`."""
