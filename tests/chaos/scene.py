"""A default stack that is being hurt: what is asked of it, and what must be true afterwards."""

from __future__ import annotations

import contextlib
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import grpc
import psutil
import psycopg
from byokeep.ids import new_id
from byokeep.keyvault.v1 import custody_pb2
from byokeep.names import key_name, tenant_name
from byokeep.orchestrator.v1 import key_pb2, review_pb2
from byokeep.testing import Stack

from tests.harness import tenants

SETTLE_SECONDS = 150.0
_PATIENCE_SECONDS = 90.0
# What a service that is away, or a database that is, answers with.
_AWAY = (
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.ABORTED,
)
_OVER = (
    review_pb2.REVIEW_STATE_COMPLETED,
    review_pb2.REVIEW_STATE_FAILED,
    review_pb2.REVIEW_STATE_CANCELLED,
)


@dataclass
class Tally:
    """What was found out; `wrong` is empty where everything held."""

    reviews: Counter[str] = field(default_factory=Counter)
    seen: int = 0
    rows: int = 0
    unsent: int = 0
    wrong: list[str] = field(default_factory=list)

    def add(self, other: Tally) -> None:
        """Add what another round found out."""
        self.reviews += other.reviews
        self.seen += other.seen
        self.rows += other.rows
        self.unsent += other.unsent
        self.wrong += other.wrong

    def __str__(self) -> str:
        """Return one line."""
        ends = ", ".join(f"{count} {name}" for name, count in sorted(self.reviews.items()))
        unsent = f", {self.unsent} stored and never sent" if self.unsent else ""
        return f"{ends}; calls seen {self.seen}, stored {self.rows}{unsent}"


class Scene:
    """Two tenants with keys of two providers, and the hands that hurt their stack.

    Reviews that a step pins run on anthropic, so that faults of the emulator find them alone; the
    others run on openai.
    """

    def __init__(self, stack: Stack) -> None:
        """Give a started stack its tenants."""
        self.stack = stack
        self.tenants = [tenants.create(stack, f"chaos-{number}") for number in (1, 2)]
        for tenant in self.tenants:
            for provider in ("openai", "anthropic"):
                tenants.add_key(stack, tenant, provider)

    def submit(self, tenant: str, provider: str = "openai", files: int = 1) -> str:
        """Submit a review until somebody answers, always with one request id; return its name."""
        request = review_pb2.SubmitReviewRequest(
            parent=tenant_name(tenant),
            input=review_pb2.ReviewInput(
                repository="chaos/chaos", diff=_diff(files), model=tenants.model(provider)
            ),
            request_id=new_id("req"),
        )
        return str(
            self.ask(lambda connection: connection.reviews.SubmitReview(request)).review.name
        )

    def ask(self, call: Callable[[Any], Any], seconds: float = _PATIENCE_SECONDS) -> Any:
        """Make a call again until it is answered. Raises grpc.RpcError where it is refused."""
        end = time.monotonic() + seconds
        while True:
            try:
                with self.stack.connect("developer") as connection:
                    return call(connection)
            except grpc.RpcError as error:
                if error.code() not in _AWAY or time.monotonic() > end:
                    raise
            time.sleep(0.1)

    def review(self, name: str) -> review_pb2.Review:
        """Read a review."""
        request = review_pb2.GetReviewRequest(name=name)
        answer = self.ask(lambda connection: connection.reviews.GetReview(request))
        review: review_pb2.Review = answer.review
        return review

    def key(self, tenant: str, key_id: str) -> key_pb2.Key:
        """Read a key."""
        request = key_pb2.GetKeyRequest(name=key_name(tenant, key_id))
        answer = self.ask(lambda connection: connection.keys.GetKey(request))
        key: key_pb2.Key = answer.key
        return key

    def wait(self, condition: Callable[[], bool], what: str, seconds: float = 60.0) -> None:
        """Wait for a condition. Raises TimeoutError, which says what did not come."""
        end = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > end:
                raise TimeoutError(what)
            time.sleep(0.02)

    def kill(self, target: str) -> None:
        """SIGKILL a process, or every one-shot child of the runner."""
        if target != "child":
            self.stack.process(target).kill()
            return
        for zygote in psutil.Process(self.stack.process("runner").pid).children():
            for child in zygote.children():
                with contextlib.suppress(psutil.NoSuchProcess):
                    child.kill()

    def revive(self, target: str) -> None:
        """Start what was killed."""
        if target != "child":
            self.stack.process(target).start()

    def wait_ready(self, target: str) -> None:
        """Wait until what was started serves: it may need what a step holds still."""
        if target != "child":
            self.stack.wait_ready(target)

    @contextlib.contextmanager
    def frozen(self, name: str) -> Iterator[None]:
        """Stop a process without its end: it neither answers nor closes."""
        process = self.stack.process(name)
        pid = process.pid
        process.signal(signal.SIGSTOP)
        try:
            yield
        finally:
            if process.running and process.pid == pid:
                process.signal(signal.SIGCONT)

    def running(self, name: str) -> bool:
        """Whether an attempt of a review runs."""
        return bool(
            self.sql(
                "select 1 from attempt where review_id = %s and state = 'RUNNING'",
                name.rsplit("/", 1)[1],
            )
        )

    def sql(self, statement: str, *values: object) -> list[tuple[Any, ...]]:
        """Ask the orchestrator's database."""
        url = self.stack.database_url("orchestrator").replace("postgresql+psycopg", "postgresql")
        with psycopg.connect(url, connect_timeout=5) as connection:
            return connection.execute(statement, values).fetchall()  # type: ignore[arg-type]

    def mark(self) -> int:
        """Number of the last call that the emulator saw."""
        return max((call.sequence for call in self.stack.emulator.calls()), default=0)

    def settle(self, reviews: list[str], mark: int) -> Tally:
        """Wait until every review has ended; count and judge. One that has not within the time
        must at least say what it waits for."""
        tally = Tally()
        end = time.monotonic() + SETTLE_SECONDS
        for name in reviews:
            review = self.review(name)
            while review.state not in _OVER and time.monotonic() < end:
                time.sleep(0.2)
                review = self.review(name)
            self._judge(review, tally)
        self._count(reviews, mark, tally)
        return tally

    def _judge(self, review: review_pb2.Review, tally: Tally) -> None:
        state = review_pb2.ReviewState.Name(review.state).removeprefix("REVIEW_STATE_")
        reason = review_pb2.FailureReason.Name(review.failure or review.wait.reason)
        reason = reason.removeprefix("FAILURE_REASON_")
        tally.reviews[state if reason == "UNSPECIFIED" else f"{state} {reason}"] += 1
        if review.state not in _OVER and not review.HasField("wait"):
            tally.wrong.append(f"{review.name} is {state} and does not say why")
        completed = review.state == review_pb2.REVIEW_STATE_COMPLETED
        if completed and (not review.chunks_total or review.chunks_done != review.chunks_total):
            tally.wrong.append(
                f"{review.name} is COMPLETED with {review.chunks_done} of {review.chunks_total}"
            )
        if review.state == review_pb2.REVIEW_STATE_FAILED and reason != "AMBIGUOUS":
            # Nothing but processes was hurt: what was not under way may wait, and not fail.
            tally.wrong.append(f"{review.name} FAILED with {reason}")

    def _count(self, reviews: list[str], mark: int, tally: Tally) -> None:
        """Hold the calls that were stored against those that the emulator saw."""
        ids = [name.rsplit("/", 1)[1] for name in reviews]
        rows = self.sql(
            "select a.review_id, c.chunk_id, c.ambiguous from provider_call c"
            " join attempt a on a.id = c.attempt_id where a.review_id = any(%s)",
            ids,
        )
        chats = [
            call
            for call in self.stack.emulator.calls(since=mark)
            if call.kind == "chat"  # a validation's calls are free, and made again
        ]
        tally.seen, tally.rows = len(chats), len(rows)
        tally.unsent = max(0, len(rows) - len(chats))
        ambiguous = sum(row[2] for row in rows)
        if len(chats) > len(rows):
            tally.wrong.append(f"{len(chats)} calls were seen, {len(rows)} are stored")
        # A chunk has a second row where its runner knew that the first call was never sent.
        chunks = {(review, chunk) for review, chunk, _ in rows}
        again = len(rows) - len(chunks)
        if tally.unsent > ambiguous + again:
            tally.wrong.append(
                f"{tally.unsent} stored calls were not seen; {ambiguous} are AMBIGUOUS, and {again}"
                " were made again"
            )
        if len(chats) > len(chunks):
            tally.wrong.append(f"{len(chats)} calls were seen for {len(chunks)} chunks")


def active(key: key_pb2.Key) -> bool:
    """Whether reviews can run on a key."""
    return key.provider_key.state == custody_pb2.KEY_VERSION_STATE_ACTIVE


def _diff(files: int) -> bytes:
    """Return a diff of so many new files; four of them need two calls."""
    lines = "".join(f"+value_{number} = {'1' * 80}\n" for number in range(600))
    return "".join(
        f"diff --git a/app{number}.py b/app{number}.py\nnew file mode 100644\n--- /dev/null\n"
        f"+++ b/app{number}.py\n@@ -0,0 +1,600 @@\n{lines}"
        for number in range(files)
    ).encode()
