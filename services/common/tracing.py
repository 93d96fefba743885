"""Spans over the whole path of a review: off unless `BYOKEEP_OTLP_ENDPOINT` is set.

A span has a name of ours, ids, counts and codes: never a key, content, or an error's text. Context
goes from service to service as W3C `traceparent` metadata (https://www.w3.org/TR/trace-context/).
The runner's children make no spans: their parent does, from what they tell it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, Final

from services.common.config import ConfigError

TRACEPARENT: Final = "traceparent"
_EXPORT_SECONDS: Final = 5

# OpenTelemetry's modules are loaded where spans are wanted only: 8 MB, and 21 µs a span.
_trace: ModuleType | None = None
_tracer: Any = None
_propagator: Any = None


def check(endpoint: str, ca: Path | None) -> None:
    """Refuse a wrong `BYOKEEP_OTLP_ENDPOINT` or `BYOKEEP_OTLP_CA`. Raises ConfigError."""
    scheme, _, address = endpoint.partition("://")
    if endpoint and (scheme not in ("http", "https") or not address.rpartition(":")[2].isdigit()):
        raise ConfigError("BYOKEEP_OTLP_ENDPOINT: http://host:port or https://host:port is allowed")
    if ca is not None and not ca.is_file():
        raise ConfigError("BYOKEEP_OTLP_CA: there is no such file")


def start(service: str, deployment: str, endpoint: str, ca: Path | None) -> Callable[[], None]:
    """Send spans to an OTLP collector (gRPC); return what sends the last ones and ends it.

    Endpoint and CA file are checked (see `check`).
    """
    global _trace, _tracer, _propagator
    scheme, _, address = endpoint.partition("://")
    import grpc
    from opentelemetry import trace
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    roots = ca.read_bytes() if ca is not None else None
    exporter = OTLPSpanExporter(
        endpoint=address,
        insecure=scheme == "http",
        credentials=None if scheme == "http" else grpc.ssl_channel_credentials(roots),
        timeout=_EXPORT_SECONDS,
    )
    resource = Resource({"service.name": f"byokeep-{service}", "byokeep.deployment": deployment})
    provider = TracerProvider(resource=resource)
    provider.add_span_processor(BatchSpanProcessor(exporter))
    _trace, _tracer = trace, provider.get_tracer("byokeep")
    _propagator = TraceContextTextMapPropagator()
    return provider.shutdown


@contextlib.contextmanager
def span(
    name: str, *, parent: str = "", server: bool = False, **attributes: str | int
) -> Iterator[Any]:
    """Make what is done inside a span, under the current one or under a `traceparent`.

    Yields it, or None where spans are off. An exception marks it as failed by its type alone.
    """
    if _tracer is None or _trace is None:
        yield None
        return
    context = _propagator.extract({TRACEPARENT: parent}) if parent else None
    kind = _trace.SpanKind.SERVER if server else _trace.SpanKind.INTERNAL
    with _tracer.start_as_current_span(
        name,
        context=context,
        kind=kind,
        attributes=attributes,
        record_exception=False,
        set_status_on_exception=False,
    ) as made:
        try:
            yield made
        except Exception as error:
            fail(made, type(error).__name__)
            raise


def begin(name: str, **attributes: str | int) -> Any:
    """Return a span under the current one that `end` ends, or None where spans are off."""
    return None if _tracer is None else _tracer.start_span(name, attributes=attributes)


def end(made: Any) -> None:
    """End what `begin` returned; nothing where it has ended."""
    if made is not None and made.is_recording():
        made.end()


def fail(made: Any, why: str) -> None:
    """Mark a span as failed; `why` is a code, a reason or a type, never a text."""
    if made is not None and _trace is not None:
        made.set_status(_trace.StatusCode.ERROR, why)


def traceparent() -> str:
    """Return the current span as `traceparent`; empty where there is none."""
    if _propagator is None:
        return ""
    carrier: dict[str, str] = {}
    _propagator.inject(carrier)
    return carrier.get(TRACEPARENT, "")


def trace_id() -> str:
    """Return the id of the current trace, for log lines; empty where there is none."""
    if _trace is None:
        return ""
    context = _trace.get_current_span().get_span_context()
    return f"{context.trace_id:032x}" if context.is_valid else ""


def parent_in(metadata: Mapping[str, str | bytes]) -> str:
    """Return the `traceparent` that a caller sent, if spans are on."""
    value = metadata.get(TRACEPARENT, "") if _tracer is not None else ""
    return value if isinstance(value, str) else ""
