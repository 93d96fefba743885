"""`byokeep review`: submit and follow a review; show, list, cancel, retry."""

from __future__ import annotations

import re
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from byokeep import names
from byokeep.cli import reviewinput
from byokeep.cli.errors import CliError, Exit, failure_exit
from byokeep.cli.output import message_dict, short
from byokeep.cli.reviewoutput import (
    TERMINAL,
    at_least,
    print_dry_run,
    print_review,
    print_reviews,
    progress_line,
    review_id,
)
from byokeep.cli.session import Format, Session, command, pages, request_id
from byokeep.cli.text import clean
from byokeep.cli.watch import until_done
from byokeep.orchestrator.v1 import review_pb2

if TYPE_CHECKING:
    from byokeep.orchestrator.v1.review_pb2 import Review

app = typer.Typer(invoke_without_command=True)

_ID = re.compile(r"rev_[0-9a-z]{26}")
_REQUEST_ID = re.compile(r"[A-Za-z0-9_-]{8,64}")
_WATCH_SECONDS = 24 * 3600.0
_EXPORTS = {
    Format.SARIF: review_pb2.EXPORT_FORMAT_SARIF,
    Format.GITHUB: review_pb2.EXPORT_FORMAT_GITHUB,
}


class FailOn(StrEnum):
    """Severities, worst last."""

    INFO = "info"
    LOW = "low"
    MEDIUM = "medium"
    HIGH = "high"
    CRITICAL = "critical"


FailOnOption = Annotated[
    FailOn | None,
    typer.Option(help="Exit 1 where a finding is as bad as this, or worse.", show_default=False),
]
Reference = Annotated[
    str,
    typer.Argument(metavar="ID", show_default=False, help="Id of a review, or its beginning."),
]


@app.callback(
    epilog="Examples:\n\n  byokeep review\n  byokeep review --base main --fail-on high\n"
    "  git show | byokeep review --diff - --title 'Fix login'\n"
    "  byokeep review --base origin/main --format sarif > review.sarif\n"
    "  byokeep review --dry-run"
)
@command(Format.SARIF, Format.GITHUB)
def review(
    session: Session,
    ctx: typer.Context,
    diff: Annotated[
        str | None, typer.Option(metavar="FILE|-", help="Unified diff; - is standard input.")
    ] = None,
    base: Annotated[
        str | None, typer.Option(metavar="REF", help="Review git diff REF...HEAD.")
    ] = None,
    repo: Annotated[
        str | None,
        typer.Option(metavar="OWNER/NAME", help="Default: git's origin, else the directory."),
    ] = None,
    pr: Annotated[int, typer.Option(min=0, help="Pull request, as a label.")] = 0,
    head: Annotated[
        str | None, typer.Option(metavar="COMMIT", help="Head commit, as a label; default: git's.")
    ] = None,
    title: Annotated[str, typer.Option(help="Title of the change.")] = "",
    description: Annotated[str, typer.Option(help="Description of the change.")] = "",
    context: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="File that explains the diff; may be repeated."),
    ] = None,
    guidance: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Guidance for the reviewer.")
    ] = None,
    model: Annotated[
        str, typer.Option(metavar="PROVIDER/MODEL", help="Default: as the settings say.")
    ] = "",
    user: Annotated[str, typer.Option(help="User on whose own key it runs.")] = "",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the calls that it would make; make none.")
    ] = False,
    fail_on: FailOnOption = None,
    detach: Annotated[
        bool, typer.Option("--detach", help="Submit, print the id, do not wait.")
    ] = False,
    request: Annotated[
        str | None,
        typer.Option(
            "--request-id", metavar="ID", help="The same id with the same content: the same review."
        ),
    ] = None,
) -> None:
    """Review a diff on the tenant's own key: --diff, --base, or what is not committed.

    With a subcommand: show, list, cancel or retry reviews. With --json: a line of JSON
    for every change of the review; the last one has its findings.
    """
    if ctx.invoked_subcommand is not None:
        return
    if request is not None and not _REQUEST_ID.fullmatch(request):
        raise CliError("--request-id takes 8 to 64 letters, digits, hyphens and underscores")
    given = reviewinput.Given(
        diff, base, repo, pr, head, title, description, context or [], guidance, model, user
    )
    content = reviewinput.build(given)
    if dry_run:
        _dry_run(session, content)
        return
    connection = session.connection
    submitted = connection.reviews.SubmitReview(
        review_pb2.SubmitReviewRequest(
            parent=connection.parent, input=content, request_id=request or request_id()
        )
    ).review
    if detach:
        _detached(session, submitted)
    else:
        _finish(session, _follow(session, submitted), fail_on)


@app.command(
    epilog="Examples:\n\n  byokeep review show rev_01k\n  byokeep review show rev_01k --watch"
)
@command(Format.SARIF, Format.GITHUB)
def show(
    session: Session,
    reference: Reference,
    watch: Annotated[bool, typer.Option("--watch", help="Follow it to its end.")] = False,
    fail_on: FailOnOption = None,
) -> None:
    """Show a review and its findings."""
    name = _find(session, reference)
    request = review_pb2.GetReviewRequest(name=name)
    found = session.connection.reviews.GetReview(request).review
    if watch and found.state not in TERMINAL:
        _finish(session, _follow(session, found), fail_on)
        return
    if session.out.as_json:
        session.out.json(message_dict(found))
    _finish(session, found, fail_on)


@app.command("list")
@command()
def list_(
    session: Session,
    repo: Annotated[str, typer.Option(metavar="OWNER/NAME", help="Only of this repository.")] = "",
    limit: Annotated[int, typer.Option(min=1, max=500, help="At most this many.")] = 20,
) -> None:
    """List reviews, newest first."""
    connection = session.connection
    reviews = connection.reviews.ListReviews(
        review_pb2.ListReviewsRequest(parent=connection.parent, page_size=limit, repository=repo)
    ).reviews
    if session.out.as_json:
        session.out.json({"reviews": [message_dict(entry) for entry in reviews]})
    elif reviews:
        print_reviews(session.out, reviews)
    else:
        session.out.print("there is no review yet; byokeep review submits one")


@app.command()
@command()
def cancel(session: Session, reference: Reference) -> None:
    """Cancel a review. A call that was already sent to the provider still bills."""
    request = review_pb2.CancelReviewRequest(
        name=_find(session, reference), request_id=request_id()
    )
    cancelled = session.connection.reviews.CancelReview(request).review
    if session.out.as_json:
        session.out.json(message_dict(cancelled))
    else:
        session.out.print(progress_line(cancelled))


@app.command()
@command()
def retry(session: Session, reference: Reference, fail_on: FailOnOption = None) -> None:
    """Start a new attempt of a failed review, and follow it."""
    request = review_pb2.RetryReviewRequest(name=_find(session, reference), request_id=request_id())
    again = session.connection.reviews.RetryReview(request).review
    _finish(session, _follow(session, again), fail_on)


def _dry_run(session: Session, content: review_pb2.ReviewInput) -> None:
    connection = session.connection
    answer = connection.reviews.DryRunReview(
        review_pb2.DryRunReviewRequest(parent=connection.parent, input=content)
    )
    if session.out.as_json:
        session.out.json(message_dict(answer))
    else:
        print_dry_run(session.out, answer)


def _detached(session: Session, submitted: Review) -> None:
    if session.out.as_json:
        session.out.json(message_dict(submitted))
        return
    session.out.print(review_id(submitted))
    session.out.note(f"follow it: byokeep review show {review_id(submitted)} --watch")


def _follow(session: Session, submitted: Review) -> Review:
    request = review_pb2.WatchReviewRequest(name=submitted.name)
    latest = submitted
    try:
        with session.out.progress(progress_line(latest)) as progress:
            for answer in until_done(
                lambda left: session.connection.reviews.WatchReview(request, timeout=left),
                _WATCH_SECONDS,
            ):
                latest = answer.review
                progress(progress_line(latest))
                if session.out.as_json:
                    session.out.json_line(message_dict(latest))
                if latest.state in TERMINAL:
                    return latest
    except KeyboardInterrupt:
        identifier = review_id(submitted)
        session.out.note(f"review {identifier} goes on", style="")
        session.out.note(f"  follow it: byokeep review show {identifier} --watch", style="cyan")
        session.out.note(f"  stop it:   byokeep review cancel {identifier}", style="cyan")
        raise
    raise CliError(
        "the stream ended before the review did",
        f"byokeep review show {review_id(submitted)} --watch",
        Exit.UNAVAILABLE,
    )


def _finish(session: Session, review: Review, fail_on: FailOn | None) -> None:
    if session.format in _EXPORTS:
        _export(session, review)
    elif not session.out.as_json:
        print_review(session.out, review)
    if review.state == review_pb2.REVIEW_STATE_FAILED:
        raise _failed(review)
    if review.state == review_pb2.REVIEW_STATE_CANCELLED:
        raise CliError("the review was cancelled", "", Exit.REVIEW_FAILED, "CANCELLED")
    if fail_on is not None and at_least(review, fail_on):
        session.out.note(f"there are findings of severity {fail_on} or worse")
        raise typer.Exit(Exit.FAIL_ON)


def _failed(review: Review) -> CliError:
    failure = short(review_pb2.FailureReason, review.failure)
    code = failure_exit(failure)
    identifier = review_id(review)
    hint = f"byokeep review retry {identifier}"
    if code == Exit.KEY and review.key_id:
        hint = f"byokeep key rotate {clean(review.key_id)}, then {hint}"
    message = clean(review.failure_message) or "the review failed"
    return CliError(message, hint, code, failure or "REVIEW_FAILED")


def _export(session: Session, review: Review) -> None:
    if review.state != review_pb2.REVIEW_STATE_COMPLETED:
        return
    request = review_pb2.ExportReviewRequest(name=review.name, format=_EXPORTS[session.format])
    content = session.connection.reviews.ExportReview(request).content
    print(clean(content, lines=True).rstrip("\n"))


def _find(session: Session, reference: str) -> str:
    connection = session.connection
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
