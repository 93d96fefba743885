"""`services.llm_runner.findings`: only what the diff has, clean, once, and in order."""

from __future__ import annotations

import unicodedata
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.common.chunks import Chunk, plan
from services.common.diff import Diff, parse
from services.llm_runner.findings import MAX_FINDINGS, MAX_TEXT, MAX_TITLE, Accepted, accept

DIFF = parse(
    "--- a/x.py\n+++ b/x.py\n@@ -9,3 +10,4 @@\n a\n-b\n+B\n+B2\n c\n@@ -50,1 +51,1 @@\n-d\n+D\n"
    "--- a/a.py\n+++ b/a.py\n@@ -1 +1 @@\n-a\n+b\n"
    "--- a/gone.py\n+++ /dev/null\n@@ -1 +0,0 @@\n-a\n"
    "--- a/emptied.py\n+++ b/emptied.py\n@@ -2,2 +1,0 @@\n-a\n-b\n@@ -9 +7 @@\n-c\n+d\n"
)
(CHUNK,) = plan(DIFF, 2000, salt="")


def raw(**changes: object) -> dict[str, Any]:
    finding = {
        "path": "x.py",
        "start_line": 11,
        "end_line": 12,
        "severity": "high",
        "category": "correctness",
        "title": "Title",
        "message": "Message",
        "suggestion": "Suggestion",
    }
    return finding | changes


def accepted(*items: object, diff: Diff = DIFF, chunk: Chunk = CHUNK) -> Accepted:
    return accept(items, diff, chunk)


def test_a_good_finding_is_kept_as_it_is() -> None:
    result = accepted(raw())
    (finding,) = result.findings
    assert {name: getattr(finding, name) for name in raw()} == raw()
    assert result.dropped == 0


@pytest.mark.parametrize(
    "item",
    [
        None,
        "text",
        [],
        {},
        raw(path="other.py"),
        raw(path="b/x.py"),
        raw(path=None),
        raw(path="gone.py", start_line=2),
        raw(path="emptied.py", start_line=4),
        raw(start_line=9),
        raw(start_line=14),
        raw(start_line=50),
        raw(start_line=0),
        raw(start_line=-1),
        raw(start_line="11"),
        raw(start_line=11.0),
        raw(path="a.py", start_line=True),
        raw(severity="urgent"),
        raw(severity=[]),
        raw(category=None),
        raw(category={}),
        raw(title=""),
        raw(title=" \x1b[0m\n"),
        raw(title=7),
        raw(message=None),
    ],
)
def test_an_unusable_finding_is_dropped_and_counted(item: object) -> None:
    result = accepted(item, raw())
    assert (len(result.findings), result.dropped) == (1, 1)


@pytest.mark.parametrize(
    ("start", "end", "expected"),
    [(11, 99, 13), (11, 51, 13), (12, 3, 12), (13, None, 13), (10, True, 10), (51, 51, 51)],
)
def test_the_end_is_moved_into_the_hunk(start: int, end: object, expected: int) -> None:
    (finding,) = accepted(raw(start_line=start, end_line=end)).findings
    assert (finding.start_line, finding.end_line) == (start, expected)


@pytest.mark.parametrize(
    ("path", "start", "expected"),
    [("gone.py", 1, (1, 1)), ("emptied.py", 2, (2, 3)), ("emptied.py", 3, (3, 3))],
)
def test_where_the_change_leaves_no_line_the_old_ones_count(
    path: str, start: int, expected: tuple[int, int]
) -> None:
    """Shown to fail where findings on deleted files are dropped: no --fail-on saw them."""
    (finding,) = accepted(raw(path=path, start_line=start, end_line=99)).findings
    assert (finding.start_line, finding.end_line) == expected
    assert finding.old_side
    (beside,) = accepted(raw(path="emptied.py", start_line=7, end_line=7)).findings
    assert not beside.old_side
    # The model is shown the numbers that count.
    assert "### gone.py\n#   deleted file\n     1 -a" in CHUNK.text
    assert "     2 -a\n     3 -b\n   ...\n       -c\n     7 +d" in CHUNK.text


def test_a_file_of_another_chunk_is_dropped() -> None:
    chunk = Chunk(0, "", "", ("a.py",), 1)
    assert accepted(raw(), chunk=chunk) == Accepted((), 1)


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("a\x1b[31;1mred\x1b[0m", "ared"),
        ("a\x1b]8;;http://evil\x07link\x1b]8;;\x1b\\", "alink"),
        ("a\x1b]0;unterminated", "a0;unterminated"),
        ("a\x9b2Jb\x9d0;t\x9cc", "abc"),
        ("a\x1bcb\x1b(Bc\x1b", "abc"),
        ("a\x00\x07\x08\x7fb", "ab"),
        ("a\u202eb\u2066c\u200bd\ufeff\U000e0041", "abcd"),
        ("a\ud800b\ue000", "ab"),
        ("tab\tstays", "tab\tstays"),
        ("a\r\nb\u2028c\rd", "a\nb\ncd"),
        ("日本 é 😀", "日本 é 😀"),
    ],
)
def test_text_is_harmless_on_a_terminal(text: str, clean: str) -> None:
    """Shown to fail by returning `value` from `_clean` as it is."""
    (finding,) = accepted(raw(title=text, message=text, suggestion=text)).findings
    assert (finding.message, finding.suggestion) == (clean, clean)
    assert finding.title == clean.replace("\n", " ")


@pytest.mark.parametrize("start", ["\x9d", "\x1b]", "\x1b[", "\x9b0"])
def test_unterminated_sequences_take_linear_time(start: str) -> None:
    assert len(accepted(raw(message="m" + start * 100_000)).findings) == 1


def test_texts_are_cut() -> None:
    long = "x" * 9000
    (finding,) = accepted(raw(title=long, message=long, suggestion=long)).findings
    assert finding.title == "x" * (MAX_TITLE - 1) + "…"
    assert finding.message == finding.suggestion == "x" * (MAX_TEXT - 1) + "…"


def test_a_missing_suggestion_is_empty() -> None:
    (finding,) = accepted(raw(suggestion=None)).findings
    assert finding.suggestion == ""


def test_repetitions_count_once_as_the_worst() -> None:
    result = accepted(raw(severity="low"), raw(severity="critical", title="TITLE"), raw())
    assert [f.severity for f in result.findings] == ["critical"]
    assert result.dropped == 0


def test_order_is_by_path_line_and_severity() -> None:
    items = [
        raw(start_line=51, title="5"),
        raw(severity="info", title="4"),
        raw(severity="critical", title="2"),
        raw(severity="medium", title="3"),
        raw(path="a.py", start_line=1, title="1"),
    ]
    assert [f.title for f in accepted(*items).findings] == ["1", "2", "3", "4", "5"]
    assert accepted(*items) == accepted(*reversed(items))


def test_a_flood_keeps_the_worst() -> None:
    flood = [raw(title=str(n), severity="low") for n in range(MAX_FINDINGS + 5)]
    result = accepted(*flood, raw(severity="critical", start_line=51))
    assert (len(result.findings), result.dropped) == (MAX_FINDINGS, 6)
    assert result.findings[-1].severity == "critical"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        JSON | st.builds(lambda name, value: raw(**{name: value}), st.sampled_from([*raw()]), JSON),
        max_size=6,
    ),
)
def test_any_json_gives_findings_in_the_diff(items: list[object]) -> None:
    result = accepted(*items)
    assert len(result.findings) + result.dropped <= len(items)
    for finding in result.findings:
        assert finding.start_line <= finding.end_line
        assert {finding.start_line, finding.end_line} <= DIFF.reviewable_lines(finding.path)
        for text in (finding.title, finding.message, finding.suggestion):
            assert not {
                unicodedata.category(c) for c in text.replace("\n", "").replace("\t", "")
            } & {
                "Cc",
                "Cf",
                "Cs",
            }
