"""`python -m tests.mutants [FILTER]`: remove each protection in a copy, expect its test to fail.

`--generic N` takes N of the trust core's generic mutants instead, in the order of `--seed`. A mutant
that survives (its test still passes), or that no longer applies (the text that it replaces is gone),
fails the run; a generic one that survives may be equal to the code that it was made of.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.mutants import core, generic, table, vault
from tests.mutants.table import Mutant

_ROOT = Path(__file__).resolve().parents[2]
# Without tracebacks: pytest parses the source of each frame for one, and CPython 3.11 may then say
# "AST constructor recursion depth mismatch", which ends pytest with exit status 3.
_PYTEST = (sys.executable, "-m", "pytest", "-x", "-q", "--tb=no", "-p", "no:cacheprovider")
_IGNORED = shutil.ignore_patterns(".git", ".venv", "build", "__pycache__", ".*_cache", ".byokeep")


def _verdict(copy: Path, mutant: Mutant) -> str:
    path = copy / mutant.file
    original = path.read_text()
    if original.count(mutant.old) < 1:
        return "does not apply"
    path.write_text(original.replace(mutant.old, mutant.new))
    try:
        done = subprocess.run(
            [*_PYTEST, *mutant.tests],
            cwd=copy,
            env={**os.environ, "PYTHONPATH": f"{copy}:{copy}/clients/python/src"},
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return "timed out"
    finally:
        path.write_text(original)
    # 1: tests failed. Anything else (no test found, usage) is not what was meant.
    return {0: "SURVIVED", 1: "killed"}.get(done.returncode, f"pytest exit {done.returncode}")


def main() -> None:
    """Run every mutant whose file or test has the filter in its name."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutants")
    parser.add_argument("filter", nargs="?", default="", help="part of a file, a test or a name")
    parser.add_argument("--generic", type=int, default=0, metavar="N", help="so many generic ones")
    parser.add_argument("--seed", type=int, default=0, help="of the generic ones' order")
    asked = parser.parse_args()
    named = (*core.MUTANTS, *table.MUTANTS, *vault.MUTANTS)
    chosen = [
        one
        for one in (generic.mutants(asked.seed) if asked.generic else named)
        if asked.filter in f"{one.file} {one.tests} {one.what}"
    ]
    chosen = chosen[: asked.generic or None]
    bad = 0
    with tempfile.TemporaryDirectory(prefix="byokeep-mutants-") as folder:
        copy = Path(folder) / "tree"
        shutil.copytree(_ROOT, copy, ignore=_IGNORED)
        for mutant in chosen:
            verdict = _verdict(copy, mutant)
            bad += verdict not in ("killed", "timed out")
            print(f"{verdict:15} {mutant.file}: {mutant.what}", flush=True)
    print(f"{len(chosen) - bad} passed, {bad} failed")
    sys.exit(bad > 0)


if __name__ == "__main__":
    main()
