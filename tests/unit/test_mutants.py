"""The table of removals follows the code: `make mutants` is too long to be run each time."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.mutants import core, generic, table, vault

_ROOT = Path(__file__).resolve().parents[2]
_MUTANTS = (*core.MUTANTS, *table.MUTANTS, *vault.MUTANTS)


@pytest.mark.parametrize("mutant", _MUTANTS, ids=lambda one: one.what)
def test_each_removal_still_applies(mutant):
    assert mutant.old in (_ROOT / mutant.file).read_text()
    for test in mutant.tests:
        file, _, name = test.partition("::")
        text = (_ROOT / file).read_text()
        assert not name or f"def {name.partition('[')[0]}(" in text


def test_generic_mutants_are_python_and_differ_from_the_code():
    made = generic.mutants(1)
    assert [one.what for one in made] == [one.what for one in generic.mutants(1)]
    assert len(made) > 500
    for one in made[:50]:
        assert one.new != one.old
        ast.parse(one.new)
    assert all((_ROOT / test).exists() for test in made[0].tests)
