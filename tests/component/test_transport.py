"""Which answers a channel asks again for by itself."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from byokeep.transport import channel_options

_SUBMIT = ("byokeep.orchestrator.v1.ReviewService", "SubmitReview")
_LEASE = ("byokeep.keyvault.v1.LeaseService", "LeaseKey")


@pytest.mark.parametrize(
    ("method", "code", "calls"),
    [
        (_SUBMIT, grpc.StatusCode.UNAVAILABLE, 2),
        # What a server that ends leaves of a call that came in its last moment.
        (_SUBMIT, grpc.StatusCode.CANCELLED, 2),
        (_SUBMIT, grpc.StatusCode.INTERNAL, 1),
        (_LEASE, grpc.StatusCode.UNAVAILABLE, 1),
        (_LEASE, grpc.StatusCode.CANCELLED, 1),
    ],
)
def test_a_call_that_a_server_lost_is_repeated_unless_it_redeems_a_grant(
    tmp_path, method, code, calls
):
    seen = []

    def answer(request: bytes, context: grpc.ServicerContext) -> bytes:
        seen.append(request)
        if len(seen) == 1:
            context.abort(code, "")
        return b"answer"

    service, name = method
    server = grpc.server(ThreadPoolExecutor(1))
    handler = grpc.unary_unary_rpc_method_handler(answer)
    server.add_generic_rpc_handlers(
        [grpc.method_handlers_generic_handler(service, {name: handler})]
    )
    address = f"unix:{tmp_path}/socket"
    server.add_insecure_port(address)
    server.start()
    try:
        with grpc.insecure_channel(address, options=channel_options("nobody")) as channel:
            call = channel.unary_unary(f"/{service}/{name}")
            if calls == 2:
                assert call(b"question", timeout=30) == b"answer"
            else:
                with pytest.raises(grpc.RpcError) as refused:
                    call(b"question", timeout=30)
                assert refused.value.code() == code
    finally:
        server.stop(None).wait()
    assert seen == [b"question"] * calls
