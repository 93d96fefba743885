"""A whole byokeep on one machine, for tests of what uses it.

    from byokeep.testing import Stack

    with Stack() as stack, stack.connect() as connection:
        stack.emulator.fault("rate_limited", provider="openai")
        connection.keys.ListKeys(...)

or, in a conftest.py, `from byokeep.testing.plugin import byokeep_stack`.

`pip install "byokeep[testing]"` brings the services, which run as processes with a PostgreSQL of
their own; no Docker, no Vault. In a byokeep checkout its own code is used.
"""

from __future__ import annotations

from byokeep.testing.stack import Stack

__all__ = ["Stack"]
