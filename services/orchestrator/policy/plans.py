"""Plans: what each includes. They are data: `data/plans.toml`, and an operator's file over it."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import grpc

from services.common.errors import ByokeepError

#: What a plan may include, and what a tenant whose plan does not is told that it lacks.
FEATURES: Final[Mapping[str, str]] = {
    "model-overrides": "models per repository",
    "user-keys": "keys of single users",
}
_KEYS_PER_PROVIDER: Final = "keys-per-provider"
_NAME: Final = re.compile(r"[a-z0-9][a-z0-9-]{0,31}")
# The least and the most that a number may be.
_NUMBERS: Final = {
    "attempts_in_flight": (1, 10_000),
    "reviews_per_day": (1, 1_000_000_000),
    # They are counted at each submission.
    "reviews_waiting": (1, 100_000),
    "keys_per_provider": (0, 10_000),
}
_FIELDS: Final = frozenset({*_NUMBERS, "features"})


@dataclass(frozen=True, slots=True)
class Plan:
    """What a plan includes; `keys_per_provider` 0 is any number."""

    name: str
    attempts_in_flight: int
    reviews_per_day: int
    reviews_waiting: int
    keys_per_provider: int
    features: frozenset[str]

    def has(self, feature: str) -> bool:
        """Whether the plan includes one of `FEATURES`."""
        return feature in self.features

    def require(self, feature: str) -> None:
        """Refuse what the plan does not include. Raises ByokeepError: PLAN_LACKS_FEATURE."""
        if not self.has(feature):
            raise self._lacks(
                feature, f"the tenant's plan, {self.name}, has no {FEATURES[feature]}"
            )

    def require_room(self, keys: int) -> None:
        """Refuse a further key beside `keys` of its provider. Raises PLAN_LACKS_FEATURE."""
        if 0 < self.keys_per_provider <= keys:
            number = "one key" if self.keys_per_provider == 1 else f"{self.keys_per_provider} keys"
            raise self._lacks(
                _KEYS_PER_PROVIDER,
                f"the tenant's plan, {self.name}, has {number} per provider; rotate one that is"
                " there",
            )

    def _lacks(self, feature: str, sentence: str) -> ByokeepError:
        return ByokeepError(
            grpc.StatusCode.PERMISSION_DENIED,
            "PLAN_LACKS_FEATURE",
            sentence,
            feature=feature,
            plan=self.name,
        )


@dataclass(frozen=True, slots=True)
class Plans:
    """The plans that there are."""

    _default: str
    _plans: Mapping[str, Plan]

    def __contains__(self, name: str) -> bool:
        """Whether there is a plan of that name."""
        return name in self._plans

    def of(self, name: str) -> Plan:
        """Return a tenant's plan; the default one where its own is not there any more: a line that
        is taken out of a file stops no tenant's reviews."""
        return self._plans.get(name) or self._plans[self._default]

    def page(self, after: str, limit: int) -> list[Plan]:
        """Return plans by name, from after one on."""
        return [self._plans[name] for name in sorted(self._plans) if name > after][:limit]

    def is_default(self, plan: Plan) -> bool:
        """Whether a tenant that is created without a plan has this one."""
        return plan.name == self._default

    def chosen(self, name: str) -> str:
        """Return the name of a plan that an operator chose; the default's for an empty one.

        Raises ByokeepError: INVALID_FIELD, with the names that there are.
        """
        if name and name not in self:
            known = ", ".join(self._plans)
            raise ByokeepError(
                grpc.StatusCode.INVALID_ARGUMENT,
                "INVALID_FIELD",
                f"plan: must be one of {known}",
                field="plan",
                rule="known",
                plans=known,
            )
        return name or self._default

    def places(self) -> tuple[Mapping[str, int], int]:
        """Return the attempts in flight by plan, and those of a tenant whose plan is unknown."""
        places = {name: plan.attempts_in_flight for name, plan in self._plans.items()}
        return places, places[self._default]


def parse(sources: Iterable[tuple[str, str]]) -> Plans:
    """Read plans from (where it stands, TOML) pairs, each laid over those before.

    Raises `ValueError` that names the place and the field.
    """
    default: object = ""
    tables: dict[str, dict[str, Any]] = {}
    for place, text in sources:
        source = _read(place, text)
        default = source.get("default", default)
        for name, table in source.get("plans", {}).items():
            tables[name] = {**tables.get(name, {}), **_fields(place, name, table)}
    if not isinstance(default, str) or default not in tables:
        raise ValueError(f"default: one of {', '.join(tables)} expected")
    return Plans(default, {name: _plan(name, tables[name]) for name in tables})


def _read(place: str, text: str) -> dict[str, Any]:
    try:
        source = tomllib.loads(text)
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from None
    if source.keys() - {"default", "plans"} or not isinstance(source.get("plans", {}), dict):
        raise ValueError(f"{place}: 'default' and tables [plans.NAME] expected, and nothing else")
    return source


def _fields(place: str, name: str, table: object) -> dict[str, Any]:
    if not _NAME.fullmatch(name):
        raise ValueError(f"{place}: a plan's name is 1 to 32 lower-case letters, digits, hyphens")
    if not isinstance(table, dict) or not table.keys() <= _FIELDS:
        raise ValueError(f"{place}: [plans.{name}] has {', '.join(sorted(_FIELDS))} only")
    return table


def _plan(name: str, table: Mapping[str, Any]) -> Plan:
    for field, (least, most) in _NUMBERS.items():
        value = table.get(field)
        if type(value) is not int or not least <= value <= most:
            raise ValueError(f"plans.{name}.{field}: {least} to {most} expected")
    features = table.get("features")
    if not isinstance(features, list) or not set(map(str, features)) <= FEATURES.keys():
        raise ValueError(f"plans.{name}.features: a list of {', '.join(FEATURES)} expected")
    numbers = {field: table[field] for field in _NUMBERS}
    return Plan(name, **numbers, features=frozenset(features))
