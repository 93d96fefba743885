"""29. `wire_canary`: no provider key on the wire between services, where gRPC prints every byte."""

from __future__ import annotations

import sys

import pytest
from byokeep.orchestrator.v1 import review_pb2
from byokeep.testing import Stack
from byokeep.testing.canary import files_with, forms

from tests.security.test_canary import PREFIXES, add_key, fresh_key, review, rotate

MODULES = {
    "keyvault": "services.keyvault",
    "orchestrator": "services.orchestrator",
    "runner": "services.llm_runner",
}
TRACING = {"GRPC_TRACE": "all", "GRPC_VERBOSITY": "DEBUG"}


@pytest.fixture(scope="module")
def tapped():
    """A stack whose services print their payloads into their logs."""
    with Stack() as stack:
        for name, module in MODULES.items():
            process = stack.process(name)
            process.stop()
            process._command = [sys.executable, "-m", "tests.harness.wire_tap", module, "serve"]
            process._environment |= TRACING
            process.start()
            stack.wait_ready(name)
        yield stack


@pytest.mark.timeout(300)
def test_wire_canary(tapped):
    """A key is added, used, rotated and used; every service prints what it sends and receives,
    and none of it has the key in any form. The key's id is there: the control.

    Shown to fail: with the key sent as its display name as well.
    """
    key = fresh_key("openai")
    with tapped.connect() as connection:
        ids = [add_key(connection, "openai", key, "wire")]
        assert review(connection, "openai").state == review_pb2.REVIEW_STATE_COMPLETED
        ids.append(rotate(connection, "openai", key, ids[0]))
        assert review(connection, "openai").state == review_pb2.REVIEW_STATE_COMPLETED
    assert list(files_with(tapped.root, forms(key, PREFIXES["openai"]))) == []
    for name in MODULES:
        log = tapped.process(name).log.read_bytes()
        assert b"gRPC Tracers: " in log
        assert [one for one in ids if one.encode() not in log] == [], name
