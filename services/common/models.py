"""Model names, each provider's default, and how much a call to a model may hold."""

from __future__ import annotations

import itertools
import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

PROVIDERS: Final = ("openai", "anthropic", "gemini")

_BUILT_IN: Final = Path(__file__).with_name("data") / "models.toml"
_MODEL: Final = re.compile(r"[A-Za-z0-9._:-]{1,100}")
#: Most models that are kept of one key: a provider's list may have any length.
MAX_LISTED: Final = 1_000
_SNAPSHOT: Final = re.compile(r"-(?:[0-9]{8}|[0-9]{4}-[0-9]{2}-[0-9]{2})$")
# claude-sonnet-4-0, claude-3-7-sonnet-latest: the newest snapshot, by names that no list has.
_ALIAS: Final = re.compile(r"-(?:0|latest)$")


def listed(ids: Iterable[str]) -> list[str]:
    """Return those of a provider's ids that can be models' names: at most one more than
    `MAX_LISTED`, which says that there were more."""
    return list(itertools.islice(filter(_MODEL.fullmatch, ids), MAX_LISTED + 1))


class Listing:
    """What a provider lists, ready to be asked for many models."""

    def __init__(self, ids: Iterable[str]) -> None:
        """Take names as a provider lists them."""
        self._names = frozenset(ids)
        self._undated = frozenset(_SNAPSHOT.sub("", one) for one in self._names)

    def __contains__(self, model: str) -> bool:
        """Whether a model is there: by its name, or as a dated snapshot of it."""
        return model in self._names or not self._undated.isdisjoint({model, _ALIAS.sub("", model)})


@dataclass(frozen=True, slots=True)
class ModelRef:
    """A model of a provider; `str` gives the form that settings and commands use."""

    provider: str
    model: str

    def __str__(self) -> str:
        """`provider/model`."""
        return f"{self.provider}/{self.model}"


@dataclass(frozen=True, slots=True)
class ModelLimits:
    """What a call may hold, in the provider's tokens: prompt and answer together, and answer."""

    context_tokens: int
    max_output_tokens: int


@dataclass(frozen=True, slots=True)
class _Provider:
    default: str
    fallback: ModelLimits
    models: Mapping[str, ModelLimits]


@dataclass(frozen=True, slots=True)
class Catalog:
    """What is known of models. Unknown providers raise `ValueError`; unknown models don't."""

    _providers: Mapping[str, _Provider]

    def default(self, provider: str) -> str:
        """The model that reviews use where nobody chose one; without the provider."""
        return self._providers[_provider(provider)].default

    def window(self, provider: str, model: str) -> ModelLimits:
        """Limits of a model, of the model whose dated snapshot it is, or a small fallback."""
        known = self._providers[_provider(provider)]
        undated = _SNAPSHOT.sub("", model)
        return known.models.get(model) or known.models.get(undated) or known.fallback


def parse_model(text: str) -> ModelRef:
    """Read `provider/model`. Raises `ValueError` with a text for people, without the input."""
    provider, slash, model = text.partition("/")
    if not slash:
        raise ValueError(f"model: 'provider/model' expected, provider one of {_listed()}")
    _provider(provider)
    if not _MODEL.fullmatch(model):
        raise ValueError(
            "model: after the provider, 1 to 100 letters, digits, '.', '_', ':' or '-' expected"
        )
    return ModelRef(provider, model)


def load(path: Path | None) -> Catalog:
    """Read the built-in catalog, with the operator's file laid over it.

    The file has the form of `data/models.toml` and holds only what differs. Raises `ValueError`
    that names file and field, and `OSError` where the file can't be read.
    """
    tables = _read(_BUILT_IN)
    if path is not None:
        for provider, table in _read(path).items():
            tables[provider] = _overlay(tables.get(provider, {}), table)
    return Catalog({name: _parse(name, tables[name]) for name in PROVIDERS})


def _listed() -> str:
    return ", ".join(PROVIDERS)


def _provider(name: str) -> str:
    if name not in PROVIDERS:
        raise ValueError(f"provider: one of {_listed()} expected")
    return name


def _read(path: Path) -> dict[str, Any]:
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    for provider, table in tables.items():
        if provider not in PROVIDERS or not isinstance(table, dict):
            raise ValueError(f"{path}: tables {_listed()} expected, and no other")
        unknown = table.keys() - {"default", "fallback", "models"}
        if unknown or not isinstance(table.get("models", {}), dict):
            raise ValueError(f"{path}: [{provider}] has default, fallback and models only")
    return tables


def _overlay(built_in: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    models = {**built_in.get("models", {}), **own.get("models", {})}
    return {**built_in, **own, "models": models}


def _parse(provider: str, table: dict[str, Any]) -> _Provider:
    models = {
        name: _limits(f"{provider}.models.{name}", value) for name, value in table["models"].items()
    }
    default = table["default"]
    if not isinstance(default, str) or default not in models:
        raise ValueError(f"{provider}.default: a model of [{provider}.models] expected")
    for name in models:
        if not _MODEL.fullmatch(name):
            raise ValueError(f"{provider}.models: a name has characters that no model has")
    return _Provider(default, _limits(f"{provider}.fallback", table["fallback"]), models)


def _limits(field: str, value: object) -> ModelLimits:
    if isinstance(value, dict) and value.keys() == {"context_tokens", "max_output_tokens"}:
        context, output = value["context_tokens"], value["max_output_tokens"]
        if type(context) is int and type(output) is int and 0 < output < context:
            return ModelLimits(context, output)
    raise ValueError(
        f"{field}: {{context_tokens, max_output_tokens}} expected, the second below the first"
    )
