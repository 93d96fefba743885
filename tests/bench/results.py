"""A row of results, and how it is shown."""

from __future__ import annotations

import json
import platform
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

#: What each figure is meant to be on a quiet machine (docs/decisions/0011-figures.md).
GOALS = {
    "lease_cpu_ratio": ("<=", 4.0),
    "lease_p99_ratio": ("<=", 8.0),
    "lease_scale_ratio": ("<=", 1.2),
    "review_overhead_p50_ms": ("<=", 60.0),
    "review_overhead_p99_ms": ("<=", 250.0),
    "noop_reviews_per_s": (">=", 44.0),
    "submit_p99_ms": ("<=", 25.0),
    "fair_admissions_before": ("<=", 1.0),
    "recovery_s": ("<=", 15.0),
    "stall_ms": ("<=", 500.0),
    "lease_vault_ratio": ("<=", 1.3),
    "rewrap_vault_ratio": (">=", 0.8),
    "idle_mb": ("<=", 300.0),
    "rewrap_keys_per_s": (">=", 10_000.0),
    "run_warm_s": ("<=", 6.0),
    "audit_verify_events_per_s": (">=", 50_000.0),
    "change_ms": ("<=", 25.0),
    "start_s": ("<=", 10.0),
}


@dataclass(frozen=True, slots=True)
class Row:
    """One figure: its name, value, unit, and what else belongs to it."""

    name: str
    value: float
    unit: str
    detail: dict[str, Any] = field(default_factory=dict)


def percentile(values: list[float], share: float) -> float:
    """Return the value below which a share of the values lies (nearest rank)."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def write(rows: list[Row], path: Path) -> None:
    """Write `[{name, value, unit, detail}]`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")


def show(rows: list[Row]) -> None:
    """Print a table with the goals beside the figures."""
    print(f"{'figure':28} {'value':>12} {'unit':10} goal on a quiet machine")
    for row in rows:
        goal = GOALS.get(row.name)
        verdict = ""
        if goal is not None:
            met = row.value <= goal[1] if goal[0] == "<=" else row.value >= goal[1]
            verdict = f"{goal[0]} {goal[1]:g}  {'met' if met else 'NOT MET'}"
        print(f"{row.name:28} {row.value:12.2f} {row.unit:10} {verdict}")
    print(f"on {platform.machine()}, Python {platform.python_version()}")
