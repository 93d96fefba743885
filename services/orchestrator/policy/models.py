"""Which model a review takes, and whether its key can use it."""

from __future__ import annotations

import difflib
import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from heapq import nlargest
from itertools import islice
from typing import Final

import grpc

from services.common.errors import ByokeepError
from services.common.models import MAX_LISTED, Catalog, Listing, ModelRef, parse_model
from services.orchestrator.policy.keys import Keys

_NEAREST: Final = 3
_LIKELY: Final = 16


class Source(enum.Enum):
    """Who chose a review's model; the value says it in a sentence."""

    REVIEW = "the review's own"
    OVERRIDE = "the repository's"
    DEFAULT = "the tenant's default"
    PROVIDER = "byokeep's default of the provider"


@dataclass(frozen=True, slots=True)
class Choice:
    """A review's model, and who chose it."""

    model: ModelRef
    source: Source


@dataclass(frozen=True, slots=True)
class KeyModels:
    """What is known of the models that a key can use: its provider's list, and since when it is
    known. An empty list, or one that was cut, says of no model that the key can't use it."""

    key_id: str
    provider: str
    models: Sequence[str] = ()
    check_time: datetime | None = None

    @property
    def whole(self) -> bool:
        """Whether the list is known, and was not cut."""
        return 0 < len(self.models) <= MAX_LISTED


class Use(enum.Enum):
    """Whether some key can use a model, by what is known; the values are names of ModelUse."""

    NOT_KNOWN = "UNSPECIFIED"
    USABLE = "USABLE"
    NO_KEY = "NO_KEY"
    LACKING = "LACKING"


class Uses:
    """Whether a tenant's active keys can use models: one look at their lists, for many models."""

    def __init__(self, keys: Sequence[KeyModels]) -> None:
        """`keys` are all of them."""
        self._whole: dict[str, bool] = {}
        names: dict[str, list[str]] = {}
        for key in keys:
            self._whole[key.provider] = key.whole and self._whole.get(key.provider, True)
            names.setdefault(key.provider, []).extend(key.models)
        self._listed = {provider: Listing(found) for provider, found in names.items()}

    def of(self, model: ModelRef) -> Use:
        """Return whether one of the keys can use a model."""
        if model.provider not in self._whole:
            return Use.NO_KEY
        if model.model in self._listed[model.provider]:
            return Use.USABLE
        return Use.LACKING if self._whole[model.provider] else Use.NOT_KNOWN


def _nearest(wanted: str, keys: Sequence[KeyModels]) -> list[str]:
    """Return the names that are most like one. Of keys' lists a part is looked at, and few names
    closely: a tenant's may be many thousands, which would take seconds."""
    known = set(islice((name for key in keys for name in key.models), MAX_LISTED))
    parts = {wanted[at : at + 3] for at in range(max(1, len(wanted) - 2))}
    likely = nlargest(_LIKELY, sorted(known), key=lambda name: sum(part in name for part in parts))
    return difflib.get_close_matches(wanted, likely, _NEAREST, 0.5)


def not_usable(
    model: ModelRef, keys: Sequence[KeyModels], *, whose: str = "", field: str = ""
) -> ByokeepError:
    """Return the refusal of a model that none of the keys can use, with the nearest names.

    `whose` says in the sentence who chose it, where the request did not: else `field` has it.
    """
    ours = [key for key in keys if key.provider == model.provider]
    nearest = [f"{model.provider}/{name}" for name in _nearest(model.model, ours)]
    key_id = ours[0].key_id
    which = f"key {key_id} can't" if len(ours) == 1 else f"none of {len(ours)} keys can"
    times = [key.check_time for key in ours if key.check_time is not None]
    since = f" of {min(times):%Y-%m-%d %H:%M} UTC" if times else ""
    error = ByokeepError(
        grpc.StatusCode.FAILED_PRECONDITION,
        "MODEL_NOT_USABLE",
        f"{model}{f', {whose}' if whose else ''}: {which} use a model of that name,"
        f" by its provider's list{since}"
        + (f"; the nearest: {', '.join(nearest)}" if nearest else ""),
        model=str(model),
        nearest=",".join(nearest),
        key=key_id,
    )
    if field:
        error.metadata["field"] = field
    return error


def fallbacks(model: ModelRef, listed: Sequence[str], known: KeyModels | None) -> list[ModelRef]:
    """Return what may take a model's place on the same key, in order: of a tenant's list those of
    its provider, without those that the key is known not to be able to use."""
    return [
        other
        for other in map(parse_model, listed)
        if other.provider == model.provider
        and other != model
        and (known is None or not known.whole or other.model in Listing(known.models))
    ]


def read_model(model: str, field: str) -> ModelRef:
    """Parse `provider/model`. Raises ByokeepError: MODEL_INVALID."""
    try:
        return parse_model(model)
    except ValueError as error:
        sentence = str(error)
    raise ByokeepError(grpc.StatusCode.INVALID_ARGUMENT, "MODEL_INVALID", sentence, field=field)


def choose_model(candidates: Mapping[Source, str], keys: Keys, catalog: Catalog) -> Choice:
    """Return the first model that somebody chose, else the default of the only usable provider.

    `candidates` stand in order of precedence; empty texts are skipped, and those of settings where
    a key was named that is of another provider.
    """
    for source, text in candidates.items():
        if text:
            model = read_model(text, "input.model")
            if source is Source.REVIEW or not keys.named or keys.has(model.provider):
                return Choice(model, source)
    providers = keys.providers()
    if len(providers) == 1:
        return Choice(ModelRef(providers[0], catalog.default(providers[0])), Source.PROVIDER)
    if not providers:
        raise keys.refusal("", keys.all())
    *most, last = providers
    raise ByokeepError(
        grpc.StatusCode.FAILED_PRECONDITION,
        "NO_MODEL",
        f"there are keys for {', '.join(most)} and {last}, and no model is chosen: set the"
        " tenant's, or name one with the review",
        providers=",".join(providers),
    )
