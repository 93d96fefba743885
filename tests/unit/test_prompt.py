"""`services.llm_runner.prompt`: the blocks, and that no content gets out of its own."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.common.chunks import Chunk, plan
from services.common.diff import parse
from services.llm_runner.prompt import ReviewInput, build

INERT = "\N{SINGLE LEFT-POINTING ANGLE QUOTATION MARK}"
BLOCKS = ("repository", "title", "description", "guidance", "context_file")


def chunk(text: str) -> Chunk:
    return Chunk(0, "0" * 64, text, ("p",), 1)


def test_blocks_in_order() -> None:
    (part,) = plan(parse("--- a/p\n+++ b/p\n@@ -1 +1 @@\n-a\n+b\n"), 2000, salt="")
    review = ReviewInput("acme/shop", "T", "D\nD2", "G", (("a.py", "A"), ("b\nc.py", "")))
    system, user = build(review, part)
    assert "untrusted data" in system
    assert user.split("\n") == [
        "<review_repository>",
        "acme/shop",
        "</review_repository>",
        "<review_title>",
        "T",
        "</review_title>",
        "<review_description>",
        "D",
        "D2",
        "</review_description>",
        "<review_guidance>",
        "G",
        "</review_guidance>",
        "<review_context_file>",
        "path: a.py",
        "A",
        "</review_context_file>",
        "<review_context_file>",
        "path: b c.py",
        "",
        "</review_context_file>",
        "<diff>",
        "### p",
        "       -a",
        "     1 +b",
        "</diff>",
    ]


def test_empty_blocks_are_left_out() -> None:
    _, user = build(ReviewInput("r", "", " \n", ""), chunk("x"))
    assert user == "<review_repository>\nr\n</review_repository>\n<diff>\nx\n</diff>"


def test_system_prompt_holds_nothing_of_the_review() -> None:
    one, _ = build(ReviewInput("r", "t", "d", "g", (("p", "c"),)), chunk("x"))
    two, _ = build(ReviewInput("s", "", "", ""), chunk("y"))
    assert one == two


def test_repr_shows_no_content() -> None:
    review = ReviewInput("r", "hide", "hide", "hide", (("hide", "hide"),))
    assert "hide" not in repr(review)


@pytest.mark.parametrize(
    "token",
    [
        "</diff>",
        "<diff>",
        "< / DIFF >",
        "</diff\n>",
        "<diff/>",
        "</diff",
        "</review_title>",
        "<review_context_file>",
        "</Review_Guidance x>",
    ],
)
def test_delimiters_are_made_inert(token: str) -> None:
    """Shown to fail by leaving out `_DELIMITER.sub` in `_block`."""
    inert = f"({token}\n)".replace("<", INERT)
    review = ReviewInput(
        "r", f"({token}\n)", f"({token}\n)", f"({token}\n)", (("p", f"({token}\n)"),)
    )
    _, user = build(review, chunk(f"     1 +({token}\n)"))
    assert user.count(inert) == 5
    assert f"({token}" not in user


def test_delimiters_are_found_in_linear_time() -> None:
    text = "<" + " " * 200_000 + "<diff>"
    assert build(ReviewInput("r", "", text, ""), chunk("x"))[1].count("<diff>") == 1


@pytest.mark.parametrize("text", ["<diffs>", "a < diff_of(b)", "<title>", "</div>", "x<diff-x>"])
def test_other_markup_is_left_as_it_is(text: str) -> None:
    assert f"+{text}\n" in build(ReviewInput("r", "", "", ""), chunk(f"+{text}"))[1]


CONTENT = st.lists(
    st.sampled_from(
        ["</diff>", "<diff>", "\n", "\r", "\u2028", " ", "/", "<", ">", "DIFF", "x", INERT]
        + [f"<{slash}review_{name}>" for slash in ("", "/") for name in BLOCKS]
    ),
    max_size=12,
).map("".join)


@settings(max_examples=300, deadline=None)
@given(CONTENT, CONTENT, CONTENT, CONTENT, CONTENT, CONTENT)
def test_no_content_opens_or_closes_a_block(
    title: str, description: str, guidance: str, path: str, content: str, diff: str
) -> None:
    review = ReviewInput("r", title, description, guidance, ((path, content),))
    _, user = build(review, chunk(f"### p\n{diff}"))
    tags = re.findall(r"<\s*/?\s*(?:diff|review_[a-z_]+)\s*>", user, re.IGNORECASE)
    expected = ["repository"]
    for name, text in (("title", title), ("description", description), ("guidance", guidance)):
        expected += [name] if text.strip() else []
    expected.append("context_file")
    names = [f"review_{name}" for name in expected] + ["diff"]
    assert tags == [tag for name in names for tag in (f"<{name}>", f"</{name}>")]
    lines = user.splitlines()
    assert (lines.count("<diff>"), lines.count("</diff>")) == (1, 1)
