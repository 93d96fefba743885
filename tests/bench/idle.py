"""idle_mb: PSS of the three services at rest, with their helpers (zygote)."""

from __future__ import annotations

import time
from pathlib import Path

from byokeep.testing import Stack

from tests.bench.processes import SERVICES, family
from tests.bench.results import Row


def _pss_mb(pid: int) -> float:
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    line = next(one for one in text.splitlines() if one.startswith("Pss:"))
    return int(line.split()[1]) / 1024


def run(stack: Stack) -> list[Row]:
    """Measure a stack that has done nothing yet."""
    time.sleep(2)
    detail: dict[str, float] = {}
    for name in SERVICES:
        detail[name] = round(sum(_pss_mb(one.pid) for one in family(stack, name)), 1)
    return [Row("idle_mb", sum(detail.values()), "MB", dict(detail))]
