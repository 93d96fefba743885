"""Which key and model a review runs on: what was asked for, settings, and what the key can use."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from byokeep.keyvault.v1 import custody_pb2
from byokeep.orchestrator.v1 import review_pb2

from services.common.models import Catalog, ModelRef
from services.orchestrator.api.access import Rights
from services.orchestrator.api.planning import Planner
from services.orchestrator.custody.keyvault import Keyvault
from services.orchestrator.policy.keys import Keys, RepositoryKey, keys_for
from services.orchestrator.policy.models import (
    Source,
    choose_model,
    fallbacks,
    not_usable,
)
from services.orchestrator.policy.overrides import overrides_for
from services.orchestrator.store.choices import ChoiceStore
from services.orchestrator.store.keys import KeyStore
from services.orchestrator.store.reviews import ReviewRow


@dataclass(frozen=True, slots=True)
class Chosen:
    """What a review runs on."""

    key: custody_pb2.ProviderKey
    model: ModelRef
    #: The settings' choice, where `model` takes its place.
    instead_of: ModelRef | None
    #: What may take the place of `model`, if it comes to that.
    fallbacks: Sequence[ModelRef]


class Chooser:
    """Chooses by the tenant's settings."""

    def __init__(
        self,
        choices: ChoiceStore,
        keys: KeyStore,
        keyvault: Keyvault,
        catalog: Catalog,
        planner: Planner,
    ) -> None:
        """Use what tenants chose for repositories, what is known of keys, and keyvault's list."""
        self._choices = choices
        self._key_store = keys
        self._keyvault = keyvault
        self._catalog = catalog
        self._planner = planner

    async def choose(self, rights: Rights, wanted: review_pb2.ReviewInput) -> Chosen:
        """Choose for a review that is submitted.

        Raises ByokeepError: NO_ACTIVE_KEY, KEY_NEEDS_REKEY, NO_MODEL, MODEL_INVALID,
        MODEL_NOT_USABLE, NOT_FOUND, INVALID_FIELD, DIFF_*.
        """
        tenant = rights.tenant
        keys = await self._keys(rights, wanted.user, wanted.repository)
        if wanted.key:
            keys = keys.called(wanted.key)
        candidates = {
            Source.REVIEW: wanted.model,
            Source.OVERRIDE: "" if wanted.model else await self._override(rights, wanted),
            Source.DEFAULT: tenant.default_model,
        }
        choice = choose_model(candidates, keys, self._catalog)
        model = choice.model
        key = keys.choose(model.provider)
        lacking = await self._key_store.list_without(tenant.id, key, model.model)
        # Whoever names a model gets that one or none.
        named = choice.source is Source.REVIEW
        others = [] if named else fallbacks(model, tenant.fallback_models, lacking)
        if lacking is None:
            return Chosen(key, model, None, others)
        if not others:
            told = {"field": "input.model"} if named else {"whose": choice.source.value}
            raise not_usable(model, [lacking], **told)
        return Chosen(key, others[0], model, others[1:])

    async def key_again(self, rights: Rights, row: ReviewRow) -> custody_pb2.ProviderKey:
        """Return the key that a further attempt of a review runs on.

        Raises ByokeepError: NO_ACTIVE_KEY, KEY_NEEDS_REKEY, NOT_FOUND.
        """
        keys = await self._keys(rights, row.owner, row.repository)
        if row.named_key:
            keys = keys.called(row.key_id)
        return keys.choose(row.model.partition("/")[0])

    async def _override(self, rights: Rights, wanted: review_pb2.ReviewInput) -> str:
        if not rights.has_overrides or not rights.plan.has("model-overrides"):
            return ""
        overrides = await self._choices.overrides(rights.tenant.id)
        matching = overrides_for(wanted.repository, overrides)
        return await self._planner.override(rights.tenant.id, wanted.diff, matching)

    async def _keys(self, rights: Rights, user: str, repository: str) -> Keys:
        tenant = rights.tenant
        found = await self._keyvault.keys(tenant.id)
        of_repositories: Sequence[RepositoryKey] = ()
        if rights.has_repository_keys and not tenant.managed_keys:
            of_repositories = await self._choices.repository_keys(tenant.id)
        return keys_for(
            found,
            user=user,
            repository=repository,
            managed=tenant.managed_keys,
            order=tenant.key_order,
            of_repositories=of_repositories,
        )
