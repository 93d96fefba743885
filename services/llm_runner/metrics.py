"""What the runner's parent alone shows (see services.common.metrics)."""

from __future__ import annotations

from typing import Final

from prometheus_client import Gauge

from services.common.metrics import REGISTRY

PLACES: Final = Gauge(
    "byokeep_runner_places",
    "Attempts that the runner runs at once, and places that are free; none while it drains",
    ["state"],
    registry=REGISTRY,
)
