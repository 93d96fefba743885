"""A review as people read it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING

from byokeep import names
from byokeep.cli.base.errors import wait_hint
from byokeep.cli.base.output import Output, short, state_text, when
from byokeep.cli.base.text import clean, count
from byokeep.orchestrator.v1 import review_pb2

if TYPE_CHECKING:
    from rich.text import Text

SEVERITIES = ("critical", "high", "medium", "low", "info")
_WHY_FALLBACK = {
    "NOT_USABLE": "the key can't use that, by its provider's list",
    "NOT_FOUND": "the provider does not know that, or not for this key",
}
_WHY_UNREAD = {
    "BINARY": "binary file",
    "SUBMODULE": "submodule: commits of another repository",
    "POINTER": "pointer of Git LFS or git-annex: its content is elsewhere",
    "NOT_SHOWN": "named in the diff without its text",
}
_MOST_NAMED = 20
_STYLES = {
    "critical": "bold white on red",
    "high": "bold red",
    "medium": "yellow",
    "low": "cyan",
    "info": "dim",
}


def review_id(review: review_pb2.Review) -> str:
    """Return a review's id."""
    return names.last_of(review.name)


def severity(finding: review_pb2.Finding) -> str:
    """Return `critical` … `info`."""
    return short(review_pb2.Severity, finding.severity).lower()


def at_least(review: review_pb2.Review, threshold: str) -> bool:
    """Return whether a finding is as bad as the threshold, or worse."""
    limit = review_pb2.Severity.Value(f"SEVERITY_{threshold.upper()}")
    return any(finding.severity >= limit for finding in review.findings)


def progress_line(review: review_pb2.Review) -> str:
    """Return what a running review is doing, in a line."""
    state = short(review_pb2.ReviewState, review.state).lower()
    parts = [f"review {review_id(review)} {state}"]
    if review.chunks_total:
        parts.append(f"{review.chunks_done} of {count(review.chunks_total, 'chunk')}")
    if review.model:
        parts.append(clean(review.model))
    if review.finding_count or review.findings:
        parts.append(count(review.finding_count or len(review.findings), "finding"))
    if review.answer_bytes:
        parts.append(f"{-(-review.answer_bytes // 1024)} KiB of an answer")
    if review.attempts > 1:
        parts.append(f"attempt {review.attempts}")
    if review.superseded_by:
        parts.append(f"superseded by {names.last_of(review.superseded_by)}")
    parts += _now(review.progress)
    if review.HasField("wait"):
        parts[0] = f"review {review_id(review)} waits since {when(review.wait.since)}"
        hint = _wait_hint(review)
        parts.append(f"{wait_reason(review)}: {wait_text(review)}{f' → {hint}' if hint else ''}")
    return ", ".join(parts)


def _wait_hint(review: review_pb2.Review) -> str:
    return wait_hint(wait_reason(review), clean(review.key_id), managed=review.managed_key)


def _now(progress: review_pb2.ReviewProgress) -> list[str]:
    if progress.stage == review_pb2.REVIEW_STAGE_QUEUED and progress.place:
        return [f"number {progress.place} in the queue"]
    if progress.stage == review_pb2.REVIEW_STAGE_LEASING:
        return ["a runner gets the key"]
    if progress.stage == review_pb2.REVIEW_STAGE_CALLING:
        return [f"the provider reads chunk {progress.chunk}"]
    return []


def wait_reason(review: review_pb2.Review) -> str:
    """Return the reason for which a review waits, or an empty text."""
    return short(review_pb2.FailureReason, review.wait.reason) if review.HasField("wait") else ""


def wait_text(review: review_pb2.Review) -> str:
    """Return why a review waits, when it is tried again, and when it is given up."""
    wait = review.wait
    again = f" Next try at {when(wait.next_try_time)}." if wait.HasField("next_try_time") else ""
    return f"{clean(wait.message)}{again} It fails with this at {when(wait.give_up_time)}."


def print_review(out: Output, review: review_pb2.Review) -> None:
    """Print findings by file, then a line that sums them up, and what it waits for."""
    from rich.text import Text

    ordered = sorted(review.findings, key=lambda finding: (finding.path, finding.start_line))
    for path, findings in groupby(ordered, key=lambda finding: finding.path):
        out.print(clean(path), style="bold")
        for finding in findings:
            _print_finding(out, finding)
    _print_skipped(out, review.skipped_files, review.skipped_count)
    _print_unread(out, review.unread, review.unread_count)
    out.print(_closing(review))
    if review.chosen_model:
        fallback = short(review_pb2.ModelFallback, review.model_fallback)
        why = _WHY_FALLBACK.get(fallback, fallback)
        out.print(f"model  in place of {clean(review.chosen_model)}: {why}", style="yellow")
    if review.key_version:
        hint = f"  {clean(review.key_hint)}" if review.key_hint else ""
        hint += "  managed by the operator" if review.managed_key else ""
        out.print(f"key    {clean(review.key_id)} v{review.key_version}{hint}", style="dim")
    if now := _now(review.progress):
        out.print(f"now    {', '.join(now)}")
    if review.HasField("wait"):
        since = when(review.wait.since)
        out.hanging(
            Text("waits  "), Text(f"{wait_reason(review)} since {since}: {wait_text(review)}")
        )
        if hint := _wait_hint(review):
            out.hanging(Text("       "), Text(f"→ {hint}"))
    if review.ambiguous_calls:
        out.warn(
            f"lost answers of provider calls: {review.ambiguous_calls};"
            " such a call may be on the bill, so it was not repeated"
        )


def print_reviews(out: Output, reviews: Sequence[review_pb2.Review]) -> None:
    """Print a table of reviews, each that waits with its reason."""
    columns = ("ID", "STATE", "REPOSITORY", "PR", "MODEL", "FINDINGS", "SUBMITTED")
    out.table(
        columns,
        [
            (
                review_id(review),
                _state(review),
                clean(review.repository),
                f"#{review.pull_request}" if review.pull_request else "-",
                clean(review.model),
                str(review.finding_count),
                when(review.create_time),
            )
            for review in reviews
        ],
    )


def _state(review: review_pb2.Review) -> Text:
    state = state_text(short(review_pb2.ReviewState, review.state))
    more = "superseded" if review.superseded_by else wait_reason(review)
    return state.append(f" {more}", style="dim") if more else state


def print_dry_run(out: Output, answer: review_pb2.DryRunReviewResponse) -> None:
    """Print the calls that a review would make."""
    out.table(
        ("CALL", "TOKENS (EST.)", "FILES"),
        [
            (str(number), str(chunk.estimated_tokens), clean(", ".join(chunk.files)))
            for number, chunk in enumerate(answer.chunks, 1)
        ],
    )
    _print_skipped(out, answer.skipped_files, answer.skipped_count)
    _print_unread(out, answer.unread, answer.unread_count)
    if answer.chosen_model:
        why = _WHY_FALLBACK["NOT_USABLE"]
        out.print(f"in place of {clean(answer.chosen_model)}: {why}", style="yellow")
    out.print(
        f"{count(answer.calls, 'call')} to {clean(answer.model)} on key {clean(answer.key_id)};"
        f" at most {answer.max_calls_per_review} are allowed; none was made"
    )


def _print_skipped(out: Output, paths: Sequence[str], number: int) -> None:
    shown = paths[:_MOST_NAMED]
    for path in shown:
        out.print(f"skipped: {clean(path)} (no line is changed)", style="dim")
    if number > len(shown) and paths:
        out.print(f"skipped: {number - len(shown)} more", style="dim")


def _print_unread(out: Output, parts: Sequence[review_pb2.UnreadPart], number: int) -> None:
    shown = parts[:_MOST_NAMED]
    for part in shown:
        reason = short(review_pb2.UnreadReason, part.reason)
        why = _WHY_UNREAD.get(reason, reason)
        out.print(f"read by no model: {clean(part.path)} ({why})", style="yellow")
    if number > len(shown) and parts:
        out.print(f"read by no model: {number - len(shown)} more", style="yellow")


def _print_finding(out: Output, finding: review_pb2.Finding) -> None:
    from rich.text import Text

    level = severity(finding)
    category = short(review_pb2.Category, finding.category).lower()
    lines = f"{finding.start_line}"
    if finding.end_line > finding.start_line:
        lines += f"-{finding.end_line}"
    if finding.side == review_pb2.DIFF_SIDE_OLD:
        lines += " before the change"
    head = Text("  ")
    head.append(f"{clean(finding.path)}:{lines}", style="underline")
    head.append("  ")
    head.append(f" {level.upper()} " if level == "critical" else level.upper(), _STYLES.get(level))
    head.append(f"  {category}  ", style="dim")
    head.append(clean(finding.title), style="bold")
    out.print(head)
    for text, mark, style in (
        (finding.message, "", ""),
        (finding.suggestion, "→ ", "green"),
    ):
        if text.strip():
            for line in (mark + clean(text, lines=True).strip()).split("\n"):
                out.hanging(Text("    "), Text(line, style=style))
    out.print()


def _closing(review: review_pb2.Review) -> Text:
    from rich.text import Text

    line = Text()
    counts = Counter(severity(finding) for finding in review.findings)
    if counts:
        line.append(f"{count(len(review.findings), 'finding')}: ", "bold")
        for number, level in enumerate(level for level in SEVERITIES if counts[level]):
            line.append(", " if number else "")
            line.append(f"{counts[level]} {level}", style=_STYLES[level])
        line.append("; ")
    elif review.state == review_pb2.REVIEW_STATE_COMPLETED:
        line.append("no findings", style="green").append("; ", style="default")
    if review.dropped_findings:
        line.append(f"{review.dropped_findings} dropped (not on lines of the diff); ")
    if review.unread_count:
        line.append(f"{count(review.unread_count, 'part')} read by no model; ", style="yellow")
    line.append(f"{count(review.calls_started, 'call')} to {clean(review.model)}")
    if review.HasField("end_time"):
        spent = review.end_time.ToDatetime() - review.create_time.ToDatetime()
        line.append(f" in {spent.total_seconds():.1f} s")
    line.append(f"; review {review_id(review)} ", style="")
    line.append_text(state_text(short(review_pb2.ReviewState, review.state)))
    return line
