"""What the failure of a call to another service becomes."""

from __future__ import annotations

import grpc
import pytest

from services.common.errors import from_rpc


class _Failed(grpc.RpcError):
    def __init__(self, code):
        self._code = code

    def code(self):
        return self._code

    def details(self):
        return "untold"

    def trailing_metadata(self):
        return ()


@pytest.mark.parametrize(
    ("code", "retried"),
    [(grpc.StatusCode.UNAVAILABLE, True), (grpc.StatusCode.DEADLINE_EXCEEDED, False)],
)
def test_who_did_not_answer_is_told_before_the_callers_own_deadline(code, retried):
    """A caller's gRPC would try again by itself, against what hangs until its own time is up."""
    error = from_rpc(_Failed(code), "keyvault")
    assert (error.reason, error.metadata) == ("DEPENDENCY_UNAVAILABLE", {"dependency": "keyvault"})
    pushback = dict(error.trailing_metadata()).get("grpc-retry-pushback-ms")
    assert pushback == (None if retried else "-1")
