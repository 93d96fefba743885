"""The table of settings follows the code."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from services.keyvault import config as keyvault
from services.llm_runner import config as runner
from services.orchestrator import config as orchestrator

_TABLE = Path(__file__).resolve().parents[2] / "docs/decisions/0001-module-map.md"


@pytest.mark.parametrize("module", [keyvault, orchestrator, runner])
def test_each_setting_is_in_the_table(module):
    text = _TABLE.read_text()
    for prefix in ("BYOKEEP_TENANT_LEASES", "BYOKEEP_KEY_LEASES"):
        text += f"`{prefix}_PER_MINUTE` `{prefix}_PER_DAY`"  # written shorter there
    names = [f"BYOKEEP_{one.name.upper()}" for one in dataclasses.fields(module.Settings)]
    assert [name for name in names if f"`{name}`" not in text] == []
