"""Which model a review takes."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence

import grpc
from byokeep.keyvault.v1 import custody_pb2
from byokeep.names import provider_id

from services.common.errors import ByokeepError
from services.common.models import Catalog, ModelRef, parse_model
from services.orchestrator.policy.keys import no_key, usable


def override_for(repository: str, overrides: Mapping[str, str]) -> str:
    """Return the model of the longest pattern that matches a repository, or an empty text."""
    matching = [one for one in overrides if fnmatch.fnmatchcase(repository, one)]
    return overrides[max(matching, key=lambda one: (len(one), one))] if matching else ""


def read_model(model: str, field: str) -> ModelRef:
    """Parse `provider/model`. Raises ByokeepError: MODEL_INVALID."""
    try:
        return parse_model(model)
    except ValueError as error:
        sentence = str(error)
    raise ByokeepError(grpc.StatusCode.INVALID_ARGUMENT, "MODEL_INVALID", sentence, field=field)


def choose_model(
    candidates: Sequence[str],
    keys: Sequence[custody_pb2.ProviderKey],
    catalog: Catalog,
    user: str = "",
) -> ModelRef:
    """Return the first model that somebody chose, else the default of the only usable provider.

    `candidates` stand in order of precedence: the review's own, the repository's override, the
    tenant's default; empty texts are skipped. `keys` are those that the review may run on: a user's
    own, where it is a user's review.
    """
    for model in candidates:
        if model:
            return read_model(model, "input.model")
    providers = sorted({provider_id(key.provider) for key in keys if usable(key)})
    if len(providers) == 1:
        return ModelRef(providers[0], catalog.default(providers[0]))
    if not providers:
        raise no_key("", keys, user)
    *most, last = providers
    raise ByokeepError(
        grpc.StatusCode.FAILED_PRECONDITION,
        "NO_MODEL",
        f"there are keys for {', '.join(most)} and {last}, and no model is chosen:"
        " run 'byokeep model set PROVIDER/MODEL', or name one with --model",
        set="byokeep model set PROVIDER/MODEL",
    )
