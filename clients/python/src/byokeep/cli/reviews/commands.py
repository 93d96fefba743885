"""`byokeep review`: submit and follow a review; show, list, cancel, retry, delete."""

from __future__ import annotations

import re
from collections.abc import Sequence
from enum import StrEnum
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from byokeep.cli.base.confirm import confirm
from byokeep.cli.base.errors import CliError, Exit
from byokeep.cli.base.output import message_dict
from byokeep.cli.base.session import Format, Session, command, examples, pages, request_id
from byokeep.cli.base.text import clean, count
from byokeep.cli.reviews import input as reviewinput
from byokeep.cli.reviews.filter import (
    BeforeOption,
    FailureOption,
    Given,
    PrOption,
    RepoOption,
    SinceOption,
    StateOption,
    UserOption,
)
from byokeep.cli.reviews.output import (
    print_dry_run,
    print_reviews,
    progress_line,
    review_id,
)
from byokeep.cli.reviews.run import Gate, check_unread, find, finish, follow
from byokeep.names import last_of
from byokeep.orchestrator.v1 import review_pb2

if TYPE_CHECKING:
    from byokeep.orchestrator.v1.review_pb2 import Review

app = typer.Typer(invoke_without_command=True)

_REQUEST_ID = re.compile(r"[A-Za-z0-9_-]{8,64}")


class FailOn(StrEnum):
    """Severities, worst last."""

    INFO = "info"
    LOW = "low"
    MEDIUM = "medium"
    HIGH = "high"
    CRITICAL = "critical"


class Priority(StrEnum):
    """Which of a tenant's waiting reviews go first."""

    INTERACTIVE = "interactive"
    BATCH = "batch"


FailOnOption = Annotated[
    FailOn | None,
    typer.Option(help="Exit 1 where a finding is as bad as this, or worse.", show_default=False),
]
FailOnUnreadOption = Annotated[
    bool | None,
    typer.Option(
        "--fail-on-unread/--no-fail-on-unread",
        help="Exit 8 where a part of the diff is read by no model, or a finding was dropped;"
        " default: with --fail-on.",
        show_default=False,
    ),
]
Reference = Annotated[
    str,
    typer.Argument(metavar="ID", show_default=False, help="Id of a review, or its beginning."),
]
SomeReference = Annotated[
    str | None,
    typer.Argument(metavar="[ID]", show_default=False, help="Id of a review, or its beginning."),
]
_PAGE = 500


@app.callback(
    epilog=examples(
        "byokeep review",
        "byokeep review --base main --fail-on high",
        "git show | byokeep review --diff - --title 'Fix login'",
        "byokeep review --base origin/main --format sarif > review.sarif",
        "byokeep review --dry-run",
    )
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
    pr: Annotated[
        int, typer.Option(min=0, max=2_147_483_647, help="Pull request, as a label.")
    ] = 0,
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
    user: Annotated[
        str, typer.Option(help="User that submits it, and on whose own key it runs.")
    ] = "",
    key: Annotated[
        str, typer.Option(help="Name or id of the key that it runs on; default: byokeep key order.")
    ] = "",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the calls that it would make; make none.")
    ] = False,
    fail_on: FailOnOption = None,
    fail_on_unread: FailOnUnreadOption = None,
    priority: Annotated[
        Priority, typer.Option(help="Batch goes after the tenant's interactive reviews.")
    ] = Priority.INTERACTIVE,
    keep: Annotated[
        bool,
        typer.Option(
            "--keep", help="Older reviews of the pull request go on; else this one ends them."
        ),
    ] = False,
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

    With a subcommand: show, list, cancel, retry or delete reviews. With --json: a line of JSON
    for every change of the review; the last one has its findings.
    """
    if ctx.invoked_subcommand is not None:
        return
    if request is not None and not _REQUEST_ID.fullmatch(request):
        raise CliError("--request-id takes 8 to 64 letters, digits, hyphens and underscores")
    if dry_run and session.format not in (Format.TEXT, Format.JSON):
        raise CliError("--dry-run finds nothing that could be exported: it takes text or json")
    gate = Gate.of(fail_on, fail_on_unread)
    if dry_run and fail_on is not None:
        raise CliError("--dry-run finds nothing to fail on: it takes --fail-on-unread alone")
    if detach and gate.closed:
        raise CliError(
            "--detach does not wait for what --fail-on and --fail-on-unread look at",
            "byokeep review show ID --watch --fail-on SEVERITY",
        )
    given = reviewinput.Given(
        diff, base, repo, pr, head, title, description, context or [], guidance, model, user, key
    )
    content = reviewinput.build(given, session.out.note)
    if dry_run:
        _dry_run(session, content, gate)
        return
    from byokeep.edge import SUBMIT_SECONDS

    connection = session.connection
    submission = review_pb2.SubmitReviewRequest(
        parent=connection.parent,
        input=content,
        request_id=request or request_id(),
        priority=review_pb2.Priority.Value(f"PRIORITY_{priority.upper()}"),
        keep_older=keep,
    )
    # A service that is busy takes it later: whoever waits sees for what.
    with session.out.progress("submitting"):
        answer = connection.reviews.SubmitReview(submission, timeout=SUBMIT_SECONDS)
    submitted = answer.review
    if detach:
        _detached(session, submitted)
    else:
        finish(session, follow(session, submitted), gate)


@app.command(epilog=examples("byokeep review show rev_01k", "byokeep review show rev_01k --watch"))
@command(Format.SARIF, Format.GITHUB)
def show(
    session: Session,
    reference: Reference,
    watch: Annotated[bool, typer.Option("--watch", help="Follow it to its end.")] = False,
    fail_on: FailOnOption = None,
    fail_on_unread: FailOnUnreadOption = None,
) -> None:
    """Show a review and its findings."""
    from byokeep.edge import TERMINAL

    gate = Gate.of(fail_on, fail_on_unread)
    name = find(session, reference)
    found = session.connection.get_review(name)
    if watch and found.state not in TERMINAL:
        finish(session, follow(session, found), gate)
        return
    if session.out.as_json:
        session.out.json(message_dict(found))
    finish(session, found, gate)


@app.command(
    "list",
    epilog=examples(
        "byokeep review list --repo acme/shop --pr 7",
        "byokeep review list --state failed --since 1d --limit 500",
    ),
)
@command()
def list_(
    session: Session,
    state: StateOption = None,
    failure: FailureOption = None,
    repo: RepoOption = "",
    pr: PrOption = 0,
    user: UserOption = "",
    since: SinceOption = "",
    before: BeforeOption = "",
    limit: Annotated[int, typer.Option(min=1, max=100_000, help="At most this many.")] = 20,
) -> None:
    """List reviews, newest first."""
    connection = session.connection
    wanted = Given(state or [], failure or [], repo, pr, user, since, before).message()
    request = review_pb2.ListReviewsRequest(
        parent=connection.parent, page_size=min(limit + 1, _PAGE), filter=wanted
    )
    found = list(islice(pages(connection.reviews.ListReviews, request, "reviews"), limit + 1))
    reviews = found[:limit]
    if session.out.as_json:
        session.out.json({"reviews": [message_dict(entry) for entry in reviews]})
    elif reviews:
        print_reviews(session.out, reviews)
    elif wanted.ListFields():
        session.out.print("there is no such review")
    else:
        session.out.print("there is no review yet; byokeep review submits one")
    if len(found) > limit:
        session.out.note(f"there are more: --limit {10 * limit}")


@app.command(
    epilog=examples(
        "byokeep review cancel rev_01k",
        "byokeep review cancel --repo acme/shop --pr 7",
    )
)
@command()
def cancel(
    session: Session,
    reference: SomeReference = None,
    state: StateOption = None,
    repo: RepoOption = "",
    pr: PrOption = 0,
    user: UserOption = "",
    since: SinceOption = "",
    before: BeforeOption = "",
) -> None:
    """Cancel a review, or all that the options name. A call that was already sent to the provider
    still bills."""
    wanted = Given(state or [], [], repo, pr, user, since, before).message()
    reviews = session.connection.reviews
    if _is_one(reference, wanted, "cancel"):
        request = review_pb2.CancelReviewRequest(
            name=find(session, reference or ""), request_id=request_id()
        )
        cancelled = reviews.CancelReview(request).review
        if session.out.as_json:
            session.out.json(message_dict(cancelled))
        else:
            session.out.print(progress_line(cancelled))
        return
    many = review_pb2.CancelReviewsRequest(
        parent=session.connection.parent, filter=wanted, request_id=request_id()
    )
    names = list(pages(reviews.CancelReviews, many, "names"))
    _tell(session, names, "cancelled")


@app.command(
    epilog=examples(
        "byokeep review retry rev_01k",
        "byokeep review retry --failure quota-exhausted --since 1d",
    )
)
@command()
def retry(
    session: Session,
    reference: SomeReference = None,
    failure: FailureOption = None,
    repo: RepoOption = "",
    pr: PrOption = 0,
    user: UserOption = "",
    since: SinceOption = "",
    before: BeforeOption = "",
    fail_on: FailOnOption = None,
    fail_on_unread: FailOnUnreadOption = None,
) -> None:
    """Start a new attempt of a failed review, and follow it; or of all failed ones that the options
    name, which go on by themselves. Chunks that are done are not sent again."""
    wanted = Given([], failure or [], repo, pr, user, since, before).message()
    gate = Gate.of(fail_on, fail_on_unread)
    reviews = session.connection.reviews
    if _is_one(reference, wanted, "retry"):
        request = review_pb2.RetryReviewRequest(
            name=find(session, reference or ""), request_id=request_id()
        )
        finish(session, follow(session, reviews.RetryReview(request).review), gate)
        return
    if gate.closed:
        raise CliError("--fail-on and --fail-on-unread look at one review: give its id")
    many = review_pb2.RetryReviewsRequest(
        parent=session.connection.parent, filter=wanted, request_id=request_id()
    )
    refused: list[review_pb2.RetryReviewsResponse.Refused] = []

    def page(asked: review_pb2.RetryReviewsRequest) -> review_pb2.RetryReviewsResponse:
        answer: review_pb2.RetryReviewsResponse = reviews.RetryReviews(asked)
        refused.extend(answer.refused)
        return answer

    names = list(pages(page, many, "names"))
    _tell(session, names, "queued again", refused)


@app.command(epilog=examples("byokeep review delete rev_01k"))
@command()
def delete(
    session: Session,
    reference: Reference,
    yes: Annotated[bool, typer.Option("--yes", help="Don't ask.")] = False,
) -> None:
    """Delete a review with its findings and what is kept of its diff. Can't be undone; the audit
    log keeps every lease of its key."""
    name = find(session, reference)
    confirm(f"Delete {last_of(name)} and its findings?", yes=yes)
    request = review_pb2.DeleteReviewRequest(name=name, request_id=request_id())
    session.connection.reviews.DeleteReview(request)
    if session.out.as_json:
        session.out.json({"name": name, "deleted": True})
    else:
        session.out.print(f"deleted {last_of(name)}")


def _is_one(reference: str | None, wanted: review_pb2.ReviewFilter, what: str) -> bool:
    """Whether one review is meant. Raises CliError: neither one nor some, or both."""
    if (reference is None) is not bool(wanted.ListFields()):
        raise CliError(
            "give the id of a review, or options that say which, and not both",
            f"byokeep review {what} --help",
        )
    return reference is not None


def _tell(
    session: Session,
    names: Sequence[str],
    what: str,
    refused: Sequence[review_pb2.RetryReviewsResponse.Refused] = (),
) -> None:
    """Say which reviews something was done to. Raises CliError: to some it could not be."""
    if session.out.as_json:
        others = [message_dict(one) for one in refused]
        session.out.json({"names": list(names), "refused": others})
    else:
        for name in names:
            session.out.print(last_of(name))
        session.out.note(f"{count(len(names), 'review')} {what}")
        for one in refused:
            session.out.warn(f"{last_of(one.name)} is not: {clean(one.message)}")
    if refused:
        raise typer.Exit(Exit.REVIEW_FAILED)


def _dry_run(session: Session, content: review_pb2.ReviewInput, gate: Gate) -> None:
    connection = session.connection
    answer = connection.reviews.DryRunReview(
        review_pb2.DryRunReviewRequest(parent=connection.parent, input=content)
    )
    if session.out.as_json:
        session.out.json(message_dict(answer))
    else:
        print_dry_run(session.out, answer)
    check_unread(session, answer.unread_count, gate)


def _detached(session: Session, submitted: Review) -> None:
    if session.out.as_json:
        session.out.json(message_dict(submitted))
        return
    session.out.print(review_id(submitted))
    session.out.note(f"follow it: byokeep review show {review_id(submitted)} --watch")
