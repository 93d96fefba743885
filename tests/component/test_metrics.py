"""Figures and log lines of a whole stack: every call is seen, whoever refuses it."""

from __future__ import annotations

import json
import time
import urllib.request

import grpc
import pytest
from byokeep.orchestrator.v1 import review_pb2
from byokeep.testing import Stack
from prometheus_client.parser import text_string_to_metric_families

from deploy.local.processes import wait_for

SERVICES = ("keyvault", "orchestrator", "runner")


def scrape(stack: Stack, service: str) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """Return each sample by its name and labels."""
    url = f"http://{stack.address(f'{service}-metrics')}/metrics"
    with urllib.request.urlopen(url, timeout=10) as answer:
        families = text_string_to_metric_families(answer.read().decode())
        return {
            (sample.name, frozenset(sample.labels.items())): sample.value
            for family in families
            for sample in family.samples
        }


def value(stack: Stack, service: str, name: str, **labels: str) -> float:
    return scrape(stack, service).get((name, frozenset(labels.items())), 0.0)


def becomes(wanted: float, stack: Stack, service: str, name: str, **labels: str) -> bool:
    """Whether a figure reaches a value: a caller may have its error before it is counted."""
    return wait_for(lambda: value(stack, service, name, **labels) >= wanted, 15)


def rpc_lines(stack: Stack, service: str) -> list[dict[str, object]]:
    lines = (json.loads(line) for line in stack.log(service).splitlines() if line[:1] == "{")
    return [line for line in lines if line["event"] == "rpc"]


@pytest.mark.parametrize("service", SERVICES)
def test_a_service_that_serves_says_so_and_when_its_certificate_ends(stack, service) -> None:
    assert becomes(1, stack, service, "byokeep_serving")
    left = value(stack, service, "byokeep_certificate_expiry_timestamp_seconds") - time.time()
    assert 0 < left < 400 * 86_400


def test_a_call_counts_once_and_leaves_one_line_with_the_callers_request_id(stack) -> None:
    method = "orchestrator.v1.ReviewService/ListReviews"
    before = value(stack, "orchestrator", "byokeep_rpcs_total", method=method, code="OK")
    with stack.connect("developer") as connection:
        connection.reviews.ListReviews(
            review_pb2.ListReviewsRequest(parent="tenants/demo"),
            metadata=[("x-request-id", "req-of-the-test-1")],
        )
    assert (
        value(stack, "orchestrator", "byokeep_rpcs_total", method=method, code="OK") == before + 1
    )
    [line] = [
        line for line in rpc_lines(stack, "orchestrator") if line["request"] == "req-of-the-test-1"
    ]
    assert (line["method"], line["code"]) == (method, "OK")
    assert str(line["caller"]).endswith("/client/developer")


def test_a_call_that_is_refused_before_it_is_handled_is_seen_with_its_reason(stack) -> None:
    """Shown to fail with the observing interceptor behind the gate."""
    method = "orchestrator.v1.ReviewService/ListReviews"
    seen = {"method": method, "code": "PERMISSION_DENIED"}
    refused = {"method": method, "reason": "TENANT_NOT_ALLOWED"}
    before = value(stack, "orchestrator", "byokeep_rpcs_total", **seen)
    refusals = value(stack, "orchestrator", "byokeep_refusals_total", **refused)
    with stack.connect("submitter") as connection, pytest.raises(grpc.RpcError):
        connection.reviews.ListReviews(review_pb2.ListReviewsRequest(parent="tenants/nobody"))
    assert becomes(before + 1, stack, "orchestrator", "byokeep_rpcs_total", **seen)
    assert value(stack, "orchestrator", "byokeep_refusals_total", **refused) == refusals + 1


def test_a_request_id_that_is_none_is_not_repeated(stack) -> None:
    with stack.connect("developer") as connection:
        connection.reviews.ListReviews(
            review_pb2.ListReviewsRequest(parent="tenants/demo"),
            metadata=[("x-request-id", 'forged", "level": "x')],
        )
    assert not any("forged" in str(line) for line in rpc_lines(stack, "orchestrator"))


def test_a_stream_whose_caller_goes_away_ends_as_cancelled(stack) -> None:
    method = "keyvault.v1.LeaseService/WatchRevocations"
    seen = {"method": method, "code": "CANCELLED"}
    before = value(stack, "keyvault", "byokeep_rpcs_total", **seen)
    stack.restart("runner")
    assert becomes(before + 1, stack, "keyvault", "byokeep_rpcs_total", **seen)


@pytest.mark.parametrize("service", ["keyvault", "orchestrator"])
def test_the_pool_shows_its_connections(stack, service) -> None:
    assert value(stack, service, "byokeep_database_connections", state="open") >= 1


def test_the_anchor_of_a_well_keyvault_is_young_and_nothing_is_rolled_back(stack) -> None:
    assert value(stack, "keyvault", "byokeep_audit_anchor_age_seconds") < 60
    assert value(stack, "keyvault", "byokeep_database_rolled_back") == 0


@pytest.mark.parametrize("service", SERVICES)
def test_no_label_names_a_tenant_a_key_or_a_caller(stack, service) -> None:
    labels = {name for _, labels in scrape(stack, service) for name, _ in labels}
    allowed = {
        "method",
        "code",
        "reason",
        "le",
        "state",
        "task",
        "backend",
        "outcome",
        "provider",
        "kind",
    }
    assert labels <= set(allowed)
