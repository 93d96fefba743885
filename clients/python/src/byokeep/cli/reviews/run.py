"""Following a review to its end, and ending as it did."""

from __future__ import annotations

import contextlib
import copy
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import typer

from byokeep import names
from byokeep.cli.base import checked, interrupt
from byokeep.cli.base.errors import CliError, Exit, failure_exit, failure_hint
from byokeep.cli.base.output import message_dict, short
from byokeep.cli.base.session import Format, Session, pages
from byokeep.cli.base.text import clean, count
from byokeep.cli.reviews.output import (
    at_least,
    print_review,
    progress_line,
    review_id,
)
from byokeep.orchestrator.v1 import review_pb2

if TYPE_CHECKING:
    from byokeep.orchestrator.v1.review_pb2 import Review

_ID = re.compile(r"rev_[0-9a-z]{26}")
_EXPORTS = {
    Format.SARIF: review_pb2.EXPORT_FORMAT_SARIF,
    Format.GITHUB: review_pb2.EXPORT_FORMAT_GITHUB,
}


def follow(session: Session, submitted: Review) -> Review:
    """Show a review as it goes on, and return it as it ended.

    Raises:
        CliError: the stream ended before the review did.
        KeyboardInterrupt: after saying how to follow or stop it.
    """
    try:
        return _watch(session, submitted)
    except (KeyboardInterrupt, Exception) as error:
        if not isinstance(error, KeyboardInterrupt) and not interrupt.seen():
            raise
        identifier = review_id(submitted)
        session.out.note(f"review {identifier} goes on", style="")
        session.out.note(f"  follow it: byokeep review show {identifier} --watch", style="cyan")
        session.out.note(f"  stop it:   byokeep review cancel {identifier}", style="cyan")
        raise KeyboardInterrupt from None


def _watch(session: Session, submitted: Review) -> Review:
    from byokeep.edge import TERMINAL
    from byokeep.errors import WatchTimeoutError

    latest = submitted
    with (
        session.out.progress(progress_line(latest)) as progress,
        contextlib.suppress(WatchTimeoutError),
    ):
        for answer in session.connection.watch_review(submitted.name):
            latest = answer.review
            progress(progress_line(latest), progress_line(_steady(latest)))
            if session.out.as_json:
                session.out.json_line(message_dict(latest))
    if latest.state in TERMINAL:
        return latest
    raise CliError(
        "the review did not end in time",
        f"byokeep review show {review_id(submitted)} --watch",
        Exit.UNAVAILABLE,
    )


def _steady(review: Review) -> Review:
    """Return a review with what changes all the time as it never is: it counts that it is there."""
    steady = copy.deepcopy(review)
    steady.answer_bytes = min(review.answer_bytes, 1)
    steady.progress.place = min(review.progress.place, 1)
    if review.wait.HasField("next_try_time"):
        steady.wait.next_try_time.FromSeconds(0)
    return steady


@dataclass(frozen=True, slots=True)
class Gate:
    """What makes a command of a review exit with more than 0 though the review is completed."""

    severity: str | None = None
    unread: bool = False

    @classmethod
    def of(cls, fail_on: str | None, fail_on_unread: bool | None) -> Gate:
        """Return the gate of the two options; what nobody read passes none by default."""
        return cls(fail_on, fail_on is not None if fail_on_unread is None else fail_on_unread)

    @property
    def closed(self) -> bool:
        """Whether there is anything that does not pass."""
        return self.unread or self.severity is not None


def finish(session: Session, review: Review, gate: Gate) -> None:
    """Print a review in the chosen form, and end as it did.

    Raises:
        CliError: it failed or was cancelled, or has not ended and there is a gate.
        typer.Exit: it does not pass the gate.
    """
    from byokeep.edge import TERMINAL

    ended = review.state in TERMINAL
    if session.format in _EXPORTS:
        if ended:
            _export(session, review)
    elif not session.out.as_json:
        print_review(session.out, review)
    if review.state == review_pb2.REVIEW_STATE_FAILED:
        raise _failed(review)
    if review.state == review_pb2.REVIEW_STATE_CANCELLED:
        raise _cancelled(review)
    if gate.closed and not ended:
        follow_it = f"byokeep review show {review_id(review)} --watch"
        raise CliError("the review has not ended yet", follow_it, Exit.REVIEW_FAILED, "NOT_ENDED")
    if gate.severity is not None and at_least(review, gate.severity):
        session.out.note(f"there are findings of severity {gate.severity} or worse")
        raise typer.Exit(Exit.FAIL_ON)
    if gate.unread and review.dropped_findings:
        session.out.note(
            f"{count(review.dropped_findings, 'finding')} dropped, of a severity that nobody knows;"
            " --no-fail-on-unread passes"
        )
        raise typer.Exit(Exit.UNREAD)
    check_unread(session, review.unread_count, gate)


def check_unread(session: Session, number: int, gate: Gate) -> None:
    """Say how many parts no model reads. Raises typer.Exit: there are some, and the gate is closed
    for them."""
    if gate.unread and number:
        session.out.note(
            f"{count(number, 'part')} of the diff not read by any model; --no-fail-on-unread passes"
        )
        raise typer.Exit(Exit.UNREAD)


def _cancelled(review: Review) -> CliError:
    if not review.superseded_by:
        return CliError("the review was cancelled", "", Exit.REVIEW_FAILED, "CANCELLED")
    newer = names.last_of(review.superseded_by)
    return CliError(
        f"a newer commit of pull request {review.pull_request} is reviewed instead, as {newer}",
        f"byokeep review show {newer} --watch",
        Exit.REVIEW_FAILED,
        "SUPERSEDED",
    )


def _failed(review: Review) -> CliError:
    failure = short(review_pb2.FailureReason, review.failure)
    code = failure_exit(failure)
    message = clean(review.failure_message) or "the review failed"
    identifier = review_id(review)
    hint = failure_hint(failure, clean(review.key_id), identifier, managed=review.managed_key)
    return CliError(message, hint, code, failure or "REVIEW_FAILED")


def _export(session: Session, review: Review) -> None:
    request = review_pb2.ExportReviewRequest(name=review.name, format=_EXPORTS[session.format])
    content = session.connection.reviews.ExportReview(request).content
    print(clean(content, lines=True).rstrip("\n"))


def find(session: Session, reference: str) -> str:
    """Return the resource name of a review, from its id or a unique beginning of it."""
    connection = session.connection
    reference = checked.last_part(reference, connection.tenant, "reviews")
    if _ID.fullmatch(reference):
        return names.review_name(connection.tenant, reference)
    request = review_pb2.ListReviewsRequest(parent=connection.parent, page_size=500)
    found = [
        review.name
        for review in pages(connection.reviews.ListReviews, request, "reviews")
        if review_id(review).startswith(reference)
        or review_id(review).removeprefix("rev_").startswith(reference)
    ]
    if len(found) == 1 and reference:
        return str(found[0])
    what = "no review has" if not found else f"{len(found)} reviews have"
    raise CliError(f"{what} an id that begins like this", "byokeep review list")
