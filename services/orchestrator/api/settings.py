"""SettingsService: RPC ↔ policy and store."""

from __future__ import annotations

import contextlib
import re
from collections import defaultdict
from collections.abc import Collection, Mapping
from typing import Any, Final

from byokeep import names
from byokeep.keyvault.v1 import custody_pb2
from byokeep.orchestrator.v1 import settings_pb2, settings_pb2_grpc

from services.common.errors import ByokeepError
from services.common.models import Catalog, parse_model
from services.orchestrator.api import access, paging
from services.orchestrator.config import Settings
from services.orchestrator.custody.keyvault import Keyvault
from services.orchestrator.policy.keys import ENDED, of_custody, usable
from services.orchestrator.policy.models import (
    KeyModels,
    Use,
    Uses,
    not_usable,
    read_model,
)
from services.orchestrator.policy.plans import Plan, Plans
from services.orchestrator.policy.refusals import above, unexpected
from services.orchestrator.store.choices import ChoiceStore
from services.orchestrator.store.keys import KeyStore, ModelsOf, UsableModel
from services.orchestrator.store.tenants import TenantRow, TenantStore

_FIELDS: Final = (
    "default_model",
    "max_diff_bytes",
    "max_calls_per_review",
    "max_calls_per_day",
    "max_reviews_per_day",
    "keep_superseded",
    "retry_ambiguous",
    "key_order",
    "fallback_models",
)
_NAME: Final = re.compile(r"tenants/[^/]+/settings")
_MODELS_A_PAGE: Final = 200


class SettingsServicer(settings_pb2_grpc.SettingsServiceServicer):
    """A tenant's plan, models and ceilings."""

    def __init__(
        self,
        store: TenantStore,
        choices: ChoiceStore,
        key_store: KeyStore,
        keyvault: Keyvault,
        catalog: Catalog,
        plans: Plans,
        settings: Settings,
    ) -> None:
        """Use the stores, keyvault's list of keys, the models and plans that are known, and the
        deployment's own ceilings."""
        self._store = store
        self._choices = choices
        self._key_store = key_store
        self._keyvault = keyvault
        self._catalog = catalog
        self._plans = plans
        self._settings = settings

    async def GetSettings(
        self, request: settings_pb2.GetSettingsRequest, context: object
    ) -> settings_pb2.GetSettingsResponse:
        """Return a tenant's settings."""
        return settings_pb2.GetSettingsResponse(
            settings=await self._message(access.current().tenant)
        )

    async def UpdateSettings(
        self, request: settings_pb2.UpdateSettingsRequest, context: object
    ) -> settings_pb2.UpdateSettingsResponse:
        """Change the fields of the mask."""
        if not _NAME.fullmatch(request.settings.name):
            raise unexpected("settings.name", "tenants/TENANT/settings")
        paths = list(request.update_mask.paths)
        if not paths or not set(paths).issubset(_FIELDS):
            raise unexpected("update_mask", f"some of {', '.join(_FIELDS)}")
        if "default_model" in paths and request.settings.default_model:
            await self._require_usable("settings.default_model", request.settings.default_model)
        if "fallback_models" in paths:
            await self._require_usable(
                "settings.fallback_models", *request.settings.fallback_models
            )
        values: dict[str, Any] = {path: getattr(request.settings, path) for path in paths}
        if "fallback_models" in values:
            values["fallback_models"] = list(request.settings.fallback_models)
        if "key_order" in values:
            values["key_order"] = [
                settings_pb2.KeySource.Name(source).removeprefix("KEY_SOURCE_")
                for source in request.settings.key_order
            ]
        rights = access.current()
        for path, (most, whose) in _most(rights.plan, self._settings).items():
            if values.get(path, 0) > most:
                raise above(f"settings.{path}", most, whose)
        row = await self._store.change_settings(
            rights.tenant.id, values, request, etag=request.settings.etag
        )
        return settings_pb2.UpdateSettingsResponse(settings=await self._message(row))

    async def SetPlan(
        self, request: settings_pb2.SetPlanRequest, context: object
    ) -> settings_pb2.SetPlanResponse:
        """Set a tenant's plan."""
        row = await self._store.change_settings(
            access.current().tenant.id, {"plan": self._plans.chosen(request.plan)}, request
        )
        return settings_pb2.SetPlanResponse(settings=await self._message(row))

    async def SetKeyCustody(
        self, request: settings_pb2.SetKeyCustodyRequest, context: object
    ) -> settings_pb2.SetKeyCustodyResponse:
        """Choose whose keys a tenant's reviews run on."""
        row = await self._store.change_settings(
            access.current().tenant.id, {"managed_keys": request.managed_keys}, request
        )
        return settings_pb2.SetKeyCustodyResponse(settings=await self._message(row))

    async def SetModelOverride(
        self, request: settings_pb2.SetModelOverrideRequest, context: object
    ) -> settings_pb2.SetModelOverrideResponse:
        """Set the model of some repositories; removing one takes no entitlement."""
        rights = access.current()
        if request.model:
            rights.plan.require("model-overrides")
            await self._require_usable("model", request.model)
        row = await self._choices.set_override(rights.tenant.id, request)
        return settings_pb2.SetModelOverrideResponse(settings=await self._message(row))

    async def SetRepositoryKey(
        self, request: settings_pb2.SetRepositoryKeyRequest, context: object
    ) -> settings_pb2.SetRepositoryKeyResponse:
        """Set the key of some repositories, or take theirs away."""
        tenant, provider = access.current().tenant, ""
        if request.key:
            key = await self._keyvault.get(names.key_name(tenant.id, request.key))
            if key.owner or key.state in ENDED:
                raise unexpected("key", "a key of the tenant's own that has not ended")
            provider = names.provider_id(key.provider)
        row = await self._choices.set_repository_key(tenant.id, provider, request)
        return settings_pb2.SetRepositoryKeyResponse(settings=await self._message(row))

    async def ListModels(
        self, request: settings_pb2.ListModelsRequest, context: object
    ) -> settings_pb2.ListModelsResponse:
        """List what the tenant's active keys can use; of a key that can't list its models, the
        provider's default alone."""
        rights = access.current()
        tenant = rights.tenant
        keys = [
            self._models_of(key)
            for key in await self._keys(tenant)
            if usable(key) and rights.may_read(key.owner)
        ]
        limit = paging.size(request.page_size, _MODELS_A_PAGE)
        rows, cut = await self._key_store.models_page(
            tenant.id, keys, request.page_token, limit + 1
        )

        def message(row: UsableModel) -> settings_pb2.Model:
            return settings_pb2.Model(
                model=row.model,
                key_ids=row.key_ids,
                key_count=row.key_count,
                provider_default=self._is_default(row.model),
                tenant_default=row.model == tenant.default_model,
            )

        page, token = paging.cut(rows, limit, lambda row: row.model, message)
        return settings_pb2.ListModelsResponse(models=page, next_page_token=token, cut=cut)

    def _models_of(self, key: custody_pb2.ProviderKey) -> ModelsOf:
        provider = names.provider_id(key.provider)
        return ModelsOf(
            names.last_of(key.name), key.active_version, provider, self._catalog.default(provider)
        )

    async def _keys(self, tenant: TenantRow) -> list[custody_pb2.ProviderKey]:
        """Return the keys that a tenant's reviews may run on: managed ones, or its own."""
        return of_custody(await self._keyvault.keys(tenant.id), managed=tenant.managed_keys)

    async def _known(self, tenant: TenantRow) -> list[KeyModels]:
        """Return what is known of the models of the active keys that the caller may see."""
        rights = access.current()
        return await self._key_store.models(
            tenant.id,
            [key for key in await self._keys(tenant) if usable(key) and rights.may_read(key.owner)],
        )

    async def _require_usable(self, field: str, *texts: str) -> None:
        """Refuse a model of a field that each of the keys is known not to be able to use.

        Raises ByokeepError: MODEL_INVALID, MODEL_NOT_USABLE, DEPENDENCY_UNAVAILABLE.
        """
        models = [read_model(text, field) for text in texts]
        keys = await self._known(access.current().tenant) if models else []
        uses = Uses(keys)
        for model in models:
            if uses.of(model) is Use.LACKING:
                raise not_usable(model, keys, field=field)

    async def _uses(
        self, tenant: TenantRow, models: Collection[str]
    ) -> Mapping[str, settings_pb2.ModelUse.ValueType]:
        """Return whether some key can use each of the models; not known where keyvault is away:
        settings are shown all the same."""
        found: dict[str, settings_pb2.ModelUse.ValueType] = defaultdict(
            lambda: settings_pb2.MODEL_USE_UNSPECIFIED
        )
        if models:
            with contextlib.suppress(ByokeepError):
                uses = Uses(await self._known(tenant))
                for model in models:
                    use = uses.of(parse_model(model))
                    found[model] = settings_pb2.ModelUse.Value(f"MODEL_USE_{use.value}")
        return found

    def _is_default(self, model: str) -> bool:
        provider, _, name = model.partition("/")
        return self._catalog.default(provider) == name

    async def _message(self, row: TenantRow) -> settings_pb2.Settings:
        overrides = await self._choices.overrides(row.id)
        chosen = {row.default_model, *(one.model for one in overrides)} - {""}
        use = await self._uses(row, chosen)
        patterns = {one.repository for one in overrides}
        unmatched = await self._choices.matching_none(row.id, list(patterns)) if patterns else set()
        plan = self._plans.of(row.plan)
        return settings_pb2.Settings(
            name=f"{names.tenant_name(row.id)}/settings",
            plan=row.plan,
            default_model=row.default_model,
            default_model_use=use[row.default_model],
            model_overrides=[
                settings_pb2.ModelOverride(
                    repository_pattern=one.repository,
                    path_pattern=one.path,
                    model=one.model,
                    use=use[one.model],
                    matches_none=one.repository in unmatched,
                    plan_lacks=not plan.has("model-overrides"),
                )
                for one in sorted(overrides, key=lambda one: (one.repository, one.path))
            ],
            max_diff_bytes=row.max_diff_bytes,
            max_calls_per_review=row.max_calls_per_review,
            max_calls_per_day=row.max_calls_per_day,
            max_reviews_per_day=row.max_reviews_per_day,
            keep_superseded=row.keep_superseded,
            retry_ambiguous=row.retry_ambiguous,
            key_order=[
                settings_pb2.KeySource.Value(f"KEY_SOURCE_{name}") for name in row.key_order
            ],
            fallback_models=row.fallback_models,
            managed_keys=row.managed_keys,
            repository_keys=[
                settings_pb2.RepositoryKey(
                    repository_pattern=one.pattern,
                    key_id=one.key_id,
                    provider=names.provider_value(one.provider),
                )
                for one in await self._choices.repository_keys(row.id)
            ],
            etag=row.etag,
            in_force=ceilings(row, plan, self._settings),
        )


def ceilings(row: TenantRow, plan: Plan, deployment: Settings) -> settings_pb2.Ceilings:
    """Return what holds for a tenant now: its own, but no more than its plan or the deployment."""
    return settings_pb2.Ceilings(
        max_calls_per_day=row.max_calls_per_day,
        **{
            name: min(getattr(row, name) or most, most)
            for name, (most, _) in _most(plan, deployment).items()
        },
    )


def _most(plan: Plan, deployment: Settings) -> dict[str, tuple[int, str]]:
    """Return what a tenant's own ceilings may be at most, and who allows no more."""
    return {
        "max_diff_bytes": (deployment.max_diff_bytes, "the deployment"),
        "max_calls_per_review": (deployment.max_calls_per_review, "the deployment"),
        "max_reviews_per_day": (plan.reviews_per_day, "the plan"),
    }
