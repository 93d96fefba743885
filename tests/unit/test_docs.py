"""Pages link to what is there, and the reference says all that the code has."""

from __future__ import annotations

import dataclasses
import re

import pytest
from byokeep.common.v1 import error_reason_pb2

from docs import generate, site
from services.keyvault import config as keyvault
from services.llm_runner import config as llm_runner
from services.orchestrator import config as orchestrator
from services.orchestrator.policy import failures


@pytest.fixture(scope="module")
def pages() -> dict[str, str]:
    return generate.pages()


@pytest.mark.parametrize("module", [keyvault, orchestrator, llm_runner])
def test_each_setting_stands_in_the_reference(module, pages) -> None:
    text = pages["configuration.md"]
    for field in dataclasses.fields(module.Settings):
        assert f"| `BYOKEEP_{field.name.upper()}` | " in text


def test_each_reason_stands_in_the_reference_with_code_meaning_and_example(pages) -> None:
    rows = [line.split(" | ") for line in pages["errors.md"].splitlines() if line[:3] == "| `"]
    assert [row[0].strip("| `") for row in rows] == [
        name.removeprefix("ERROR_REASON_")
        for name, number in error_reason_pb2.ErrorReason.items()
        if number
    ]
    for _, code, meaning, example in rows:
        assert code.isupper()
        assert meaning
        assert example.startswith("`{")


def test_each_method_names_its_callers(pages) -> None:
    rows = [line.split(" | ") for line in pages["methods.md"].splitlines() if line[:3] == "| `"]
    assert len(rows) > 50
    assert [row[0] for row in rows if row[1] in ("", "-") or not row[3].strip(" |")] == []


def test_operations_says_what_follows_from_each_failure() -> None:
    text = (site.CHECKOUT / "docs" / "operations.md").read_text()
    rows = [line.split(" | ") for line in text.splitlines() if line[:3] == "| `"]
    told = [
        (reason, row[1].upper())
        for row in rows
        if row[1] in ("wait", "retry", "end")
        for reason in re.findall(r"`(\w+)`", row[0])
    ]
    assert sorted(told) == sorted((name, row.follows.name) for name, row in failures.TABLE.items())


def test_the_waiting_review_in_the_readme_says_what_the_table_says() -> None:
    text = " ".join((site.CHECKOUT / "README.md").read_text().split())
    shown = re.search(r"waits ([A-Z_]+) since \S+ \S+: (.+?) It fails with this at", text)
    assert shown
    key = re.search(r"key_\w{26}", shown[2])
    assert key
    assert shown[2] == failures.waiting_sentence(shown[1], key=key[0])


def test_every_page_links_to_what_is_there() -> None:
    found = site.sources()
    for page in found:
        site.rewritten(page, found)


def test_a_link_to_nothing_stops_the_build(tmp_path) -> None:
    page = tmp_path / "README.md"
    page.write_text("[here](docs/gone.md)")
    with pytest.raises(site.BrokenLinkError, match=r"README\.md links to docs/gone\.md"):
        site.rewritten(page, {page: "index.md"}, tmp_path)


def test_a_link_to_a_page_is_followed_and_one_to_a_file_becomes_its_path(tmp_path) -> None:
    (tmp_path / "docs").mkdir()
    page, other, code = tmp_path / "docs/a.md", tmp_path / "SECURITY.md", tmp_path / "Makefile"
    for file in (other, code):
        file.touch()
    page.write_text("[s](../SECURITY.md#x) [m](../Makefile) [web](https://example.com)")
    text = site.rewritten(page, {page: "deep/a.md", other: "SECURITY.md"}, tmp_path)
    assert text == "[s](../SECURITY.md#x) m (`Makefile`) [web](https://example.com)"
