"""Exports: their structure, and what hostile words in a finding become."""

from __future__ import annotations

import json
import re
from typing import Any
from urllib.parse import unquote

import pytest
from byokeep.orchestrator.v1.review_pb2 import (
    Category,
    DiffSide,
    Finding,
    Review,
    ReviewState,
    Severity,
    UnreadPart,
    UnreadReason,
)
from markdown_it import MarkdownIt

from services.orchestrator.compute import exports

COMMIT = "0123456789abcdef0123456789abcdef01234567"
EXPORTS = [exports.text, exports.sarif, exports.github]


def finding(**fields: Any) -> Finding:
    return Finding(
        **{
            "path": "src/app.py",
            "start_line": 3,
            "end_line": 5,
            "severity": Severity.SEVERITY_HIGH,
            "category": Category.CATEGORY_CORRECTNESS,
            "title": "Wrong bound",
            "message": "The loop reads one item too many.",
            "suggestion": "Use `<`.",
        }
        | fields
    )


def review(*findings: Finding, **fields: Any) -> Review:
    return Review(
        **{
            "name": "tenants/demo/reviews/rev_1",
            "state": ReviewState.REVIEW_STATE_COMPLETED,
            "repository": "acme/shop",
            "pull_request": 7,
            "head_commit": COMMIT,
            "model": "openai/some-model",
            "findings": findings,
        }
        | fields
    )


def sarif_run(value: Review) -> dict[str, Any]:
    content, media_type = exports.sarif(value)
    assert media_type == "application/sarif+json"
    log = json.loads(content)
    assert log["version"] == "2.1.0"
    assert log["$schema"].endswith("sarif-schema-2.1.0.json")
    assert set(log) == {"$schema", "version", "runs"}
    (run,) = log["runs"]
    return run


def github_body(value: Review) -> dict[str, Any]:
    content, media_type = exports.github(value)
    assert media_type == "application/json"
    return json.loads(content)


def comment_of(**fields: Any) -> str:
    (comment,) = github_body(review(finding(**fields)))["comments"]
    return comment["body"]


def test_text_says_all() -> None:
    content, media_type = exports.text(review(finding(), dropped_findings=2))
    assert media_type == "text/plain; charset=utf-8"
    assert content == (
        "Review of acme/shop #7 at 0123456789ab by byokeep with openai/some-model:"
        " 1 finding (1 high)\n"
        "Dropped, for they named no line of the diff: 2\n"
        "\n"
        "src/app.py:3-5: high, correctness: Wrong bound\n"
        "    The loop reads one item too many.\n"
        "    Suggestion: Use `<`.\n"
    )


def test_no_findings() -> None:
    assert exports.text(review())[0].endswith(": no findings\n")
    run = sarif_run(review())
    assert run["results"] == []
    assert run["tool"]["driver"]["rules"] == []
    assert github_body(review())["comments"] == []


def test_an_unfinished_review_says_so() -> None:
    unfinished = review(
        finding(), state=ReviewState.REVIEW_STATE_FAILED, failure_message="Add a new key."
    )
    assert (
        "The review is failed; findings are not whole. Add a new key."
        in (exports.text(unfinished)[0])
    )
    (invocation,) = sarif_run(unfinished)["invocations"]
    assert invocation["executionSuccessful"] is False
    assert invocation["toolExecutionNotifications"] == [
        {"level": "error", "message": {"text": "The review is failed. Add a new key."}}
    ]
    assert "findings are not whole" in github_body(unfinished)["body"]


def test_what_nobody_read_is_in_every_form() -> None:
    partly = review(
        unread=[
            UnreadPart(path="img/a b.png", reason=UnreadReason.UNREAD_REASON_BINARY),
            UnreadPart(path="lib", reason=UnreadReason.UNREAD_REASON_SUBMODULE),
        ],
        unread_count=5,
    )
    assert exports.text(partly)[0].split("\n")[1:-1] == [
        "Read by no model: 5",
        "- img/a b.png (binary file)",
        "- lib (submodule: commits of another repository)",
        "- and 3 more",
    ]
    assert all(
        part in github_body(partly)["body"]
        for part in ("Read by no model\\: 5", r"img\/a b\.png \(binary file\)", "and 3 more")
    )
    (invocation,) = sarif_run(partly)["invocations"]
    assert invocation["executionSuccessful"] is True
    first, second, more = invocation["toolExecutionNotifications"]
    assert {one["level"] for one in (first, second, more)} == {"warning"}
    assert first["message"]["text"] == "Read by no model: binary file"
    assert first["locations"][0]["physicalLocation"]["artifactLocation"] == {
        "uri": "img/a%20b.png",
        "uriBaseId": "%SRCROOT%",
    }
    assert more["message"]["text"] == "Read by no model: 3 more"
    assert sarif_run(partly)["results"] == []


@pytest.mark.parametrize("reason", UnreadReason.values()[1:])
def test_every_reason_has_words(reason: UnreadReason.ValueType) -> None:
    partly = review(unread=[UnreadPart(path="x", reason=reason)], unread_count=1)
    assert "no reason given" not in exports.text(partly)[0]


def test_many_unread_parts_fit_a_comment_on_github() -> None:
    parts = [UnreadPart(path=f"{'*' * 1000}{n}", reason=1) for n in range(1000)]
    body = github_body(review(unread=parts, unread_count=9000))["body"]
    assert len(body) < 65_536
    assert "and 8980 more" in body


def test_sarif_has_what_the_schema_requires() -> None:
    """The output of these tests was also validated once against the OASIS schema itself."""
    run = sarif_run(review(finding(), finding(category=Category.CATEGORY_STYLE)))
    driver = run["tool"]["driver"]
    assert driver["name"] == "byokeep"
    assert [rule["id"] for rule in driver["rules"]] == ["correctness", "style"]
    for rule in driver["rules"]:
        assert rule["shortDescription"]["text"]
        assert rule["fullDescription"]["text"]
        assert rule["help"]["text"]
    first, second = run["results"]
    assert first["message"]["text"] == (
        "Wrong bound\n\nThe loop reads one item too many.\n\nSuggestion: Use `<`."
    )
    assert (first["ruleId"], first["ruleIndex"]) == ("correctness", 0)
    assert (second["ruleId"], second["ruleIndex"]) == ("style", 1)
    assert first["locations"] == [
        {
            "physicalLocation": {
                "artifactLocation": {"uri": "src/app.py", "uriBaseId": "%SRCROOT%"},
                "region": {"startLine": 3, "endLine": 5},
            }
        }
    ]
    assert "%SRCROOT%" in run["originalUriBaseIds"]


@pytest.mark.parametrize(
    ("severity", "level", "low", "high"),
    [
        (Severity.SEVERITY_CRITICAL, "error", 9.01, 10),
        (Severity.SEVERITY_HIGH, "error", 7, 8.9),
        (Severity.SEVERITY_MEDIUM, "warning", 4, 6.9),
        (Severity.SEVERITY_LOW, "note", 0.1, 3.9),
        (Severity.SEVERITY_INFO, "note", 0.1, 3.9),
    ],
)
def test_sarif_severity(severity: int, level: str, low: float, high: float) -> None:
    run = sarif_run(
        review(finding(severity=severity, category=Category.CATEGORY_SECURITY), finding())
    )
    result, plain = run["results"]
    assert result["level"] == level
    rule = run["tool"]["driver"]["rules"][result["ruleIndex"]]
    assert rule["id"] == result["ruleId"]
    assert "security" in rule["properties"]["tags"]
    for holder in (rule, result):
        assert low <= float(holder["properties"]["security-severity"]) <= high
    assert "security-severity" not in plain["properties"]


def test_an_enum_value_of_a_newer_version_is_no_error() -> None:
    newer = finding(severity=99, category=99)
    assert sarif_run(review(newer))["results"][0]["ruleId"] == "other"
    assert all(export(review(newer))[0] for export in EXPORTS)


def fingerprints(*findings: Finding) -> list[str]:
    return [
        result["partialFingerprints"]["byokeep/v1"]
        for result in sarif_run(review(*findings))["results"]
    ]


def test_fingerprints_outlive_moved_lines_and_new_words() -> None:
    moved = finding(start_line=40, end_line=41, title=" wrong  BOUND", message="Other words.")
    assert fingerprints(finding()) == fingerprints(moved)


@pytest.mark.parametrize(
    "change", [{"path": "b.py"}, {"title": "Else"}, {"category": Category.CATEGORY_STYLE}]
)
def test_fingerprints_tell_findings_apart(change: dict[str, Any]) -> None:
    assert fingerprints(finding()) != fingerprints(finding(**change))


def test_equal_findings_have_fingerprints_of_their_own() -> None:
    assert len(set(fingerprints(finding(), finding(), finding()))) == 3


@pytest.mark.parametrize(
    "path", ["src/größe.py", "docs/日本 語.md", "a b#c?d%20.py", "//evil.example/x", "x:y", "a\nb"]
)
def test_sarif_uris_are_relative_and_encoded(path: str) -> None:
    (result,) = sarif_run(review(finding(path=path)))["results"]
    uri = result["locations"][0]["physicalLocation"]["artifactLocation"]["uri"]
    assert re.fullmatch(r"(?!/)[A-Za-z0-9._~/%-]+", uri)
    assert unquote(uri) == path.lstrip("/")


def test_github_body() -> None:
    body = github_body(review(finding(), finding(start_line=9, end_line=9, suggestion="")))
    assert body["event"] == "COMMENT"
    assert body["commit_id"] == COMMIT
    assert "2 findings" in body["body"]
    several, one = body["comments"]
    assert several == {
        "path": "src/app.py",
        "line": 5,
        "side": "RIGHT",
        "start_line": 3,
        "start_side": "RIGHT",
        "body": "**high, correctness: Wrong bound**\n\nThe loop reads one item too many\\.\n\n"
        "Suggestion:\n\nUse `<`\\.",
    }
    assert one["line"] == 9
    assert "start_line" not in one
    assert "Suggestion" not in one["body"]


def test_lines_that_are_there_no_more_are_the_old_ones() -> None:
    """GitHub takes them on the LEFT. In SARIF a region is of the file as it is now, if there is
    one: the place stands in words."""
    value = review(finding(path="gone.py", side=DiffSide.DIFF_SIDE_OLD), finding())
    gone, there = github_body(value)["comments"]
    assert (gone["side"], gone["start_side"], gone["line"]) == ("LEFT", "LEFT", 5)
    assert there["side"] == "RIGHT"
    gone, there = sarif_run(value)["results"]
    (place,) = gone["locations"]
    assert place["physicalLocation"].keys() == {"artifactLocation"}
    assert gone["message"]["text"].startswith("At gone.py:3-5 before the change: Wrong bound")
    assert gone["level"] == "error"
    assert "region" in there["locations"][0]["physicalLocation"]
    assert "gone.py:3-5 before the change: high" in exports.text(value)[0]


def test_files_without_a_changed_line_are_named() -> None:
    value = review(skipped_files=["moved.py", "mode.sh"], skipped_count=3)
    for words in (exports.text(value)[0], github_body(value)["body"]):
        assert "so not read: 3" in words.replace("\\", "")
    notes = sarif_run(value)["invocations"][0]["toolExecutionNotifications"]
    assert [note["level"] for note in notes] == ["note", "note"]
    named = [one["locations"][0]["physicalLocation"]["artifactLocation"]["uri"] for one in notes]
    assert named == ["moved.py", "mode.sh"]


@pytest.mark.parametrize("commit", ["", "0123456", COMMIT[:39], COMMIT + "0", COMMIT[:39] + "\n"])
def test_github_gets_no_abbreviated_commit(commit: str) -> None:
    assert "commit_id" not in github_body(review(head_commit=commit))


def test_github_keeps_a_path_as_it_is() -> None:
    (comment,) = github_body(review(finding(path="docs/日本 語*.md")))["comments"]
    assert comment["path"] == "docs/日本 語*.md"


HOSTILE = [
    "\x1b[31mred\x1b[0m",
    "\x1b]8;;https://evil.example\x07click\x1b]8;;\x07",
    "\x9b2Jgone",
    "\x1b]0;title\x1b\\",
    "back\x08space\x00\x7f",
    "right\u202eto\u2066left",
    "zero\u200bwidth\ufefftag\U000e0041",
    "line\u2028separator\rreturn",
]


def words(export: Any, value: Review) -> str:
    """What a reader of the form sees of a finding."""
    if export is exports.text:
        return exports.text(value)[0]
    if export is exports.sarif:
        return sarif_run(value)["results"][0]["message"]["text"]
    # The zero-width spaces of _escape are ours.
    return github_body(value)["comments"][0]["body"].replace("\u200b", "")


@pytest.mark.parametrize("hostile", HOSTILE)
@pytest.mark.parametrize("field", ["title", "message", "suggestion", "path"])
@pytest.mark.parametrize("export", EXPORTS)
def test_no_terminal_sequences(export: Any, field: str, hostile: str) -> None:
    """Was shown to fail with _clean returning its argument."""
    seen = words(export, review(finding(**{field: hostile})))
    controls = "[\x00-\x09\x0b-\x1f\x7f-\x9f\u200b\u2028-\u202e\u2066-\u2069\ufeff\U000e0041]"
    assert not re.search(controls, seen)
    assert "31m" not in seen
    assert "8;;" not in seen


def test_a_title_is_one_line() -> None:
    """A title can't pretend to be another finding."""
    forged = "Fine\n\nsrc/other.py:1: critical, security: Forged\r\nmore"
    content, _ = exports.text(review(finding(title=forged, message="one\nsrc/x.py:1: two")))
    starts = [line for line in content.split("\n")[1:] if line and not line.startswith("    ")]
    assert starts == [
        "src/app.py:3-5: high, correctness: Fine src/other.py:1: critical, security: Forged more"
    ]


MARKDOWN = MarkdownIt("commonmark").enable(["table", "strikethrough"])
# What GitHub finds in text once it is rendered: mentions, references, bare links.
ACTIVE = re.compile(r"@\w|#\d|GH-\d|://|www\.", re.IGNORECASE)


def rendered(markdown: str) -> tuple[set[str], str]:
    """Kinds of what a Markdown text becomes, and its text outside code."""
    blocks = MARKDOWN.parse(markdown)
    inline = [token for block in blocks for token in block.children or []]
    return (
        {token.type for token in blocks + inline},
        "\n".join(token.content for token in inline if token.type == "text"),
    )


@pytest.mark.parametrize("field", ["title", "message", "suggestion"])
@pytest.mark.parametrize(
    "hostile",
    [
        "ping @octocat and @acme/team, mail a@example.com",
        "see #12, GH-34, acme/shop#5",
        "![](https://evil.example/pixel.png)",
        "[click](https://evil.example) [ref]\n\n[ref]: https://evil.example",
        "https://evil.example and www.evil.example <https://evil.example>",
        "<!-- hidden -->",
        "<img src=https://evil.example><details>",
        "&#64;octocat &lt;img&gt;",
        "# head\n> quote\n- item\n+ item\n1. item\n2) item\n\n---\n\nsetext\n===\n***",
        "|a|b|\n|-|-|\n|c|d|",
        "start\n\n    indented\n\n\tcode",
        "- [ ] task **bold** _it_ ~~gone~~ a\\\nb  \nc",
        r"backslashes \@octocat \\@octocat \\\![i](https://evil.example)",
        "``double `@octocat`` tail @octocat",
        "`` @octocat `",
        "`a``@octocat` `b` @octocat",
        "`code\\` @octocat `",
        "~~~\n@octocat\n~~~",
        "```\n<img>\n````\n@octocat\n```\n@octocat",
        "x ```\n@octocat",
        "```<img src=x>",
        "```\n<img src=x>",
        "``` `<img src=x>`",
        "> ```\n> @octocat\n@octocat",
    ],
)
def test_markdown_is_inert(field: str, hostile: str) -> None:
    """Was shown to fail with _escape returning its argument."""
    body = comment_of(**{"message": "m", "suggestion": "", field: hostile})
    kinds, outside_code = rendered(body)
    assert kinds <= {
        *("paragraph_open", "paragraph_close", "inline", "text", "softbreak", "text_special"),
        *("code_inline", "fence", "strong_open", "strong_close"),
    }
    assert not ACTIVE.search(outside_code)


def test_markdown_shows_the_words() -> None:
    """Escapes are seen by nobody."""
    message = "1. A* <b> [c](d) & e_f! \\ x"
    assert rendered(comment_of(message=message, suggestion=""))[1].endswith(message)


def test_code_stays_code() -> None:
    body = comment_of(
        message="Call `f(*a)`:\n```python\n@cache\ndef f(): return '````'\n```\nnot g_1.",
        suggestion="",
    )
    assert body.endswith(
        "Call `f(*a)`\\:\n`````\n@cache\ndef f(): return '````'\n`````\nnot g\\_1\\."
    )


def test_an_open_fence_swallows_nothing_after_it() -> None:
    body = comment_of(message="```\n<img src=x>", suggestion="after")
    assert body.endswith("```\n<img src=x>\n```\n\nSuggestion:\n\nafter")


@pytest.mark.timeout(10)
@pytest.mark.parametrize(
    "unit", ["`", "`a", "```x\n", "`a\n", "[", "\x1b]", "\x1b[0", "@", "\n ", " "]
)
def test_time_is_linear(unit: str) -> None:
    """A `([^`]*x[^`]*)` for code spans once took 7 s for one long line."""
    for message in (unit * (200_000 // len(unit)), "`" + unit * (200_000 // len(unit))):
        for export in EXPORTS:
            export(review(finding(message=message)))


def test_a_comment_fits_githubs_limit() -> None:
    body = comment_of(title="!" * 100_000, message="@a" * 100_000, suggestion="@1" * 100_000)
    assert len(body) < 65_536
    assert body.count("…") == 3
