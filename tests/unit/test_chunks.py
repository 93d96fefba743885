"""`services.common.chunks`: borders, budgets, stable ids and an unforgeable rendering."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.common import chunks
from services.common.chunks import MIN_CHUNK_TOKENS, Chunk, estimate_tokens, plan
from services.common.diff import parse
from services.llm_runner import split

BUDGET = MIN_CHUNK_TOKENS


def added(path: str, lines: list[str], start: int = 1, header: str = "") -> str:
    """A file diff that adds lines in one hunk."""
    body = "".join(f"+{line}\n" for line in lines)
    return (
        f"diff --git a/{path} b/{path}\n{header}--- a/{path}\n+++ b/{path}\n"
        f"@@ -{start},0 +{start},{len(lines)} @@\n{body}"
    )


def planned(diff: str, budget: int = BUDGET, salt: str = "s") -> tuple[Chunk, ...]:
    return plan(parse(diff), budget, salt=salt)


def test_rendering() -> None:
    diff = (
        "diff --git a/old.py b/src/a b.py\nsimilarity index 50%\nrename from old.py\n"
        "rename to src/a b.py\n--- a/old.py\n+++ b/src/a b.py\n"
        "@@ -8,2 +9,3 @@ def f():\n keep\n-out\n+in\n+\tin 2\n"
        "@@ -99999,1 +100000,1 @@\n-x\n+y\n"
        "diff --git a/n b/n\nnew file mode 100644\n--- /dev/null\n+++ b/n\n@@ -0,0 +1 @@\n+n\n"
        "diff --git a/d b/d\ndeleted file mode 100644\n--- a/d\n+++ /dev/null\n@@ -1 +0,0 @@\n-d\n"
        "diff --git a/mode b/mode\nold mode 100644\nnew mode 100755\n"
    )
    (chunk,) = planned(diff)
    assert chunk.text.split("\n") == [
        "### src/a b.py",
        "#   renamed from old.py",
        "     9  keep",
        "       -out",
        "    10 +in",
        "    11 +\tin 2",
        "   ...",
        "       -x",
        "100000 +y",
        "### n",
        "#   new file",
        "     1 +n",
        "### d",
        "#   deleted file",
        "     1 -d",
    ]
    assert (chunk.index, chunk.files) == (0, ("src/a b.py", "n", "d"))
    assert chunk.estimated_tokens == estimate_tokens(chunk.text)


def test_content_cannot_start_or_break_a_line() -> None:
    """Shown to fail by rendering `line.text` without `_VISIBLE`."""
    evil = ["a\r### fake\r     1 +x", "b\x1b[31m\f\x85c\u2028### fake", "### x", "\t"]
    (chunk,) = planned(added("p", evil))
    assert chunk.text.splitlines() == [
        "### p",
        "     1 +a␍### fake␍     1 +x",
        "     2 +b␛[31m␌�c�### fake",
        "     3 +### x",
        "     4 +\t",
    ]


def test_carriage_returns_are_shown_only_where_they_differ() -> None:
    (chunk,) = planned(added("p", ["a\r", "b\r"]))
    assert "␍" not in chunk.text
    (chunk,) = planned("--- a/p\n+++ b/p\n@@ -1 +1 @@\n-a\n+a\r\n")
    assert chunk.text.endswith("       -a\n     1 +a␍")


def test_small_files_share_a_chunk_in_order_and_are_not_divided() -> None:
    files = [added(f"f{n}", ["x" * 60] * 20) for n in range(7)]
    assert [" ".join(c.files) for c in planned("".join(files))] == ["f0 f1", "f2 f3", "f4 f5", "f6"]


def test_large_file_is_divided_on_hunk_borders() -> None:
    hunks = "".join(
        f"@@ -{n}00,0 +{n}00,20 @@\n" + ("+" + "y" * 60 + "\n") * 20 for n in range(1, 6)
    )
    parts = planned(added("first", ["z"]) + "--- a/p\n+++ b/p\n" + hunks)
    assert [c.files for c in parts] == [("first",), ("p",), ("p",), ("p",)]
    assert [c.text.count("   ...") for c in parts] == [0, 1, 1, 0]
    assert all(c.text.startswith("### p\n") for c in parts[1:])


def test_large_hunk_is_divided_between_lines() -> None:
    parts = planned(added("p", ["y" * 60] * 200))
    assert len(parts) == 5
    assert all(len(c.text) > 0.9 * 3 * BUDGET for c in parts[:-1])
    assert parts[1].text.split("\n")[:2] == ["### p", "    45 +" + "y" * 60]


@pytest.mark.parametrize("budget", [BUDGET, 100_000])
@pytest.mark.parametrize("character", ["x", "é", "日", "😀"])
def test_huge_line_is_shown_in_pieces(budget: int, character: str) -> None:
    """Was shown to fail with a line that is cut."""
    line = character * (200_000 // len(character.encode())) + "os.system(x)"
    parts = planned(added("p", [line, "next"]), budget)
    rows = [row for part in parts for row in part.text.split("\n")[1:]]
    assert rows[-1] == "     2 +next"
    for part in parts:
        first, *others = part.text.split("\n")[1:]
        assert first[:8] == "     1 +"
        assert {row[:8] for row in others} <= {"     … +", "     2 +"}
    assert "".join(row[8:] for row in rows[:-1]) == line
    assert min(len(row.encode()) for row in rows[:-2]) > 0.9 * min(
        budget * 3, chunks.MAX_LINE_BYTES
    )


def test_a_part_of_a_hunk_begins_with_a_number() -> None:
    """Was shown to fail without it, of chunks and of halves: no finding could name a line there."""
    wide = 123_456_789
    removed = "".join(f"-{'x' * 16_372}\n" for _ in range(9))
    lines = f"{removed}-{'y' * 99_000}\n+{'z' * 99_000}\n"
    parts = planned(f"--- a/p\n+++ b/p\n@@ -{wide},10 +{wide} @@\n{lines}", 16_000)
    halves = [half for part in parts for half in split.halve(part)]
    for chunks_of_it in (parts, halves):
        firsts = {chunk.text.split("\n")[1][:11] for chunk in chunks_of_it}
        assert firsts == {f"{wide} -", f"{wide} +"}
        shown = "".join(chunk.text for chunk in chunks_of_it)
        assert [shown.count(letter) for letter in "xyz"] == [lines.count(one) for one in "xyz"]


def test_a_part_of_a_hunk_takes_no_number_of_another() -> None:
    rows = ["### p", "     1 +a", "   ...", "       -b", "     9 +c", "   ...", "    20 +d"]
    assert chunks.beginning(rows, 3) == "     9 -b"
    assert chunks.beginning(rows[:4], 3) == "       -b"


def test_a_piece_of_a_removed_line_has_no_number() -> None:
    (chunk,) = planned(f"--- a/p\n+++ b/p\n@@ -1 +1 @@\n-{'x' * 20_000}\n+y\n", 100_000)
    rows = [row[:9] for row in chunk.text.split("\n")[1:]]
    assert rows == ["       -x", "     … -x", "     1 +y"]


@pytest.mark.parametrize(
    ("header", "rows"),
    [
        ("old mode 100644\nnew mode 100755\nindex 1..2\n", ["#   mode 100755"]),
        ("new file mode 120000\nindex 0000000..2\n", ["#   new file", "#   mode 120000"]),
        ("index 1..2 120000\n", ["#   mode 120000"]),
        ("index 1..2 100644\n", []),
        ("new file mode 100644\nindex 0000000..2\n", ["#   new file"]),
    ],
)
def test_a_mode_that_is_not_plain_is_shown(header: str, rows: list[str]) -> None:
    (chunk,) = planned(added("p", ["x"], header=header))
    assert chunk.text.split("\n") == ["### p", *rows, "     1 +x"]


def test_longest_headers_fit_the_smallest_budget() -> None:
    old, new = "o" * 1024, "n" * 1024
    diff = (
        f"diff --git a/{old} b/{new}\nold mode 100644\nnew mode 100755\n"
        f"rename from {old}\nrename to {new}\n"
        f"--- a/{old}\n+++ b/{new}\n@@ -1,0 +1,3 @@\n" + ("+" + "x" * 5000 + "\n") * 3
    )
    parts = planned(diff)
    assert sum(c.text.count("x") for c in parts) == 15_000
    assert all(c.estimated_tokens <= BUDGET for c in parts)


def test_budget_has_a_floor() -> None:
    with pytest.raises(ValueError, match="max_tokens_per_chunk"):
        planned(added("p", ["x"]), MIN_CHUNK_TOKENS - 1)


def test_ids_depend_on_salt_and_text_alone() -> None:
    one = added("p", ["x" * 60] * 40)
    two = added("q", ["y" * 60] * 40)
    first, second = planned(one + two)
    assert first.id == planned(one)[0].id
    assert second.id == planned(two)[0].id
    assert first.id != planned(one, salt="other")[0].id
    assert re.fullmatch("[0-9a-f]{64}", first.id)


def test_the_same_change_twice_has_two_ids() -> None:
    one = added("p", ["x" * 60] * 40)
    first, again = planned(one + one)
    assert first.text == again.text
    assert first.id != again.id


TEXT = st.text(
    st.characters(exclude_characters="\n\0", exclude_categories=["Cs"]), max_size=30
) | st.sampled_from(["w" * 900, "日" * 700, "v" * 4000])


@settings(max_examples=120, deadline=None)
@given(
    st.lists(st.lists(TEXT, min_size=1, max_size=60), min_size=1, max_size=6),
    st.integers(BUDGET, 3 * BUDGET),
)
def test_every_added_line_once_and_no_chunk_above_budget(
    files: list[list[str]], budget: int
) -> None:
    diff = "".join(added(f"f{n}", lines) for n, lines in enumerate(files))
    parts = planned(diff, budget)
    assert parts == planned(diff, budget)
    assert [c.index for c in parts] == list(range(len(parts)))
    assert len({c.id for c in parts}) == len(parts)
    seen = []
    for chunk in parts:
        assert 0 < chunk.estimated_tokens <= budget
        path = ""
        for line in chunk.text.split("\n"):
            if line.startswith("### "):
                path = line[4:]
            elif match := re.fullmatch(r" *([0-9]+) \+(.*)", line, re.DOTALL):
                begun = seen.pop()[2] if seen and seen[-1][:2] == (path, int(match[1])) else ""
                seen.append((path, int(match[1]), begun + match[2]))
            else:
                path_before, number, text = seen.pop()
                assert (path_before, line[:8]) == (path, "     … +")
                seen.append((path, number, text + line[8:]))
        assert chunk.files[-1] == path
    assert [part[:2] for part in seen] == [
        (f"f{n}", i + 1) for n, lines in enumerate(files) for i in range(len(lines))
    ]
    whole = [line for lines in files for line in lines]
    assert [len(text) for *_, text in seen] == [len(line) for line in whole]
