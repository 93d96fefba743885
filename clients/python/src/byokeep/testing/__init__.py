"""A whole byokeep on one machine, for tests of what uses it.

    from byokeep.testing import Stack

    with Stack() as stack, stack.connect() as connection:
        stack.emulator.fault("rate_limited", provider="openai")
        connection.keys.ListKeys(...)

or, in a conftest.py, `from byokeep.testing.plugin import byokeep_stack`.

It needs a byokeep checkout with its `.venv` (`make setup`): the stack's code is
`deploy.local` there. Run the tests with that checkout in `PYTHONPATH`.
"""

from __future__ import annotations

from byokeep.testing.stack import Stack

__all__ = ["Stack"]
