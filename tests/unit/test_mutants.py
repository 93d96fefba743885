"""The table of removals follows the code: `make mutants` is too long to be run each time."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.mutants import core, table, vault

_ROOT = Path(__file__).resolve().parents[2]
_MUTANTS = (*core.MUTANTS, *table.MUTANTS, *vault.MUTANTS)


@pytest.mark.parametrize("mutant", _MUTANTS, ids=lambda one: one.what)
def test_each_removal_still_applies(mutant):
    assert mutant.old in (_ROOT / mutant.file).read_text()
    for test in mutant.tests:
        file, _, name = test.partition("::")
        text = (_ROOT / file).read_text()
        assert not name or f"def {name.partition('[')[0]}(" in text
