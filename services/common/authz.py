"""Who calls, and may they: SPIFFE ID → caller classes → the method's declared callers."""

from __future__ import annotations

import contextvars
import re
from dataclasses import dataclass
from typing import Any

import grpc
from byokeep.common.v1 import options_pb2
from google.protobuf import descriptor_pool

from services.common.config import ConfigError
from services.common.errors import ByokeepError

# SPIFFE-ID.md, 2.1 to 2.4: lower-case trust domain, path of non-empty segments.
_SPIFFE_ID = re.compile(r"spiffe://([a-z0-9._-]+)((?:/[A-Za-z0-9._-]+)+)")
_REMEMBERED = 10_000
_CLASSES = {
    name.removeprefix("CALLER_CLASS_").lower(): value
    for name, value in options_pb2.CallerClass.items()
    if value
}


@dataclass(frozen=True, slots=True)
class Caller:
    """The identity of a caller, from its certificate alone."""

    spiffe_id: str
    classes: frozenset[int]


_presented: contextvars.ContextVar[str] = contextvars.ContextVar("byokeep_presented", default="")
_current: contextvars.ContextVar[Caller] = contextvars.ContextVar("byokeep_caller")


def current() -> Caller:
    """Return the caller of the RPC that is being handled."""
    return _current.get()


def enter(caller: Caller) -> None:
    """Make a caller current for the handler's own context."""
    _current.set(caller)


def presented_id(context: grpc.aio.ServicerContext[Any, Any]) -> str:
    """Return the SPIFFE ID of a connection's verified certificate, or an empty text.

    gRPC sets `peer_spiffe_id` only where the certificate has exactly one URI name. To be asked
    where a call begins: once it has ended, gRPC reads memory that is gone, and the process dies.
    """
    values = tuple(context.auth_context().get("peer_spiffe_id") or ())
    _presented.set(values[0].decode("ascii", "replace") if len(values) == 1 else "")
    return presented()


def presented() -> str:
    """Return what `presented_id` found for the RPC that is being handled."""
    return _presented.get()


class CallerClasses:
    """Caller classes by configured SPIFFE ID patterns; who matches none has no class."""

    def __init__(self, configured: str, trust_domain: str) -> None:
        """Parse `class=spiffe-pattern` pairs separated by blanks. Raises ConfigError."""
        self._trust_domain = trust_domain
        self._patterns: list[tuple[int, str]] = []
        self._known: dict[str, Caller] = {}
        for pair in configured.split():
            name, _, pattern = pair.partition("=")
            if name not in _CLASSES or not pattern.startswith(f"spiffe://{trust_domain}/"):
                raise ConfigError(
                    f"BYOKEEP_CALLERS: each pair is class=spiffe://{trust_domain}/path,"
                    f" with class one of {', '.join(_CLASSES)}"
                )
            self._patterns.append((_CLASSES[name], pattern))
        if not self._patterns:
            raise ConfigError("BYOKEEP_CALLERS allows nobody")

    def identify(self, spiffe_id: str) -> Caller:
        """Return the caller with a presented SPIFFE ID. Raises ByokeepError: IDENTITY_INVALID."""
        known = self._known.get(spiffe_id)
        if known is not None:
            return known
        match = _SPIFFE_ID.fullmatch(spiffe_id)
        if match and match[1] == self._trust_domain:
            caller = Caller(spiffe_id, self._classes_of(spiffe_id))
            # Only identities that some pattern knows are remembered, and not without bound.
            if caller.classes and len(self._known) < _REMEMBERED:
                self._known[spiffe_id] = caller
            return caller
        raise ByokeepError(
            grpc.StatusCode.UNAUTHENTICATED,
            "IDENTITY_INVALID",
            "the certificate has no single SPIFFE ID of this trust domain",
        )

    def _classes_of(self, spiffe_id: str) -> frozenset[int]:
        return frozenset(
            value
            for value, pattern in self._patterns
            if spiffe_id == pattern
            # The last part alone: `/*` stands for no path of several.
            or (pattern.endswith("/*") and spiffe_id.rpartition("/")[0] == pattern[:-2])
        )


def descriptor_of(method: str) -> Any:
    """Return the descriptor of `/package.Service/Method`."""
    service_name, _, method_name = method.strip("/").partition("/")
    service = descriptor_pool.Default().FindServiceByName(service_name)
    return service.methods_by_name[method_name]


def declared_access(method: str) -> options_pb2.Access:
    """Return who may call `/package.Service/Method`. Raises ConfigError where nobody may."""
    access: options_pb2.Access = descriptor_of(method).GetOptions().Extensions[options_pb2.access]
    if not access.callers or options_pb2.CALLER_CLASS_UNSPECIFIED in access.callers:
        raise ConfigError(f"{method} declares no callers; refusing to serve it")
    return access


def named_tenant(request: Any) -> str:
    """Return the tenant that a request names, whether it exists or not; empty where it names none.
    What is not a tenant's own, such as the chain `system`, stands under its own name."""
    fields = request.DESCRIPTOR.fields_by_name
    named = ("parent", "name", "tenant")
    name: str = next((getattr(request, field) for field in named if field in fields), "")
    if "settings" in fields:
        name = request.settings.name
    return name.removeprefix("tenants/").partition("/")[0]


def methods_of(service_name: str) -> list[str]:
    """Return every `/package.Service/Method` of a service."""
    service = descriptor_pool.Default().FindServiceByName(service_name)
    return [f"/{service_name}/{method.name}" for method in service.methods]


def check_class(caller: Caller, access: options_pb2.Access, method: str) -> None:
    """Refuse a caller whose classes the method does not allow. Raises ByokeepError."""
    if not caller.classes.intersection(access.callers):
        name = method.rsplit("/", 1)[1]
        raise ByokeepError(
            grpc.StatusCode.PERMISSION_DENIED,
            "CALLER_NOT_ALLOWED",
            f"this identity may not call {name}",
            method=name,
        )
