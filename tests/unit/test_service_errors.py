"""What the failure of a call to another service becomes."""

from __future__ import annotations

import grpc
import pytest

from services.common.errors import ByokeepError, from_rpc


class _Failed(grpc.RpcError):
    def __init__(self, code, metadata=()):
        self._code, self._metadata = code, metadata

    def code(self):
        return self._code

    def details(self):
        return "untold"

    def trailing_metadata(self):
        return self._metadata


@pytest.mark.parametrize("code", [grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED])
def test_who_did_not_answer_is_named(code):
    error = from_rpc(_Failed(code), "keyvault")
    assert (error.reason, error.metadata) == ("DEPENDENCY_UNAVAILABLE", {"dependency": "keyvault"})


def test_a_typed_error_passes_unchanged():
    """When to try again too. Shown to fail: where the RetryInfo stays behind."""
    told = ByokeepError(
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        "INTAKE_LIMIT",
        "too many",
        retry_after_seconds=3600.0,
        limit="60",
    )
    passed = from_rpc(_Failed(told.code, told.trailing_metadata()), "keyvault")
    assert (passed.reason, passed.metadata, passed.retry_after_seconds) == (
        "INTAKE_LIMIT",
        {"limit": "60"},
        3600.0,
    )
