"""The library's connections, blocking and asyncio, against a fake edge over real mutual TLS."""

from __future__ import annotations

import asyncio
import inspect
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import byokeep
import grpc
import pytest
from byokeep import aio, calls, client, sealing, watching
from byokeep.edge import UnknownProviderError
from byokeep.errors import CallError, ErrorInfo, error_info
from byokeep.orchestrator.v1 import key_pb2, review_pb2

from services.common.errors import ByokeepError
from tests.harness.fake_edge import NAMES, Edge

pytest_plugins = ["tests.harness.cli_fixtures"]

KEY = "sk-proj-" + "aB3x" * 8
DIFF = "diff --git a/a.py b/a.py\n--- a/a.py\n+++ b/a.py\n@@ -1 +1 @@\n-a\n+b\n"
RUNNING = {"state": review_pb2.REVIEW_STATE_RUNNING}
COMPLETED = {"state": review_pb2.REVIEW_STATE_COMPLETED}

Run = Callable[..., Any]


def _blocking(action: Callable[[Any], Any], **arguments: Any) -> Any:
    with byokeep.connect(**arguments) as connection:
        result = action(connection)
        return list(result) if inspect.isgenerator(result) else result


def _asyncio(action: Callable[[Any], Any], **arguments: Any) -> Any:
    async def main() -> Any:
        async with aio.connect(**arguments) as connection:
            result = action(connection)
            if inspect.isasyncgen(result):
                return [message async for message in result]
            return await result

    return asyncio.run(main())


@pytest.fixture(params=[_blocking, _asyncio], ids=["blocking", "asyncio"])
def run(request: pytest.FixtureRequest) -> Run:
    """Do something with a connection of either kind."""
    return request.param


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watching, "_LONGEST_PAUSE_SECONDS", 0.01)


def listed(connection: Any, **options: Any) -> Any:
    return connection.keys.ListKeys(key_pb2.ListKeysRequest(parent=connection.parent), **options)


def test_both_connections_have_the_same_surface():
    def surface(kind: type) -> dict[str, Any]:
        return {
            name: inspect.signature(member).parameters if callable(member) else None
            for name, member in inspect.getmembers(kind)
            if not name.startswith("_")
        }

    assert surface(client.Connection) == surface(aio.Connection)
    ours, theirs = (inspect.signature(module.connect).parameters for module in (client, aio))
    assert ours == theirs


def test_a_key_is_added_and_a_diff_reviewed(edge: Edge, run: Run) -> None:
    key = run(lambda connection: connection.add_key("openai", KEY, name="ci", user="ann"))
    assert key.validation.verdict == key_pb2.VALIDATION_VERDICT_VALID
    assert edge.opened == [KEY.encode()]
    (sent,) = edge.sent(key_pb2.AddKeyRequest)
    assert (sent.display_name, sent.user) == ("ci", "ann")

    edge.states = [RUNNING, COMPLETED]
    review = run(
        lambda connection: connection.review(
            DIFF, "acme/shop", pull_request=7, context_files={"b.py": "b = 1"}
        )
    )
    assert review.state == review_pb2.REVIEW_STATE_COMPLETED
    (submitted,) = edge.sent(review_pb2.SubmitReviewRequest)
    assert submitted.input.diff == DIFF.encode()
    assert submitted.input.pull_request == 7
    assert [file.path for file in submitted.input.context_files] == ["b.py"]


def test_a_key_is_rotated_for_its_own_provider_and_owner(edge: Edge, run: Run) -> None:
    name = f"tenants/demo/providerKeys/{edge.add_key('anthropic', owner='ann')}"
    fresh = "sk-ant-api03-" + "aB3x" * 8
    key = run(lambda connection: connection.rotate_key(name, fresh, destroy_previous=True))
    assert key.provider_key.name == name
    assert edge.opened == [fresh.encode()]
    assert edge.sent(key_pb2.RotateKeyRequest)[0].destroy_previous


@pytest.mark.parametrize(
    ("verdicts", "reason"), [(["INVALID"], "KEY_REJECTED"), (["UNREACHABLE"], "KEY_UNVALIDATED")]
)
def test_a_key_that_no_review_can_use_is_an_error(edge: Edge, run: Run, verdicts, reason) -> None:
    edge.verdicts = verdicts
    with pytest.raises(byokeep.KeyNotUsableError) as failed:
        run(lambda connection: connection.add_key("openai", KEY))
    assert failed.value.reason == reason
    assert failed.value.key.provider_key.name.startswith("tenants/demo/providerKeys/key_")


def test_who_does_not_wait_gets_the_pending_key(edge: Edge, run: Run) -> None:
    key = run(lambda connection: connection.add_key("openai", KEY, wait=0))
    assert key.validation.verdict == key_pb2.VALIDATION_VERDICT_UNSPECIFIED
    assert edge.sent(key_pb2.WatchKeyRequest) == []


def test_a_review_that_fails_is_an_error_with_its_reason(edge: Edge, run: Run) -> None:
    failed = {
        "state": review_pb2.REVIEW_STATE_FAILED,
        "failure": review_pb2.FAILURE_REASON_QUOTA_EXHAUSTED,
        "failure_message": "no credit",
    }
    edge.states = [RUNNING, failed]
    with pytest.raises(byokeep.ReviewFailedError, match="no credit") as raised:
        run(lambda connection: connection.review(DIFF, "acme/shop"))
    assert raised.value.reason == "QUOTA_EXHAUSTED"

    edge.states = [{"state": review_pb2.REVIEW_STATE_CANCELLED}]
    with pytest.raises(byokeep.ReviewFailedError) as raised:
        run(lambda connection: connection.review(DIFF, "acme/shop"))
    assert raised.value.reason == "CANCELLED"


def test_a_watched_review_goes_on_past_lost_connections(edge: Edge, run: Run) -> None:
    name = f"tenants/demo/reviews/{edge.add_review(**RUNNING)}"
    edge.states = [RUNNING, "lost", RUNNING, "reset", "end", COMPLETED]
    answers = run(lambda connection: connection.watch_review(name))
    assert [answer.review.state for answer in answers] == [2, 2, 3]
    assert len(edge.sent(review_pb2.WatchReviewRequest)) >= 4


def test_all_pages_of_findings_are_read(edge: Edge, run: Run) -> None:
    found = [review_pb2.Finding(path="a.py", start_line=line) for line in range(1, 5)]
    edge.states = [{**COMPLETED, "findings": found}]
    review = run(lambda connection: connection.review(DIFF, "acme/shop"))
    assert list(review.findings) == found
    again = run(lambda connection: connection.get_review(review.name))
    assert list(again.findings) == found


def test_a_watched_key_goes_on_past_lost_connections(edge: Edge, run: Run) -> None:
    name = f"tenants/demo/providerKeys/{edge.add_key()}"
    edge.verdicts = ["LOST", "VALID"]
    answers = run(lambda connection: connection.watch_key(name))
    assert answers[-1].done


def test_a_refusal_ends_a_watch_at_once(edge: Edge, run: Run) -> None:
    edge.fail("WatchReview", "NOT_FOUND", "NOT_FOUND", "no such review")
    name = f"tenants/demo/reviews/{edge.add_review()}"
    with pytest.raises(CallError, match="no such review"):
        run(lambda connection: connection.watch_review(name))
    assert len(edge.sent(review_pb2.WatchReviewRequest)) == 1


@pytest.mark.parametrize("method", ["SubmitReview", "WatchReview", "GetReview"])
def test_what_is_one_too_many_is_tried_again(edge: Edge, run: Run, method: str) -> None:
    """Shown to fail without `Patience`, and without OVERLOADED among what passes a watch by."""
    found = [review_pb2.Finding(path="a.py", start_line=line) for line in (1, 2)]
    edge.states = [{**COMPLETED, "findings": found}]
    edge.overloaded[method] = 3
    review = run(lambda connection: connection.review(DIFF, "acme/shop"))
    assert list(review.findings) == found
    requests = [one for one in edge.requests if type(one).__name__ == f"{method}Request"]
    # The same request: whatever became of the first, nothing is done twice.
    assert len({one.SerializeToString() for one in requests}) == 1
    assert len(requests) == 4


def test_what_is_one_too_many_is_told_where_the_deadline_is_nearer(edge: Edge, run: Run) -> None:
    edge.add_key()
    edge.overloaded["ListKeys"], edge.again_seconds = 9, 5.0
    with pytest.raises(CallError) as told:
        run(lambda connection: listed(connection, timeout=4.0))
    assert (told.value.reason, told.value.retry_after_seconds) == ("OVERLOADED", 5.0)
    assert len(edge.sent(key_pb2.ListKeysRequest)) == 1


def test_pauses_of_many_callers_differ_and_grow() -> None:
    refusal = ByokeepError(
        grpc.StatusCode.RESOURCE_EXHAUSTED, "OVERLOADED", "too many", retry_after_seconds=1
    )
    error = CallError(_status(refusal.code, refusal.trailing_metadata()))
    first = {calls.Patience(60.0).pause(error) for _ in range(20)}
    assert len(first) == 20
    assert all(1.0 <= one <= 1.5 for one in first)
    patience = calls.Patience(60.0)
    assert sum(patience.pause(error) for _ in range(4)) > 8.0
    with pytest.raises(CallError):
        calls.Patience(0.9).pause(error)


def test_what_is_watched_leaves_room_for_other_calls(edge: Edge) -> None:
    """Was shown to fail with one connection: 256 reviews that went on kept out every other call."""
    edge.serve("orchestrator", NAMES["orchestrator"], edge._add_orchestrator, streams=1)
    edge.write_config()
    name = f"tenants/demo/reviews/{edge.add_review(**RUNNING)}"
    edge.states = [RUNNING, "wait"]

    async def main() -> None:
        async with aio.connect() as connection:
            watched = connection.watch_review(name)
            await anext(watched)
            await listed(connection, timeout=5.0)

    asyncio.run(main())


def test_any_number_of_reviews_may_be_asked_for_at_once(edge: Edge) -> None:
    """Of 600 at once 127 were lost without a bound, to a connection that refused their calls."""
    running = most = 0

    class Reviews:
        async def SubmitReview(self, request: Any, timeout: float) -> Any:
            nonlocal running, most
            running += 1
            most = max(most, running)
            await asyncio.sleep(0)
            running -= 1
            return review_pb2.SubmitReviewResponse()

    async def main() -> None:
        async with aio.connect() as connection:
            connection.__dict__["reviews"] = Reviews()
            await asyncio.gather(*(connection.submit_review(DIFF, f"a/{n}") for n in range(400)))

    asyncio.run(main())
    assert 8 < most < 100  # of a tenant: protos/byokeep/orchestrator/v1/review.proto


def test_a_watch_whose_time_is_over_says_what_it_saw(edge: Edge, run: Run) -> None:
    name = f"tenants/demo/reviews/{edge.add_review(**RUNNING)}"
    edge.states = [RUNNING, "wait"]
    with pytest.raises(byokeep.WatchTimeoutError) as late:
        run(lambda connection: connection.watch_review(name, 3.0))
    assert late.value.latest.review.state == review_pb2.REVIEW_STATE_RUNNING
    assert isinstance(late.value, TimeoutError)


def test_a_watch_gives_up_on_a_service_that_stays_away():
    opened: list[float] = []

    class Gone:
        def __iter__(self):
            raise CallError(_status(grpc.StatusCode.UNAVAILABLE))

        def cancel(self) -> None: ...

    def open_stream(left: float) -> Gone:
        opened.append(left)
        return Gone()

    pauses: list[float] = []
    with pytest.raises(CallError):
        list(watching.watch(open_stream, bool, 3600, sleep=pauses.append))
    assert len(opened) == watching.FAILURES_IN_A_ROW
    assert pauses == sorted(pauses)


def test_a_watch_that_is_one_too_many_waits_as_long_as_it_was_told_to() -> None:
    """However often: the service is there. Was shown to fail as a connection that is lost does."""
    busy = ByokeepError(
        grpc.StatusCode.RESOURCE_EXHAUSTED, "OVERLOADED", "full", retry_after_seconds=9
    )

    class Stream:
        def __iter__(self):
            if len(pauses) < 3 * watching.FAILURES_IN_A_ROW:
                raise CallError(_status(busy.code, busy.trailing_metadata()))
            yield True

        def cancel(self) -> None: ...

    pauses: list[float] = []
    assert list(watching.watch(lambda left: Stream(), bool, 3600, sleep=pauses.append)) == [True]
    assert all(9.0 <= one <= 13.5 for one in pauses)


class Status(grpc.RpcError):
    """A failed call as gRPC raises it."""

    def __init__(self, code: grpc.StatusCode, trailing: Any) -> None:
        self._code, self._trailing = code, trailing

    def code(self) -> grpc.StatusCode:
        return self._code

    def details(self) -> str:
        return ""

    def trailing_metadata(self) -> Any:
        return self._trailing


def _status(code: grpc.StatusCode, trailing: Any = ()) -> grpc.RpcError:
    return Status(code, trailing)


def test_every_status_has_a_reason():
    for code in grpc.StatusCode:
        error = CallError(_status(code))
        assert error.code() is code
        assert error.reason in ("SERVICE_UNREACHABLE", "NO_ANSWER", "UNEXPLAINED")
        assert error.message


def test_a_refused_call_has_code_reason_and_metadata(edge: Edge, run: Run) -> None:
    edge.fail("ListKeys", "PERMISSION_DENIED", "TENANT_NOT_ALLOWED", "no role", tenant="demo")
    with pytest.raises(CallError, match="no role") as failed:
        run(listed)
    error = failed.value
    assert isinstance(error, byokeep.Error)
    assert isinstance(error, grpc.RpcError)
    assert (error.code().name, error.reason) == ("PERMISSION_DENIED", "TENANT_NOT_ALLOWED")
    assert error.metadata == {"tenant": "demo"}
    assert error_info(error) == ErrorInfo(
        grpc.StatusCode.PERMISSION_DENIED, "no role", "TENANT_NOT_ALLOWED", {"tenant": "demo"}
    )


def test_nobody_there_and_a_stranger_are_unreachable(edge: Edge, run: Run) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        edge.write_config(orchestrator=f"127.0.0.1:{nobody.getsockname()[1]}")
        with pytest.raises(CallError) as failed:
            run(listed)
    assert (failed.value.code().name, failed.value.reason) == ("UNAVAILABLE", "SERVICE_UNREACHABLE")

    edge.write_config(orchestrator_name=NAMES["keyvault"])
    with pytest.raises(CallError) as failed:
        run(listed)
    assert failed.value.reason == "SERVICE_UNREACHABLE"


def test_a_service_that_does_not_answer_is_said_so(edge: Edge, run: Run) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        edge.write_config(orchestrator=f"127.0.0.1:{silent.getsockname()[1]}")
        begun = time.monotonic()
        with pytest.raises(CallError) as failed:
            run(lambda connection: listed(connection, timeout=0.5))
    assert failed.value.reason == "NO_ANSWER"
    assert time.monotonic() - begun < 10


def test_a_call_has_a_deadline_unless_it_brings_one(edge: Edge, run: Run, monkeypatch) -> None:
    monkeypatch.setattr("byokeep.calls.DEADLINE_SECONDS", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        edge.write_config(orchestrator=f"127.0.0.1:{silent.getsockname()[1]}")
        with pytest.raises(CallError) as failed:
            run(listed)
    assert failed.value.reason == "NO_ANSWER"


def test_a_blocking_call_fails_alike_in_every_form(edge: Edge) -> None:
    edge.fail("ListKeys", "NOT_FOUND", "NOT_FOUND", "there is none")
    edge.fail("WatchReview", "NOT_FOUND", "NOT_FOUND", "there is none")
    with byokeep.connect() as connection:
        request = key_pb2.ListKeysRequest(parent=connection.parent)
        method = connection.keys.ListKeys
        watched = review_pb2.WatchReviewRequest(name="tenants/demo/reviews/rev_" + "0" * 26)
        for form in (
            lambda: method(request),
            lambda: method.with_call(request),
            lambda: method.future(request).result(5),
            lambda: list(connection.reviews.WatchReview(watched, timeout=5)),
        ):
            with pytest.raises(CallError, match="there is none"):
                form()
        assert isinstance(method.future(request).exception(5), CallError)


def test_an_asyncio_call_fails_alike_in_every_form(edge: Edge) -> None:
    edge.fail("WatchReview", "NOT_FOUND", "NOT_FOUND", "there is none")

    async def main() -> None:
        async with aio.connect() as connection:
            request = review_pb2.WatchReviewRequest(name="tenants/demo/reviews/rev_" + "0" * 26)
            with pytest.raises(CallError, match="there is none"):
                await connection.reviews.WatchReview(request).read()
            with pytest.raises(CallError, match="there is none"):
                async for _ in connection.reviews.WatchReview(request):
                    pass

    asyncio.run(main())


def test_asyncio_seals_off_the_event_loop(edge: Edge, monkeypatch) -> None:
    threads: list[threading.Thread] = []
    seal = sealing.seal_key

    def noted(*arguments: Any) -> Any:
        threads.append(threading.current_thread())
        return seal(*arguments)

    monkeypatch.setattr(sealing, "seal_key", noted)
    _asyncio(lambda connection: connection.add_key("openai", KEY))
    assert threads
    assert threading.current_thread() not in threads


def test_an_unpinned_intake_key_is_not_sealed_to(edge: Edge, run: Run) -> None:
    from tests.harness.chain import SigningKey

    edge.intake = SigningKey("isk")
    with pytest.raises(sealing.UntrustedIntakeKeyError) as refused:
        run(lambda connection: connection.add_key("openai", KEY))
    assert isinstance(refused.value, byokeep.Error)
    assert edge.sent(key_pb2.AddKeyRequest) == []


def test_what_is_no_provider_is_refused_and_not_repeated(edge: Edge, run: Run) -> None:
    with pytest.raises(UnknownProviderError) as refused:
        run(lambda connection: connection.add_key(KEY, "openai"))
    assert KEY not in str(refused.value)
    assert edge.requests == []
