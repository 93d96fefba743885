"""Every command in a page is run by a test, or says why it is not; what it names is there."""

from __future__ import annotations

import importlib.util
import re
import shlex
from collections.abc import Iterator

import pytest
import typer
from byokeep.cli.app import app
from typer.core import TyperGroup

from tests.harness import pages
from tests.harness.pages import ROOT, Block

# What somebody types or pastes; the others are shown, or data.
_RUN = {"sh", "python"}
_SHOWN = {"console", "text", "mermaid", "toml", "yaml", "ini", "hcl"}
# What stands before a command in a line of sh.
_BEFORE = r"(?:[^#\n]*(?:[|;&(] *|xargs [-\w ]*)|(?:\.venv/bin/)?)"
BLOCKS = list(pages.blocks())


def _name(block: Block) -> str:
    return f"{block.page}-{block.says or block.text[:30]}"


@pytest.mark.parametrize("block", BLOCKS, ids=_name)
def test_a_block_is_run_by_a_test_or_says_why_not(block: Block):
    assert block.language in _RUN | _SHOWN, "a block says what it is"
    if block.language in _SHOWN:
        return
    assert block.mark, "a block of commands has `<!-- tested: NAME -->` or `<!-- untested: WHY -->`"
    if block.mark == "tested":
        assert any(_takes(path.read_text(), block) for path in ROOT.glob("tests/**/*.py"))
    else:
        assert len(block.says) > 20
        for named in re.findall(r"(?:tests|\.ci)/[\w/.]+\w", block.says):
            assert (ROOT / named).exists()


def _takes(source: str, block: Block) -> bool:
    """Whether a test asks for a block, by its page or by its own PAGE."""
    by_page = f'block("{block.page}", "{block.says}")' in source
    return by_page or (
        f'PAGE = "{block.page}"' in source and f'block(PAGE, "{block.says}")' in source
    )


def test_names_of_blocks_are_unique_and_no_fence_is_missed():
    names = [(block.page, block.says) for block in BLOCKS if block.mark == "tested"]
    assert len(names) == len(set(names))
    fences = sum(
        len(re.findall(r"^ *```", (ROOT / page).read_text(), re.M))
        for page in {block.page for block in BLOCKS}
    )
    assert fences == 2 * len(BLOCKS)


def _typed(program: str) -> Iterator[tuple[str, list[str]]]:
    """Yield each call of a program in a page, with its words up to a pipe, comment or the like."""
    for page, span in pages.spans(rf"{program}( |$)"):
        yield page, _words(span)
    for block in BLOCKS:
        if block.language in ("sh", "console"):
            prompt = r"\$ " if block.language == "console" else _BEFORE
            for line in re.findall(rf"^{prompt}{program}( .*)?$", block.text, re.M):
                yield block.page, [program, *_words(line)]


def _words(line: str) -> list[str]:
    before = re.split(r"\s#|[|;><&]", line)[0]
    return shlex.split(before, posix=True)


@pytest.mark.parametrize(("page", "words"), list(_typed("byokeep")), ids=str)
def test_a_command_that_a_page_names_is_there_with_its_options(page: str, words: list[str]):
    command = typer.main.get_command(app)
    options = set[str]()
    seen = list[str]()
    for word in words[1:]:
        options |= {name for each in command.params for name in each.opts + each.secondary_opts}
        if isinstance(command, TyperGroup) and word in command.commands:
            command = command.commands[word]
            continue
        if isinstance(command, TyperGroup) and not word.startswith("-") and not seen:
            assert not re.match(r"[a-z][a-z-]+$", word), f"no command {word} in `{' '.join(words)}`"
        if word.startswith("-") and word != "-":
            seen.append(word.partition("=")[0])
    options |= {name for each in command.params for name in each.opts + each.secondary_opts}
    assert [name for name in seen if name not in options] == []


@pytest.mark.parametrize(("page", "words"), list(_typed("make")), ids=str)
def test_a_target_that_a_page_names_is_there(page: str, words: list[str]):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    assert {word for word in words[1:] if re.match(r"[a-z-]+$", word)} <= targets


@pytest.mark.parametrize(("page", "words"), list(_typed("python -m")), ids=str)
def test_a_module_that_a_page_runs_is_there(page: str, words: list[str]):
    module = next(word for word in words if word not in ("python", "-m", "python -m"))
    assert importlib.util.find_spec(module)
