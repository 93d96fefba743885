"""Resource names: `tenants/{tenant}/providerKeys/{key}` and its like."""

from __future__ import annotations

from byokeep.common.v1 import options_pb2

_PROVIDERS = {
    "openai": options_pb2.PROVIDER_OPENAI,
    "anthropic": options_pb2.PROVIDER_ANTHROPIC,
    "gemini": options_pb2.PROVIDER_GEMINI,
}
PROVIDERS = tuple(_PROVIDERS)


def tenant_name(tenant: str) -> str:
    """Return `tenants/{tenant}`."""
    return f"tenants/{tenant}"


def key_name(tenant: str, key_id: str) -> str:
    """Return `tenants/{tenant}/providerKeys/{key_id}`."""
    return f"tenants/{tenant}/providerKeys/{key_id}"


def review_name(tenant: str, review_id: str) -> str:
    """Return `tenants/{tenant}/reviews/{review_id}`."""
    return f"tenants/{tenant}/reviews/{review_id}"


def tenant_of(name: str) -> str:
    """Return the tenant's id of a resource name whose form is already validated."""
    return name.split("/", 2)[1]


def last_of(name: str) -> str:
    """Return the last id of a resource name whose form is already validated."""
    return name.rsplit("/", 1)[1]


def provider_value(provider: str) -> options_pb2.Provider.ValueType:
    """Return the enum value of `openai`, `anthropic` or `gemini`. Raises KeyError."""
    return _PROVIDERS[provider]


def provider_id(value: options_pb2.Provider.ValueType) -> str:
    """Return `openai`, `anthropic` or `gemini` for an enum value. Raises KeyError."""
    return {known: name for name, known in _PROVIDERS.items()}[value]
