"""Runs `python -m MODULE COMMAND` in an interpreter that has loaded its libraries already.

    python -m deploy.local.warm LIBRARY MODULE COMMAND [COMMAND ...]

LIBRARY is imported at once; the commands run in turn when standard input ends, up to
the first that fails. The supervisor starts these while PostgreSQL still comes up and
lets each go on when what it needs is there: loading is most of a start's time.
"""

from __future__ import annotations

import gc
import importlib
import runpy
import sys


def main() -> None:
    """Load, wait, become the module."""
    library, module, *commands = sys.argv[1:]
    gc.disable()  # a fifth of the time to load goes into looking for garbage
    importlib.import_module(library)
    gc.enable()
    sys.stdin.read()
    for command in commands:
        sys.argv = [module, command]
        try:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        except SystemExit as end:
            if end.code:
                raise


if __name__ == "__main__":
    main()
