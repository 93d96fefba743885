"""`services.common.models`: model names and the catalog of what a call may hold."""

from __future__ import annotations

from pathlib import Path

import pytest

from services.common.models import (
    PROVIDERS,
    Catalog,
    Listing,
    ModelLimits,
    ModelRef,
    load,
    parse_model,
)


@pytest.fixture(scope="module")
def catalog() -> Catalog:
    return load(None)


@pytest.mark.parametrize("provider", PROVIDERS)
def test_defaults_are_known_models_that_parse(catalog: Catalog, provider: str) -> None:
    default = catalog.default(provider)
    assert parse_model(f"{provider}/{default}") == ModelRef(provider, default)
    known, fallback = catalog.window(provider, default), catalog.window(provider, "unheard-of")
    assert fallback.context_tokens < known.context_tokens
    assert fallback.max_output_tokens < known.max_output_tokens


@pytest.mark.parametrize(
    ("provider", "snapshot", "model"),
    [
        ("anthropic", "claude-haiku-4-5-20251001", "claude-haiku-4-5"),
        ("openai", "gpt-6.1-terra-2026-10-26", "gpt-6.1-terra"),
    ],
)
def test_a_snapshot_has_its_models_limits(
    catalog: Catalog, provider: str, snapshot: str, model: str
) -> None:
    assert catalog.window(provider, snapshot) == catalog.window(provider, model)
    assert catalog.window(provider, model) != catalog.window(provider, "unheard-of")


@pytest.mark.parametrize(
    ("model", "listed"),
    [
        ("gpt-6.1-terra", True),
        ("gpt-6.1-tera", False),
        ("claude-haiku-4-5", True),
        ("claude-sonnet-4-0", True),
        ("claude-haiku-4-5-latest", True),
        ("claude-haiku-4-5-20260101", False),
        ("claude-haiku-4", False),
    ],
)
def test_a_list_has_a_model_by_its_name_or_as_its_snapshot(model: str, listed: bool) -> None:
    ids = ["gpt-6.1-terra", "claude-haiku-4-5-20251001", "claude-sonnet-4-20250514"]
    assert (model in Listing(ids)) is listed


def test_unknown_provider(catalog: Catalog) -> None:
    for ask in (lambda: catalog.default("azure"), lambda: catalog.window("azure", "m")):
        with pytest.raises(ValueError, match="openai, anthropic, gemini"):
            ask()


@pytest.mark.parametrize(
    "text", ["openai/gpt-6.1-terra", "gemini/a:b_c.d", "anthropic/" + "m" * 100]
)
def test_parse_model(text: str) -> None:
    assert str(parse_model(text)) == text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gpt-5", "model: 'provider/model' expected, provider one of openai, anthropic, gemini"),
        ("", "model: 'provider/model' expected"),
        ("azure/gpt-5", "provider: one of openai, anthropic, gemini expected"),
        ("OpenAI/gpt-5", "provider: one of"),
        ("/gpt-5", "provider: one of"),
        ("openai/", "model: after the provider, 1 to 100"),
        ("openai/a/b", "model: after the provider"),
        ("openai/a b", "model: after the provider"),
        ("openai/a\n", "model: after the provider"),
        ("openai/é", "model: after the provider"),
        ("openai/" + "m" * 101, "model: after the provider"),
    ],
)
def test_parse_model_refuses(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_model(text)


def test_an_operators_file_is_laid_over(tmp_path: Path, catalog: Catalog) -> None:
    own = tmp_path / "models.toml"
    own.write_text(
        '[openai]\ndefault = "own"\n'
        "[openai.models]\nown = { context_tokens = 9000, max_output_tokens = 1000 }\n"
    )
    merged = load(own)
    assert merged.default("openai") == "own"
    assert merged.window("openai", "own") == ModelLimits(9000, 1000)
    for model in (catalog.default("openai"), "unheard-of"):
        assert merged.window("openai", model) == catalog.window("openai", model)
    assert merged.default("gemini") == catalog.default("gemini")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("not toml", "models.toml: "),
        ("[azure]\n", "tables openai, anthropic, gemini expected"),
        ("openai = 1\n", "tables openai"),
        ("[openai]\ndefalut = 'x'\n", r"\[openai\] has default"),
        ("[openai]\nmodels = 1\n", r"\[openai\] has default"),
        ("[openai]\ndefault = 'x'\n", "openai.default: a model of"),
        ("[openai]\ndefault = []\n", "openai.default: a model of"),
        ("[gemini]\nfallback = 1\n", "gemini.fallback: "),
        ("[gemini.models]\nm = { context_tokens = 1 }\n", "gemini.models.m: "),
        (
            "[gemini.models]\nm = { context_tokens = 5, max_output_tokens = 5 }\n",
            "gemini.models.m: ",
        ),
        (
            "[gemini.models]\nm = { context_tokens = true, max_output_tokens = 1 }\n",
            "gemini.models.m: ",
        ),
        (
            "[gemini.models]\n'a b' = { context_tokens = 5, max_output_tokens = 1 }\n",
            "gemini.models: a name",
        ),
    ],
)
def test_a_bad_file_is_refused_by_field(tmp_path: Path, text: str, message: str) -> None:
    own = tmp_path / "models.toml"
    own.write_text(text)
    with pytest.raises(ValueError, match=message):
        load(own)


def test_a_missing_file_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="absent"):
        load(tmp_path / "absent.toml")
