"""Traces: one over the whole path of a review, with ids and codes and nothing else."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from byokeep import CallError
from byokeep.orchestrator.v1 import review_pb2
from byokeep.testing import Stack
from byokeep.testing.canary import forms
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc

from deploy.local.processes import wait_for
from tests.harness import tenants

SERVICES = ("keyvault", "orchestrator", "runner")
# What the test chooses to be traced as: its own trace, as a caller's would be.
TRACE = "0af7651916cd43dd8448eb211c80319c"
PARENT = f"00-{TRACE}-b7ad6b7169203331-01"
PATH = {
    "orchestrator.v1.ReviewService/SubmitReview",
    "keyvault.v1.ContentKeyService/GetContentKey",
    "attempt",
    "runner.v1.RunnerService/Execute",
    "keyvault.v1.LeaseService/LeaseKey",
    "unwrap",
    "provider call",
    "keyvault.v1.LeaseService/ReleaseLease",
}


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """Keeps the spans that services send, serialized as they came."""

    def __init__(self) -> None:
        self.requests: list[trace_service_pb2.ExportTraceServiceRequest] = []

    def Export(self, request, context):
        self.requests.append(request)
        return trace_service_pb2.ExportTraceServiceResponse()

    def spans(self):
        return [
            span
            for request in list(self.requests)
            for resource in request.resource_spans
            for scope in resource.scope_spans
            for span in scope.spans
        ]


@pytest.fixture
def collector():
    kept = Collector()
    server = grpc.server(ThreadPoolExecutor(2))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(kept, server)
    kept.port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield kept
    server.stop(None)


@pytest.mark.timeout(180)
def test_a_review_is_one_trace_that_holds_ids_and_codes_alone(collector) -> None:
    """Shown to fail without the metadata of any one call, or without the review's traceparent."""
    settings = {
        "BYOKEEP_OTLP_ENDPOINT": f"http://127.0.0.1:{collector.port}",
        "OTEL_BSP_SCHEDULE_DELAY": "200",
    }
    key = tenants.fresh_key("openai")
    with Stack(
        environment=dict.fromkeys(("keyvault", "orchestrator", "runner"), settings)
    ) as stack:
        tenant = tenants.create(stack, "acme")
        tenants.add_key(stack, tenant, "openai", key)
        with stack.connect("developer", tenant=tenant) as connection:
            review = tenants.review(connection, tenant, metadata=[("traceparent", PARENT)])
        assert review.state == review_pb2.REVIEW_STATE_COMPLETED

        def traced() -> set[str]:
            return {one.name for one in collector.spans() if one.trace_id.hex() == TRACE}

        assert wait_for(lambda: traced() >= PATH, 30), PATH - traced()
        with stack.connect("developer", tenant="nobody") as connection, pytest.raises(CallError):
            tenants.review(connection, "nobody")
        assert wait_for(lambda: any(one.status.code == 2 for one in collector.spans()), 30)
    spans = collector.spans()
    allowed = {"attempt", "review", "fence", "provider", "backend"}
    assert {attribute.key for span in spans for attribute in span.attributes} <= allowed
    assert [event for span in spans for event in span.events] == []
    sent = b"".join(request.SerializeToString() for request in collector.requests)
    assert tenants.DIFF_CANARY not in sent
    assert [name for name, form in forms(key, "sk-proj-").items() if form in sent] == []


@pytest.mark.parametrize("module", ["services.common.server", "services.llm_runner.zygote"])
def test_opentelemetry_is_loaded_where_traces_are_wanted_only(module) -> None:
    """In the zygote never: an exporter's thread and locks do not survive a fork."""
    code = f"import sys, {module}; sys.exit('opentelemetry' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
