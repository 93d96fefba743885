"""What is noted of a call is read while the call lives."""

from __future__ import annotations

from types import SimpleNamespace

import grpc
import pytest

from services.common import observe


class Context:
    """A call; gRPC's own reads freed memory where it is asked who calls after its end."""

    ended = False

    def auth_context(self):
        assert not self.ended, "the process would die of a segmentation fault"
        return {"peer_spiffe_id": [b"spiffe://byokeep.test/client/a"]}

    def code(self):
        return None

    def invocation_metadata(self):
        return ()


@pytest.mark.parametrize("streams", [False, True])
async def test_nobody_asks_who_calls_once_the_call_has_ended(streams, caplog):
    """Shown to fail with `authz.presented_id` in `_Observed.__exit__`: a watch whose client is
    gone killed the orchestrator."""
    context = Context()

    async def one(request, context):
        context.ended = True
        return request

    async def many(request, context):
        yield request
        context.ended = True

    async def continuation(details):
        if streams:
            return grpc.unary_stream_rpc_method_handler(many)
        return grpc.unary_unary_rpc_method_handler(one)

    details = SimpleNamespace(method="/byokeep.test.v1.Service/Method")
    caplog.set_level("INFO")
    handler = await observe.Observe().intercept_service(continuation, details)
    if streams:
        assert [answer async for answer in handler.unary_stream(1, context)] == [1]
    else:
        assert await handler.unary_unary(1, context) == 1
    assert caplog.records[-1].byokeep_fields["caller"] == "spiffe://byokeep.test/client/a"
