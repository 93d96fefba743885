"""Runs a service: checks, hardening, mTLS server, health port, drain."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, Protocol

import grpc
import uvloop
from byokeep.identity import IdentityError
from byokeep.transport import MAX_MESSAGE_BYTES
from grpc_health.v1 import health_pb2

from services.common import authz, hardening, load, logs, metrics, tracing
from services.common.background import Background
from services.common.config import ConfigError, ServiceSettings, check_folder, check_listen
from services.common.errors import ByokeepError
from services.common.interceptor import Gate
from services.common.observe import Observe
from services.common.tls import ServerIdentity
from services.common.waiting import NotYetError

log = logging.getLogger(__name__)
_HEALTH_SECONDS = 1.0
# Somebody waits for the first time that it is well.
_FIRST_HEALTH_SECONDS = 0.05
_HEALTH_BYTES = 1024
_HEALTH_AGE_MS = 30_000
# A service that can't even say so within this time is not well.
_MISSING_SECONDS = 5.0
# What does not end by itself, when all is told to, is ended with the process.
_LAST_SECONDS = 3.0
# EX_CONFIG and EX_TEMPFAIL of sysexits.h.
EXIT_CONFIG, EXIT_NOT_YET = 78, 75
#: What the health port is asked for liveness: that the process answers, whatever it depends on.
LIVE = "live"

_OPTIONS: list[tuple[str, int]] = [
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_concurrent_streams", 256),
    # Without it what nobody reads yet stays within 64 KiB of each call.
    ("grpc.http2.bdp_probe", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
]


class App(Protocol):
    """What a service brings. It may also have `authorize` and `denied` (see interceptor), and
    `drain`: a function that lets its endless streams end, called before the server stops."""

    #: What it does beside its calls; nothing of it may be down for health to be SERVING.
    background: Background

    async def start(self) -> None:
        """Open what the service needs, and wait for what may still come (see `waiting`).

        Raises:
            ConfigError: what there is shows that a setting is wrong.
        """

    def register(self, server: grpc.aio.Server) -> None:
        """Add its servicers."""

    async def missing(self) -> list[str]:
        """Name what the service can't work without and has not got now: health says SERVING
        where that is nothing."""

    async def stop(self) -> None:
        """Close everything that is open, after the last call ended: also where `start` did not
        end, and within seconds, whatever is away."""


class _Registrar:
    """Takes servicers for the server, and learns which services there are."""

    def __init__(self) -> None:
        self.handlers: list[grpc.ServiceRpcHandler] = []

    @property
    def services(self) -> list[str]:
        """Names of the services."""
        return [handler.service_name() for handler in self.handlers]

    def add_generic_rpc_handlers(self, handlers: Any) -> None:
        self.handlers += handlers

    def add_registered_method_handlers(self, service: str, handlers: Any) -> None:
        # Not taken. gRPC's server waits for the next call of each registered method by itself,
        # all of them anew at each call; the generic handlers, added as well, have the same methods.
        # Stubs of older tools, which a wheel has, add generic ones alone.
        pass


def main(name: str, settings: ServiceSettings, make: Callable[[], App]) -> None:
    """Serve until SIGTERM. Exits with EX_CONFIG where a setting is wrong.

    `make` builds the app, which checks its settings and opens nothing; it may read secret files:
    the door is closed before it is called.
    """
    with refusing(name), asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        close_the_door()
        logs.setup(name, settings.log_level)
        logs.catch_all()
        app = make()
        check(settings)
        try:
            runner.run(_serve(name, settings, app))
        finally:
            _end_soon()


def close_the_door() -> None:
    """See `hardening`. Raises ConfigError where the kernel refused."""
    try:
        hardening.close_the_door()
    except OSError as error:
        raise ConfigError(
            f"this process can't be closed to others of its user ({error}):"
            " allow prctl(2) and setrlimit(2) in its sandbox"
        ) from None


@contextlib.contextmanager
def refusing(name: str) -> Iterator[None]:
    """Where a setting is wrong, or what is needed is not there, tell a person so, and exit."""
    said, status = "", 0
    try:
        yield
    except (ConfigError, IdentityError) as error:
        said, status = str(error), EXIT_CONFIG
    except NotYetError as error:
        said, status = str(error), EXIT_NOT_YET
    if status:
        print(f"{name} does not start:\n{said}", file=sys.stderr)  # noqa: T201 for a person
        sys.exit(status)


def _end_soon() -> None:
    """End the process in any case: what still hangs (a thread in a name's resolution, a task that
    takes no cancellation) is not waited for."""
    timer = threading.Timer(_LAST_SECONDS, os._exit, (1,))
    timer.daemon = True
    timer.start()


def check(settings: ServiceSettings) -> None:
    """Refuse, before anything is opened, what the server would stumble over. Raises ConfigError."""
    authz.CallerClasses(settings.callers, settings.trust_domain)
    ServerIdentity(settings.tls)
    if settings.listen == settings.health_listen:
        raise ConfigError("BYOKEEP_LISTEN and BYOKEEP_HEALTH_LISTEN are the same address")
    check_listen("BYOKEEP_LISTEN", settings.listen)
    check_listen("BYOKEEP_HEALTH_LISTEN", settings.health_listen)
    if settings.metrics_listen:
        check_listen("BYOKEEP_METRICS_LISTEN", settings.metrics_listen)
    tracing.check(settings.otlp_endpoint, settings.otlp_ca)
    if settings.ready_file is not None:
        check_folder("BYOKEEP_READY_FILE", settings.ready_file)


async def build(settings: ServiceSettings, app: App) -> tuple[grpc.aio.Server, int]:
    """Return the mTLS server, not yet started, and its port; servicers are behind the gate."""
    gate = Gate(
        authz.CallerClasses(settings.callers, settings.trust_domain),
        getattr(app, "authorize", None),
        getattr(app, "denied", None),
    )
    # Identities are checked at the handshake: a connection must not outlive them for long.
    age = [
        ("grpc.max_connection_age_ms", settings.connection_age_seconds * 1000),
        ("grpc.max_connection_age_grace_ms", settings.connection_grace_seconds * 1000),
    ]
    registrar = _Registrar()
    app.register(registrar)  # type: ignore[arg-type]
    methods = [method for service in registrar.services for method in authz.methods_of(service)]
    for method in methods:
        authz.declared_access(method)
    # gRPC refuses what is larger by its length, before it takes it in.
    largest = max(load.declared(method).request_bytes for method in methods)
    size = [("grpc.max_receive_message_length", largest)]
    server = grpc.aio.server(interceptors=[Observe(), gate], options=_OPTIONS + age + size)
    server.add_generic_rpc_handlers(registrar.handlers)
    identity = ServerIdentity(settings.tls)
    metrics.CERTIFICATE_EXPIRY.set_function(identity.expiry)
    credentials = identity.credentials()
    try:
        port = server.add_secure_port(settings.listen, credentials)
    except RuntimeError:
        raise ConfigError(f"BYOKEEP_LISTEN: can't listen at {settings.listen}") from None
    return server, port


async def _serve(name: str, settings: ServiceSettings, app: App) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    server: grpc.aio.Server | None = None
    status, health_server = await _health(settings.health_listen)
    end_traces = _traces(name, settings)
    end_metrics = metrics.serve(settings.metrics_listen) if settings.metrics_listen else None
    try:
        if await _until(stop, app.start()):
            server, _ = await build(settings, app)
            await server.start()
            health = Background()
            health.run("health", _Health(app, health, status, settings).follow)
            # What is loaded stays: the collector need not look through it again and again.
            gc.collect()
            gc.freeze()
            logs.event(log, "serving", listen=settings.listen, deployment=settings.deployment)
            await stop.wait()
            await health.close()
        logs.event(log, "draining")
        getattr(app, "drain", lambda: None)()
        status.value = health_pb2.HealthCheckResponse.NOT_SERVING
    finally:
        if server is not None:
            await server.stop(settings.call_drain_seconds)
        await app.stop()
        await health_server.stop(None)
        for end in (end_metrics, end_traces):
            if end is not None:
                end()
    logs.event(log, "stopped")


async def _until(stop: asyncio.Event, work: Coroutine[Any, Any, None]) -> bool:
    """Do some work to its end, unless it is time to stop first; raises what it raises."""
    doing = asyncio.create_task(work)
    stopping = asyncio.create_task(stop.wait())
    await asyncio.wait({doing, stopping}, return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    if stop.is_set():
        doing.cancel()
        await asyncio.wait({doing}, timeout=_LAST_SECONDS)
        return False
    doing.result()
    return True


def _traces(name: str, settings: ServiceSettings) -> Callable[[], None] | None:
    if not settings.otlp_endpoint:
        return None
    return tracing.start(name, settings.deployment, settings.otlp_endpoint, settings.otlp_ca)


class _Health:
    """Lets the health port say what the service says of itself."""

    def __init__(
        self,
        app: App,
        own: Background,
        status: _Status,
        settings: ServiceSettings,
    ) -> None:
        self._app, self._own, self._status = app, own, status
        self._ready_file = settings.ready_file
        self._known: list[str] | None = None
        self._was_well = False

    async def follow(self) -> None:
        """Look for ever."""
        while True:
            await self._look()
            await asyncio.sleep(_HEALTH_SECONDS if self._was_well else _FIRST_HEALTH_SECONDS)

    async def _look(self) -> None:
        missing = ["an answer"]
        with contextlib.suppress(ByokeepError, TimeoutError):
            async with asyncio.timeout(_MISSING_SECONDS):
                missing = await self._app.missing()
        missing += self._app.background.down() + self._own.down()
        metrics.SERVING.set(not missing)
        self._was_well |= not missing
        if missing == self._known:
            return
        self._known = missing
        level = logging.ERROR if missing else logging.INFO
        logs.event(log, "health", level=level, serving=not missing, missing=missing)
        code = health_pb2.HealthCheckResponse
        self._status.value = code.NOT_SERVING if missing else code.SERVING
        if self._ready_file is not None and not missing:
            # Whole or not at all: somebody waits for it.
            temporary = self._ready_file.with_suffix(".new")
            temporary.write_text(json.dumps({"pid": os.getpid()}))
            temporary.replace(self._ready_file)
            self._ready_file = None


class _Status:
    """What the health port says: `Check` alone. A `Watch` has no end, and anybody can reach the
    port: they would keep probes out."""

    def __init__(self) -> None:
        self.value = health_pb2.HealthCheckResponse.NOT_SERVING

    async def check(
        self, request: health_pb2.HealthCheckRequest, context: Any
    ) -> health_pb2.HealthCheckResponse:
        if request.service not in ("", LIVE):
            await context.abort(grpc.StatusCode.NOT_FOUND, "no such service")
        serving = health_pb2.HealthCheckResponse.SERVING
        return health_pb2.HealthCheckResponse(status=serving if request.service else self.value)


async def _health(listen: str) -> tuple[_Status, grpc.aio.Server]:
    # Kubernetes probes have no client certificate: health alone is served in the clear. Nobody is
    # told apart there, so that no number of calls is refused; each is small, and soon cut off.
    options = [
        ("grpc.max_receive_message_length", _HEALTH_BYTES),
        ("grpc.max_concurrent_streams", 8),
        ("grpc.max_connection_age_ms", _HEALTH_AGE_MS),
        ("grpc.max_connection_age_grace_ms", _HEALTH_AGE_MS),
    ]
    server = grpc.aio.server(options=options)
    status = _Status()
    check = grpc.unary_unary_rpc_method_handler(
        status.check,
        health_pb2.HealthCheckRequest.FromString,
        health_pb2.HealthCheckResponse.SerializeToString,
    )
    server.add_generic_rpc_handlers(
        [grpc.method_handlers_generic_handler("grpc.health.v1.Health", {"Check": check})]
    )
    try:
        server.add_insecure_port(listen)
    except RuntimeError:
        raise ConfigError(f"BYOKEEP_HEALTH_LISTEN: can't listen at {listen}") from None
    await server.start()
    return status, server
