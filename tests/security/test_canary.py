"""31 and 36: nothing of a key, and nothing of token usage, in any sink of a whole stack."""

from __future__ import annotations

import secrets
import string

import pytest
from byokeep.ids import new_id
from byokeep.keyvault.v1 import audit_pb2
from byokeep.names import key_name, last_of
from byokeep.orchestrator.v1 import key_pb2, review_pb2
from byokeep.testing.canary import files_with, forms, found_in

DIFF = b"""diff --git a/app.py b/app.py
--- a/app.py
+++ b/app.py
@@ -1,2 +1,3 @@
 def load(query, name):
+    return eval(query)
     return None
"""
PREFIXES = {"openai": "sk-proj-", "anthropic": "sk-ant-api03-", "gemini": "AIza"}
FAULTS = [
    None,
    "unauthorized",
    "missing_scope",
    "quota",
    "rate_limited",
    "server_error",
    "cut",
    "malformed_json",
    "malformed_answer",
    "truncated",
    "refusal",
    "redirect",
    "echo_key",
    "echo",
]
# A review outlasts being told to come back later, however often: twice is enough to look at it.
TIMES = {"rate_limited": 2}
# What the emulator answers as token usage; no figure of it may be kept.
USAGE = b"424242"


def fresh_key(provider: str) -> str:
    alphabet = string.ascii_letters + string.digits
    return PREFIXES[provider] + "".join(secrets.choice(alphabet) for _ in range(44))


def add_key(connection, provider: str, key: str, name: str) -> str:
    key_id, request_id = new_id("key"), new_id("req")
    sealed = connection.seal(provider, key, key_id, "add", request_id)
    answer = connection.keys.AddKey(
        key_pb2.AddKeyRequest(
            parent="tenants/demo",
            key_id=key_id,
            provider=f"PROVIDER_{provider.upper()}",
            display_name=name,
            sealed_key=sealed,
            request_id=request_id,
        )
    )
    for _ in connection.keys.WatchKey(
        key_pb2.WatchKeyRequest(name=answer.key.provider_key.name), timeout=30
    ):
        pass
    return key_id


def review(connection, provider: str) -> review_pb2.Review:
    model = next(
        one.model
        for one in connection.settings.ListModels(parent_of("demo"), timeout=10).models
        if one.model.startswith(provider) and one.provider_default
    )
    answer = connection.reviews.SubmitReview(
        review_pb2.SubmitReviewRequest(
            parent="tenants/demo",
            input=review_pb2.ReviewInput(repository="a/b", diff=DIFF, model=model),
            request_id=new_id("req"),
        )
    )
    last = answer.review
    for message in connection.reviews.WatchReview(
        review_pb2.WatchReviewRequest(name=last.name), timeout=90
    ):
        last = message.review
    return last


def parent_of(tenant: str):
    from byokeep.orchestrator.v1 import settings_pb2

    return settings_pb2.ListModelsRequest(parent=f"tenants/{tenant}")


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "provider",
    [pytest.param(one, marks=[] if one == "openai" else pytest.mark.deep) for one in PREFIXES],
)
def test_canary_all_sinks(stack, provider):
    """31. Success and every failure path: logs, databases with their write-ahead logs,
    queue tables, files and API answers hold no form of the key.

    36. Nor any figure of the token usage that the provider answered.

    Shown to fail: with the key's text in the log of the child's outcome, and with the
    usage figure stored with a review.
    """
    key = fresh_key(provider)
    wanted = {**forms(key, PREFIXES[provider]), "usage": USAGE}
    answers: list[object] = []
    with stack.connect() as connection:
        key_id = add_key(connection, provider, key, f"canary-{provider}")
        states = {}
        for fault in FAULTS:
            stack.emulator.reset()
            if fault:
                times = TIMES.get(fault, 10)
                stack.emulator.fault(fault, provider=provider, path="chat", times=times)
            states[fault] = review(connection, provider)
            answers.append(states[fault])
            if fault == "unauthorized":
                key_id = rotate(connection, provider, key, key_id)
        answers += read_everything(connection, key_id)
        connection.keys.DestroyKey(
            key_pb2.DestroyKeyRequest(name=key_name("demo", key_id), request_id=new_id("req"))
        )
    assert states[None].state == review_pb2.REVIEW_STATE_COMPLETED
    assert states[None].finding_count == 1
    assert states["unauthorized"].failure == review_pb2.FAILURE_REASON_KEY_REJECTED
    assert len([one for one in states.values() if one.failure]) >= len(FAULTS) - 3
    said = "\n".join(str(one) for one in answers).encode()
    raw = b"".join(one.SerializeToString() for one in answers)
    assert found_in(said + raw, wanted) == []
    assert list(files_with(stack.root, wanted)) == []


def rotate(connection, provider: str, key: str, key_id: str) -> str:
    request_id = new_id("req")
    connection.keys.RotateKey(
        key_pb2.RotateKeyRequest(
            name=key_name("demo", key_id),
            sealed_key=connection.seal(provider, key, key_id, "rotate", request_id),
            request_id=request_id,
        )
    )
    name = key_name("demo", key_id)
    for message in connection.keys.WatchKey(key_pb2.WatchKeyRequest(name=name), timeout=30):
        key_id = last_of(message.key.provider_key.name)
    return key_id


def read_everything(connection, key_id: str) -> list[object]:
    name = key_name("demo", key_id)
    answers: list[object] = [
        connection.keys.GetKey(key_pb2.GetKeyRequest(name=name)),
        connection.keys.ListKeys(key_pb2.ListKeysRequest(parent="tenants/demo")),
        connection.keys.ListKeyUses(key_pb2.ListKeyUsesRequest(name=name)),
        connection.reviews.ListReviews(
            review_pb2.ListReviewsRequest(parent="tenants/demo", page_size=500)
        ),
        connection.settings.ListModels(parent_of("demo")),
        connection.audit.ListEvents(
            audit_pb2.ListEventsRequest(parent="tenants/demo", page_size=1000)
        ),
    ]
    export = audit_pb2.ExportEventsRequest(parent="tenants/demo")
    return [*answers, *connection.audit.ExportEvents(export)]


def test_the_scanner_finds_every_form(tmp_path):
    """The scanner itself can fail: each form, written to a file, is found."""
    wanted = forms("sk-proj-abcDEF0123456789xyz~", "sk-proj-")
    for name, form in wanted.items():
        tmp_path.joinpath("f").write_bytes(b"before" + form + b"after")
        ((_, names),) = files_with(tmp_path, wanted)
        assert name in names
