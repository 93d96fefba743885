"""`python -m byokeep.cli`."""

from __future__ import annotations

from byokeep.cli import main

main()
