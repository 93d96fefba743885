"""Figures for Prometheus, on a port of their own.

Labels are bounded: methods of the protos, codes, names of our own; never a tenant, a key, a caller.
What only one service counts stands in its own `metrics.py`. The runner's children count nothing:
their parent does. Scrapes are answered in a thread, beside the event loop.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from functools import partial
from socketserver import ThreadingMixIn
from typing import Final
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    make_wsgi_app,
)

from services.common.config import ConfigError

REGISTRY: Final = CollectorRegistry()
#: Seconds. Eight at most: each is a series for each method, and a scrape costs by the series.
BUCKETS: Final = (0.005, 0.02, 0.1, 0.5, 2.0, 10.0, 60.0)

ProcessCollector(registry=REGISTRY)

RPCS: Final = Counter(
    "byokeep_rpcs",
    "Calls that ended, by method and gRPC code",
    ["method", "code"],
    registry=REGISTRY,
)
RPC_SECONDS: Final = Histogram(
    "byokeep_rpc_seconds",
    "Seconds that a call took in all; a stream's until its end",
    ["method"],
    buckets=BUCKETS,
    registry=REGISTRY,
)
REFUSALS: Final = Counter(
    "byokeep_refusals",
    "Calls that ended in a typed error, by method and reason",
    ["method", "reason"],
    registry=REGISTRY,
)
SERVING: Final = Gauge("byokeep_serving", "1 where health says SERVING, else 0", registry=REGISTRY)
BACKGROUND_DEATHS: Final = Counter(
    "byokeep_background_deaths",
    "Ends of work that has none of its own, by its name",
    ["task"],
    registry=REGISTRY,
)
DATABASE_CONNECTIONS: Final = Gauge(
    "byokeep_database_connections",
    "Connections of the pool that are there and free, and calls that wait for one",
    ["state"],
    registry=REGISTRY,
)
CERTIFICATE_EXPIRY: Final = Gauge(
    "byokeep_certificate_expiry_timestamp_seconds",
    "Unix time at which the certificate that the service presents ends",
    registry=REGISTRY,
)


def follow_pool(stats: Callable[[], Mapping[str, int]]) -> None:
    """Show a pool's connections: `stats` is psycopg_pool's `get_stats`."""
    shown = {"open": "pool_size", "free": "pool_available", "waiting": "requests_waiting"}
    for state, name in shown.items():
        DATABASE_CONNECTIONS.labels(state).set_function(partial(_figure, stats, name))


def _figure(stats: Callable[[], Mapping[str, int]], name: str) -> float:
    return stats().get(name, 0)


class _Server(ThreadingMixIn, WSGIServer):
    # As gRPC's own ports: who reserves one for a service may hold it until the service listens.
    allow_reuse_port = True
    daemon_threads = True


class _Handler(WSGIRequestHandler):
    timeout = 10  # of a scraper that says nothing

    def log_message(self, format: str, *args: object) -> None:
        """Log nothing: scrapes are no news."""


def serve(listen: str) -> Callable[[], None]:
    """Answer scrapes at `host:port`; return what ends that. Raises ConfigError."""
    host, _, port = listen.rpartition(":")
    try:
        server = make_server(
            host.strip("[]"), int(port), make_wsgi_app(REGISTRY), _Server, _Handler
        )
    except (OSError, ValueError):
        raise ConfigError("BYOKEEP_METRICS_LISTEN: can't listen there") from None
    thread = threading.Thread(target=server.serve_forever, name="metrics", daemon=True)
    thread.start()

    def end() -> None:
        server.shutdown()
        server.server_close()
        thread.join()

    return end
