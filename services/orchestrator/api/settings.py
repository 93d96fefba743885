"""SettingsService: RPC ↔ policy and store."""

from __future__ import annotations

import re
from typing import Any, Final

from byokeep import names
from byokeep.orchestrator.v1 import settings_pb2, settings_pb2_grpc

from services.common.models import MAX_LISTED, Catalog
from services.orchestrator.api import access, paging
from services.orchestrator.config import Settings
from services.orchestrator.custody.keyvault import Keyvault
from services.orchestrator.policy.keys import usable
from services.orchestrator.policy.models import read_model
from services.orchestrator.policy.plans import Plan, Plans
from services.orchestrator.policy.refusals import above, unexpected
from services.orchestrator.store.keys import KeyStore
from services.orchestrator.store.tenants import TenantRow, TenantStore

_FIELDS: Final = (
    "default_model",
    "max_diff_bytes",
    "max_calls_per_review",
    "max_calls_per_day",
    "max_reviews_per_day",
)
_NAME: Final = re.compile(r"tenants/[^/]+/settings")
_MODELS_A_PAGE: Final = 200


class SettingsServicer(settings_pb2_grpc.SettingsServiceServicer):
    """A tenant's plan, models and ceilings."""

    def __init__(
        self,
        store: TenantStore,
        key_store: KeyStore,
        keyvault: Keyvault,
        catalog: Catalog,
        plans: Plans,
        settings: Settings,
    ) -> None:
        """Use the stores, keyvault's list of keys, the models and plans that are known, and the
        deployment's own ceilings."""
        self._store = store
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
            read_model(request.settings.default_model, "settings.default_model")
        values: dict[str, Any] = {path: getattr(request.settings, path) for path in paths}
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

    async def SetModelOverride(
        self, request: settings_pb2.SetModelOverrideRequest, context: object
    ) -> settings_pb2.SetModelOverrideResponse:
        """Set the model of some repositories; removing one takes no entitlement."""
        rights = access.current()
        if request.model:
            rights.plan.require("model-overrides")
            read_model(request.model, "model")
        row = await self._store.set_override(rights.tenant.id, request)
        return settings_pb2.SetModelOverrideResponse(settings=await self._message(row))

    async def ListModels(
        self, request: settings_pb2.ListModelsRequest, context: object
    ) -> settings_pb2.ListModelsResponse:
        """List what the tenant's active keys can use."""
        tenant = access.current().tenant
        usable: dict[str, list[str]] = {}
        cut = False
        for key_id, models in (await self._usable(tenant.id)).items():
            cut = cut or len(models) > MAX_LISTED
            for model in models[:MAX_LISTED]:
                usable.setdefault(model, []).append(key_id)
        limit = paging.size(request.page_size, _MODELS_A_PAGE)
        after = request.page_token
        rows = sorted(model for model in usable if model > after)
        page, token = paging.cut(rows, limit, str)
        return settings_pb2.ListModelsResponse(
            models=[
                settings_pb2.Model(
                    model=model,
                    key_ids=sorted(usable[model]),
                    provider_default=self._is_default(model),
                    tenant_default=model == tenant.default_model,
                )
                for model in page
            ],
            next_page_token=token,
            cut=cut,
        )

    async def _usable(self, tenant: str) -> dict[str, list[str]]:
        """Models by key; of a key that can't list them, the provider's default alone."""
        rights = access.current()
        keys = [
            key
            for key in await self._keyvault.keys(tenant)
            if usable(key) and rights.may_read(key.owner)
        ]
        known = await self._key_store.models(
            tenant, [(names.last_of(key.name), key.active_version) for key in keys]
        )
        found = {}
        for key in keys:
            key_id, provider = names.last_of(key.name), names.provider_id(key.provider)
            models = known.get(key_id) or [self._catalog.default(provider)]
            found[key_id] = [f"{provider}/{model}" for model in models]
        return found

    def _is_default(self, model: str) -> bool:
        provider, _, name = model.partition("/")
        return self._catalog.default(provider) == name

    async def _message(self, row: TenantRow) -> settings_pb2.Settings:
        overrides = await self._store.overrides(row.id)
        return settings_pb2.Settings(
            name=f"{names.tenant_name(row.id)}/settings",
            plan=row.plan,
            default_model=row.default_model,
            model_overrides=[
                settings_pb2.ModelOverride(repository_pattern=pattern, model=overrides[pattern])
                for pattern in sorted(overrides)
            ],
            max_diff_bytes=row.max_diff_bytes,
            max_calls_per_review=row.max_calls_per_review,
            max_calls_per_day=row.max_calls_per_day,
            max_reviews_per_day=row.max_reviews_per_day,
            etag=row.etag,
            in_force=ceilings(row, self._plans.of(row.plan), self._settings),
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
