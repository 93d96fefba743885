"""What keyvault alone counts (see services.common.metrics)."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from prometheus_client import Counter, Gauge, Histogram

from services.common.metrics import BUCKETS, REGISTRY

ANCHOR_AGE: Final = Gauge(
    "byokeep_audit_anchor_age_seconds",
    "Seconds since the audit log was last anchored; no lease is given where it is too old",
    registry=REGISTRY,
)
ROLLED_BACK: Final = Gauge(
    "byokeep_database_rolled_back",
    "1 where the database is not what its anchor says; an operator's word ends it",
    registry=REGISTRY,
)
_KEK_CALLS: Final = Counter(
    "byokeep_kek_calls",
    "Calls to a KEK backend outside of this process, by whether it answered",
    ["backend", "outcome"],
    registry=REGISTRY,
)
_KEK_SECONDS: Final = Histogram(
    "byokeep_kek_call_seconds",
    "Seconds that a call to a KEK backend took",
    ["backend"],
    buckets=BUCKETS,
    registry=REGISTRY,
)


@contextmanager
def kek_call(backend: str) -> Iterator[None]:
    """Count a call to a backend; an exception means that it did not answer."""
    start = time.perf_counter()
    outcome = "failed"
    try:
        yield
        outcome = "answered"
    finally:
        _KEK_SECONDS.labels(backend).observe(time.perf_counter() - start)
        _KEK_CALLS.labels(backend, outcome).inc()
