"""The orchestrator's and keyvault's client edges, in memory, over real mutual TLS.

For tests of the client alone. Seals are really opened, chains really hashed and
signed; everything else answers from `Edge`'s attributes, which a test scripts.
"""

from __future__ import annotations

import base64
import datetime
import json
import threading
from collections.abc import Callable, Iterator
from concurrent import futures
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
from byokeep import dsse, hpke, ids, names, sealing
from byokeep.edge import review_is_over
from byokeep.keyvault.v1 import admin_pb2, admin_pb2_grpc, audit_pb2, audit_pb2_grpc, custody_pb2
from byokeep.orchestrator.v1 import (
    key_pb2,
    key_pb2_grpc,
    review_pb2,
    review_pb2_grpc,
    settings_pb2,
    settings_pb2_grpc,
    tenant_pb2,
    tenant_pb2_grpc,
)

from deploy.local.pki import CertificateAuthority
from services.common.errors import ByokeepError
from tests.harness.chain import Chain, SigningKey

DEPLOYMENT = "test"
NAMES = {
    "orchestrator": "orchestrator.byokeep.internal",
    "keyvault": "keyvault.byokeep.internal",
}
NOW = datetime.datetime.now(datetime.UTC)


@dataclass
class Edge:
    """State of the fake, and what a test makes it do."""

    directory: Path
    denied: set[str] = field(default_factory=set)
    held: list[str] = field(default_factory=list)
    errors: dict[str, ByokeepError] = field(default_factory=dict)
    lost: dict[str, int] = field(default_factory=dict)
    #: So many calls of a method are refused as too many, to be tried again after so long.
    overloaded: dict[str, int] = field(default_factory=dict)
    again_seconds: float = 0.02
    verdicts: list[str] = field(default_factory=lambda: ["VALID"])
    keys: dict[str, key_pb2.Key] = field(default_factory=dict)
    uses: list[key_pb2.KeyUse] = field(default_factory=list)
    kek_backends: admin_pb2.ListKekBackendsResponse = field(
        default_factory=admin_pb2.ListKekBackendsResponse
    )
    opened: list[bytes] = field(default_factory=list)
    requests: list[Any] = field(default_factory=list)
    reviews: dict[str, review_pb2.Review] = field(default_factory=dict)
    states: list[dict[str, Any] | str] = field(default_factory=list)  # str: how a stream breaks off
    export: str = "{}"
    unread: list[review_pb2.UnreadPart] = field(default_factory=list)
    settings: settings_pb2.Settings = field(default_factory=settings_pb2.Settings)
    models: list[settings_pb2.Model] = field(default_factory=list)
    tenants: dict[str, tenant_pb2.Tenant] = field(default_factory=dict)
    callers: dict[str, tenant_pb2.Caller] = field(default_factory=dict)
    intake: SigningKey = field(default_factory=lambda: SigningKey("isk"))
    intake_deployment: str = DEPLOYMENT
    intake_from: datetime.datetime = NOW - datetime.timedelta(minutes=5)
    intake_suite: int = sealing.SUITE
    chain: Chain = field(default_factory=Chain)
    has_kek: bool = False
    rewrap_ends: str = "DONE"

    def __post_init__(self) -> None:
        self.pinned_intake = self.intake
        self.private = hpke.PrivateKey.generate(hpke.HYBRID_V1)
        self.weak = hpke.PrivateKey.generate(hpke.X25519_V1)
        self.ca = CertificateAuthority.new("byokeep.test")
        self.tenants["tenants/demo"] = _tenant("tenants/demo")
        self.addresses: dict[str, str] = {}
        self._servers: list[grpc.Server] = []

    def start(self) -> None:
        """Start both servers, and write the client's files."""
        self.ca.issue(self.directory / "developer", spiffe_id="client/developer")
        for zone, add in (("orchestrator", self._add_orchestrator), ("keyvault", self._add_vault)):
            self.serve(zone, NAMES[zone], add)
        self.write_trust()
        self.write_config()

    def serve(
        self, zone: str, dns: str, add: Callable[[grpc.Server], None], streams: int = 256
    ) -> str:
        """Start a server with a certificate for a DNS name, which takes so many calls of a
        connection; return its address."""
        files = self.ca.issue(self.directory / f"{zone}-{dns}", spiffe_id=zone, dns=[dns])
        credentials = grpc.ssl_server_credentials(
            [(files.key.read_bytes(), files.certificate.read_bytes())],
            self.ca.pem.encode(),
            require_client_auth=True,
        )
        options = [("grpc.max_concurrent_streams", streams)]
        server = grpc.server(futures.ThreadPoolExecutor(8), options=options)
        add(server)
        port = server.add_secure_port("127.0.0.1:0", credentials)
        server.start()
        self._servers.append(server)
        self.addresses[zone] = f"127.0.0.1:{port}"
        return self.addresses[zone]

    def stop(self) -> None:
        """Stop the servers."""
        for server in self._servers:
            server.stop(None).wait(5)

    def write_trust(self) -> None:
        """Write trust.json with the keys that this edge pins."""
        trust = {
            "deployment": DEPLOYMENT,
            "ca": [self.ca.pem],
            "intake_signing_keys": {self.pinned_intake.key_id: _raw(self.pinned_intake)},
            "audit_log_keys": {self.chain.key.key_id: _raw(self.chain.key)},
        }
        (self.directory / "trust.json").write_text(json.dumps(trust))

    def write_config(self, *, vault: bool = True, **changes: str) -> Path:
        """Write config.toml, with settings of the profile changed as a test needs."""
        settings = {
            "orchestrator": self.addresses["orchestrator"],
            "orchestrator_name": NAMES["orchestrator"],
            "trust": "trust.json",
            "certificate": "developer.pem",
            "key": "developer.key",
            "tenant": "demo",
        }
        if vault:
            settings |= {"keyvault": self.addresses["keyvault"], "keyvault_name": NAMES["keyvault"]}
        lines = [f'{name} = "{value}"' for name, value in (settings | changes).items()]
        path = self.directory / "config.toml"
        path.write_text("\n".join(['default_profile = "demo"', "[profiles.demo]", *lines]) + "\n")
        return path

    def meet(self, request: Any, context: grpc.ServicerContext) -> None:
        """Keep a request; answer with the error that a test set for its method."""
        method = type(request).__name__.removesuffix("Request")
        self.requests.append(request)
        if self.lost.get(method, 0) > 0:
            self.lost[method] -= 1
            context.abort(grpc.StatusCode.UNAVAILABLE, "connection lost")
        if self.overloaded.get(method, 0) > 0:
            self.overloaded[method] -= 1
            refusal = ByokeepError(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                "OVERLOADED",
                "more than 8 calls for this tenant at once are not served; try again",
                retry_after_seconds=self.again_seconds,
                limit="8",
            )
            context.set_trailing_metadata(refusal.trailing_metadata())
            context.abort(refusal.code, refusal.message)
        if method in self.denied:
            self.errors[method] = ByokeepError(
                grpc.StatusCode.PERMISSION_DENIED,
                "TENANT_NOT_ALLOWED",
                "this identity has no such role for the tenant",
            )
        if (error := self.errors.get(method)) is not None:
            context.set_trailing_metadata(error.trailing_metadata())
            context.abort(error.code, error.message)

    def settings_now(self) -> settings_pb2.Settings:
        """Return the settings, with the ceilings that hold."""
        own, now = self.settings, settings_pb2.Settings()
        now.CopyFrom(own)
        now.in_force.max_diff_bytes = own.max_diff_bytes or 2_000_000
        now.in_force.max_calls_per_review = own.max_calls_per_review or 20
        now.in_force.max_reviews_per_day = own.max_reviews_per_day or 100
        now.in_force.max_calls_per_day = own.max_calls_per_day
        return now

    def fail(self, method: str, code: str, reason: str, message: str, **metadata: str) -> None:
        """Make a method fail."""
        self.errors[method] = ByokeepError(
            getattr(grpc.StatusCode, code), reason, message, **metadata
        )

    def sent(self, kind: type[Any]) -> list[Any]:
        """Return the requests of a type that came in."""
        return [request for request in self.requests if isinstance(request, kind)]

    def add_key(self, provider: str = "openai", name: str = "default", **values: Any) -> str:
        """Put a key there, ACTIVE and valid; return its id."""
        key_id = ids.new_id("key")
        kept = custody_pb2.ProviderKey(
            name=names.key_name("demo", key_id),
            provider=names.provider_value(provider),
            display_name=name,
            state=custody_pb2.KEY_VERSION_STATE_ACTIVE,
            hint="sk-...AbCd",
            active_version=1,
            etag="1",
        )
        kept.MergeFrom(custody_pb2.ProviderKey(**values))
        version = kept.versions.add(version=1, state=kept.state, hint=kept.hint)
        version.create_time.FromDatetime(NOW)
        kept.create_time.FromDatetime(NOW)
        validation = key_pb2.KeyValidation(
            version=1, verdict=key_pb2.VALIDATION_VERDICT_VALID, models=["gpt-5"], attempts=1
        )
        self.keys[kept.name] = key_pb2.Key(provider_key=kept, validation=validation)
        return key_id

    def add_review(self, **values: Any) -> str:
        """Put a finished review there; return its id."""
        review_id = ids.new_id("rev")
        review = review_pb2.Review(
            name=names.review_name("demo", review_id),
            state=review_pb2.REVIEW_STATE_COMPLETED,
            repository="acme/shop",
            model="openai/gpt-5",
            calls_started=2,
            chunks_total=2,
            chunks_done=2,
        )
        review.create_time.FromDatetime(NOW)
        review.end_time.FromDatetime(NOW + datetime.timedelta(seconds=2))
        review.MergeFrom(review_pb2.Review(**values))
        self.reviews[review.name] = review
        return review_id

    def _add_orchestrator(self, server: grpc.Server) -> None:
        key_pb2_grpc.add_KeyServiceServicer_to_server(_Keys(self), server)
        review_pb2_grpc.add_ReviewServiceServicer_to_server(_Reviews(self), server)
        settings_pb2_grpc.add_SettingsServiceServicer_to_server(_Settings(self), server)
        tenant_pb2_grpc.add_TenantServiceServicer_to_server(_Tenants(self), server)
        tenant_pb2_grpc.add_CallerServiceServicer_to_server(_Callers(self), server)

    def _add_vault(self, server: grpc.Server) -> None:
        audit_pb2_grpc.add_AuditServiceServicer_to_server(_Audit(self), server)
        admin_pb2_grpc.add_AdminServiceServicer_to_server(_Admin(self), server)


def _raw(key: SigningKey) -> str:
    return base64.b64encode(key.public.public_bytes_raw()).decode()


def _tenant(name: str) -> tenant_pb2.Tenant:
    tenant = tenant_pb2.Tenant(name=name, state=tenant_pb2.TENANT_STATE_ACTIVE, plan="team")
    tenant.create_time.FromDatetime(NOW)
    return tenant


class _Fake:
    def __init__(self, edge: Edge) -> None:
        self.edge = edge


class _Keys(_Fake, key_pb2_grpc.KeyServiceServicer):
    def GetIntakeKey(self, request, context):
        self.edge.meet(request, context)
        edge = self.edge
        private = edge.private if edge.intake_suite == hpke.HYBRID_V1 else edge.weak
        statement = custody_pb2.IntakeStatement(
            deployment=edge.intake_deployment,
            suite=edge.intake_suite,
            intake_key_id="ink_" + "0" * 26,
            public_key=private.public_bytes,
        )
        statement.not_before.FromDatetime(edge.intake_from)
        statement.not_after.FromDatetime(edge.intake_from + datetime.timedelta(hours=1))
        payload = statement.SerializeToString()
        signed = dsse.sign(dsse.INTAKE_KEY, payload, edge.intake.key_id, edge.intake.private)
        return key_pb2.GetIntakeKeyResponse(statement=signed)

    def AddKey(self, request, context):
        self.edge.meet(request, context)
        provider = names.provider_id(request.provider)
        name = names.key_name(names.tenant_of(request.parent + "/"), request.key_id)
        self._open(request, name, provider, request.user, "add")
        kept = custody_pb2.ProviderKey(
            name=name,
            provider=request.provider,
            owner=request.user,
            display_name=request.display_name,
            state=custody_pb2.KEY_VERSION_STATE_PENDING,
        )
        kept.versions.add(version=1, state=kept.state, hint="sk-...AbCd")
        self.edge.keys[name] = key_pb2.Key(provider_key=kept)
        return key_pb2.AddKeyResponse(key=self.edge.keys[name])

    def RotateKey(self, request, context):
        self.edge.meet(request, context)
        key = self.edge.keys[request.name]
        kept = key.provider_key
        provider = names.provider_id(kept.provider)
        self._open(request, request.name, provider, kept.owner, "rotate")
        pending = custody_pb2.KEY_VERSION_STATE_PENDING
        kept.versions.add(version=len(kept.versions) + 1, state=pending, hint="sk-...EfGh")
        key.validation.CopyFrom(key_pb2.KeyValidation())
        return key_pb2.RotateKeyResponse(key=key)

    def CheckKey(self, request, context):
        self.edge.meet(request, context)
        key = self.edge.keys[request.name]
        key.check.open = True
        return key_pb2.CheckKeyResponse(key=key)

    def WatchKey(self, request, context) -> Iterator[key_pb2.WatchKeyResponse]:
        self.edge.meet(request, context)
        key = self.edge.keys[request.name]
        yield key_pb2.WatchKeyResponse(key=key)
        version = key.provider_key.versions[-1]
        for number, verdict in enumerate(self.edge.verdicts, 1):
            if verdict == "LOST":
                self.edge.verdicts = self.edge.verdicts[number:]
                context.abort(grpc.StatusCode.UNAVAILABLE, "connection lost")
            checked, key.check.open = key.check.open, False
            if checked and verdict == "UNREACHABLE":
                key.check.failure = review_pb2.FAILURE_REASON_NETWORK
                key.check.unreachable_cause = key_pb2.UNREACHABLE_CAUSE_TLS
                yield key_pb2.WatchKeyResponse(key=key, done=True)
                return
            value = key_pb2.ValidationVerdict.Value(f"VALIDATION_VERDICT_{verdict}")
            key.validation.CopyFrom(
                key_pb2.KeyValidation(version=version.version, verdict=value, attempts=number)
            )
            done = verdict != "UNREACHABLE"
            if done and verdict != "INVALID":
                version.state = custody_pb2.KEY_VERSION_STATE_ACTIVE
                key.provider_key.state = version.state
            yield key_pb2.WatchKeyResponse(key=key, done=done)

    def GetKey(self, request, context):
        self.edge.meet(request, context)
        if request.name not in self.edge.keys:
            self.edge.fail("GetKey", "NOT_FOUND", "NOT_FOUND", "there is no such key")
            self.edge.meet(request, context)
        return key_pb2.GetKeyResponse(key=self.edge.keys[request.name])

    def ListKeys(self, request, context):
        self.edge.meet(request, context)
        keys = sorted(self.edge.keys.values(), key=lambda key: key.provider_key.name)
        # One a page: whoever forgets the next page is found out.
        at = int(request.page_token or 0)
        more = str(at + 1) if at + 1 < len(keys) else ""
        return key_pb2.ListKeysResponse(keys=keys[at : at + 1], next_page_token=more)

    def RevokeKey(self, request, context):
        self.edge.meet(request, context)
        key = self.edge.keys[request.name]
        if key.provider_key.state != custody_pb2.KEY_VERSION_STATE_DESTROYED:
            key.provider_key.state = custody_pb2.KEY_VERSION_STATE_REVOKED
        return key_pb2.RevokeKeyResponse(key=key)

    def DestroyKey(self, request, context):
        self.edge.meet(request, context)
        key = self.edge.keys[request.name]
        key.provider_key.state = custody_pb2.KEY_VERSION_STATE_DESTROYED
        return key_pb2.DestroyKeyResponse(key=key)

    def RollBackKey(self, request, context):
        self.edge.meet(request, context)
        return key_pb2.RollBackKeyResponse(key=self.edge.keys[request.name])

    def ListKeyUses(self, request, context):
        self.edge.meet(request, context)
        return key_pb2.ListKeyUsesResponse(uses=self.edge.uses)

    def _open(self, request, name, provider, owner, operation) -> None:
        context = sealing.SealContext(
            names.tenant_of(name),
            owner,
            provider,
            names.last_of(name),
            operation,
            request.request_id,
        )
        sealed = request.sealed_key
        info = context.info(DEPLOYMENT, sealed.intake_key_id)
        self.edge.opened.append(self.edge.private.open(sealed.ciphertext, info))


class _Reviews(_Fake, review_pb2_grpc.ReviewServiceServicer):
    def SubmitReview(self, request, context):
        self.edge.meet(request, context)
        review_id = self.edge.add_review(
            repository=request.input.repository, pull_request=request.input.pull_request
        )
        review = self.edge.reviews[names.review_name("demo", review_id)]
        review.state = review_pb2.REVIEW_STATE_QUEUED
        return review_pb2.SubmitReviewResponse(review=review)

    def DryRunReview(self, request, context):
        self.edge.meet(request, context)
        answer = review_pb2.DryRunReviewResponse(
            model="openai/gpt-5", key_id="key_" + "1" * 26, calls=2, max_calls_per_review=20
        )
        answer.chunks.add(files=["a.py", "b.py"], estimated_tokens=1200)
        answer.chunks.add(files=["c.py"], estimated_tokens=300)
        answer.skipped_files.append("moved.py")
        answer.skipped_count = 1
        answer.unread.extend(self.edge.unread)
        answer.unread_count = len(self.edge.unread)
        return answer

    def WatchReview(self, request, context) -> Iterator[review_pb2.WatchReviewResponse]:
        self.edge.meet(request, context)
        review = self.edge.reviews[request.name]
        while self.edge.states:
            change = self.edge.states.pop(0)
            if change == "lost":
                context.abort(grpc.StatusCode.UNAVAILABLE, "connection lost")
            if change == "reset":
                context.abort(grpc.StatusCode.INTERNAL, "Received RST_STREAM with error code 2")
            if change == "end":
                return
            if change == "wait":
                gone = threading.Event()
                context.add_callback(gone.set)
                gone.wait(30)
                return
            review.MergeFrom(review_pb2.Review(**change))
            shown = review_pb2.Review()
            shown.CopyFrom(review)
            del shown.findings[1:]
            more = "1" if len(review.findings) > 1 else ""
            answer = review_pb2.WatchReviewResponse(review=shown, next_page_token=more)
            yield answer
            if review_is_over(answer):
                return  # what stands in `states` now is another stream's

    def GetReview(self, request, context):
        self.edge.meet(request, context)
        # One finding a page: whoever forgets the next page is found out.
        whole = self.edge.reviews[request.name]
        at = int(request.page_token or 0)
        more = str(at + 1) if at + 1 < len(whole.findings) else ""
        page = review_pb2.Review()
        page.CopyFrom(whole)
        del page.findings[:]
        page.findings.extend(whole.findings[at : at + 1])
        return review_pb2.GetReviewResponse(review=page, next_page_token=more)

    def ListReviews(self, request, context):
        self.edge.meet(request, context)
        return review_pb2.ListReviewsResponse(reviews=list(self.edge.reviews.values())[::-1])

    def CancelReview(self, request, context):
        self.edge.meet(request, context)
        review = self.edge.reviews[request.name]
        review.state = review_pb2.REVIEW_STATE_CANCELLED
        return review_pb2.CancelReviewResponse(review=review)

    def RetryReview(self, request, context):
        self.edge.meet(request, context)
        return review_pb2.RetryReviewResponse(review=self.edge.reviews[request.name])

    def CancelReviews(self, request, context):
        self.edge.meet(request, context)
        return review_pb2.CancelReviewsResponse(names=list(self.edge.reviews))

    def RetryReviews(self, request, context):
        self.edge.meet(request, context)
        first, *others = self.edge.reviews
        return review_pb2.RetryReviewsResponse(
            names=others,
            refused=[
                review_pb2.RetryReviewsResponse.Refused(
                    name=first, reason="WRONG_STATE", message="its diff is not kept any more"
                )
            ],
        )

    def DeleteReview(self, request, context):
        self.edge.meet(request, context)
        del self.edge.reviews[request.name]
        return review_pb2.DeleteReviewResponse()

    def ExportReview(self, request, context):
        self.edge.meet(request, context)
        return review_pb2.ExportReviewResponse(content=self.edge.export)


class _Settings(_Fake, settings_pb2_grpc.SettingsServiceServicer):
    def GetSettings(self, request, context):
        self.edge.meet(request, context)
        return settings_pb2.GetSettingsResponse(settings=self.edge.settings_now())

    def UpdateSettings(self, request, context):
        self.edge.meet(request, context)
        request.update_mask.MergeMessage(
            request.settings, self.edge.settings, replace_repeated_field=True
        )
        return settings_pb2.UpdateSettingsResponse(settings=self.edge.settings_now())

    def SetPlan(self, request, context):
        self.edge.meet(request, context)
        self.edge.settings.plan = request.plan
        return settings_pb2.SetPlanResponse(settings=self.edge.settings)

    def SetKeyCustody(self, request, context):
        self.edge.meet(request, context)
        self.edge.settings.managed_keys = request.managed_keys
        return settings_pb2.SetKeyCustodyResponse(settings=self.edge.settings)

    def SetModelOverride(self, request, context):
        self.edge.meet(request, context)
        self.edge.settings.model_overrides.add(
            repository_pattern=request.repository_pattern,
            path_pattern=request.path_pattern,
            model=request.model,
        )
        return settings_pb2.SetModelOverrideResponse(settings=self.edge.settings)

    def SetRepositoryKey(self, request, context):
        self.edge.meet(request, context)
        self.edge.settings.repository_keys.add(
            repository_pattern=request.repository_pattern, key_id=request.key, provider=1
        )
        return settings_pb2.SetRepositoryKeyResponse(settings=self.edge.settings)

    def ListModels(self, request, context):
        self.edge.meet(request, context)
        return settings_pb2.ListModelsResponse(models=self.edge.models)


class _Tenants(_Fake, tenant_pb2_grpc.TenantServiceServicer):
    def CreateTenant(self, request, context):
        self.edge.meet(request, context)
        self.edge.tenants[request.name] = _tenant(request.name)
        self.edge.tenants[request.name].plan = request.plan or "team"
        return tenant_pb2.CreateTenantResponse(tenant=self.edge.tenants[request.name])

    def ListTenants(self, request, context):
        self.edge.meet(request, context)
        return tenant_pb2.ListTenantsResponse(tenants=self.edge.tenants.values())

    def ListPlans(self, request, context):
        self.edge.meet(request, context)
        free = tenant_pb2.Plan(
            name="free", attempts_in_flight=1, reviews_per_day=10, reviews_waiting=5
        )
        free.keys_per_provider = 1
        team = tenant_pb2.Plan(name="team", default=True, attempts_in_flight=16)
        team.features.extend(["model-overrides", "user-keys"])
        return tenant_pb2.ListPlansResponse(plans=[free, team])

    def SuspendTenant(self, request, context):
        self.edge.meet(request, context)
        tenant = self.edge.tenants[request.name]
        tenant.state = (
            tenant_pb2.TENANT_STATE_ACTIVE if request.resume else tenant_pb2.TENANT_STATE_SUSPENDED
        )
        return tenant_pb2.SuspendTenantResponse(tenant=tenant)

    def DeleteTenant(self, request, context):
        self.edge.meet(request, context)
        return tenant_pb2.DeleteTenantResponse(destroyed_keys=3)


class _Callers(_Fake, tenant_pb2_grpc.CallerServiceServicer):
    def AllowCaller(self, request, context):
        self.edge.meet(request, context)
        self.edge.callers[request.caller.spiffe_id] = request.caller
        return tenant_pb2.AllowCallerResponse(caller=request.caller)

    def DenyCaller(self, request, context):
        self.edge.meet(request, context)
        self.edge.callers.pop(request.spiffe_id, None)
        return tenant_pb2.DenyCallerResponse()

    def ListCallers(self, request, context):
        self.edge.meet(request, context)
        return tenant_pb2.ListCallersResponse(callers=self.edge.callers.values())


class _Audit(_Fake, audit_pb2_grpc.AuditServiceServicer):
    def ListEvents(self, request, context):
        self.edge.meet(request, context)
        events = [
            event
            for event in self.edge.chain.events
            if not request.key_id or event.key_id == request.key_id
        ]
        return audit_pb2.ListEventsResponse(events=events)

    def ExportEvents(self, request, context) -> Iterator[audit_pb2.ExportEventsResponse]:
        self.edge.meet(request, context)
        for link in self.edge.chain.links:
            yield audit_pb2.ExportEventsResponse(event=link)
        if self.edge.chain.head() is not None:
            head, proof = self.edge.chain.proven(request.since_size)
            yield audit_pb2.ExportEventsResponse(head=head, proof=proof)

    def GetCheckpoint(self, request, context):
        self.edge.meet(request, context)
        head, proof = self.edge.chain.proven(request.since_size)
        return audit_pb2.GetCheckpointResponse(checkpoint=proof.checkpoint, head=head, proof=proof)

    def ListCheckpoints(self, request, context):
        self.edge.meet(request, context)
        chain = self.edge.chain
        return audit_pb2.ListCheckpointsResponse(
            checkpoints=[chain.log.checkpoint(chain.deployment, chain.key)]
        )


class _Admin(_Fake, admin_pb2_grpc.AdminServiceServicer):
    def CreateTenantKey(self, request, context):
        self.edge.meet(request, context)
        return admin_pb2.CreateTenantKeyResponse(
            backend="local", version=1, created=not self.edge.has_kek
        )

    def RotateTenantKey(self, request, context):
        self.edge.meet(request, context)
        return admin_pb2.RotateTenantKeyResponse(version=2)

    def RewrapTenant(self, request, context) -> Iterator[admin_pb2.RewrapTenantResponse]:
        self.edge.meet(request, context)
        for done, phase in ((1, "REWRAP"), (2, self.edge.rewrap_ends)):
            yield admin_pb2.RewrapTenantResponse(
                done=done,
                total=2,
                backend="local",
                version=2,
                phase=admin_pb2.KekJobPhase.Value(f"KEK_JOB_PHASE_{phase}"),
            )

    def ListKekBackends(self, request, context):
        self.edge.meet(request, context)
        return self.edge.kek_backends

    def ListTenantKeys(self, request, context):
        self.edge.meet(request, context)
        holding = admin_pb2.KekHolding(backend="local", oldest_version=1, newest_version=3, rows=7)
        return admin_pb2.ListTenantKeysResponse(
            tenant_keys=[
                admin_pb2.TenantKey(tenant="tenants/demo", holdings=[holding]),
                admin_pb2.TenantKey(tenant="tenants/empty"),
                admin_pb2.TenantKey(tenant="tenants/gone", kek_destroyed=True),
            ]
        )

    def PrepareSystemKey(self, request, context):
        self.edge.meet(request, context)
        return admin_pb2.PrepareSystemKeyResponse(
            key_id="isk_0123456789abcdef", public_key=bytes(32)
        )

    def ActivateSystemKey(self, request, context):
        self.edge.meet(request, context)
        return admin_pb2.ActivateSystemKeyResponse()

    def ShredTenant(self, request, context):
        self.edge.meet(request, context)
        return admin_pb2.ShredTenantResponse(destroyed_versions=4, shred="immediate")

    def RevokeLease(self, request, context):
        self.edge.meet(request, context)
        return admin_pb2.RevokeLeaseResponse(ended=len(self.edge.sent(type(request))) == 1)

    def RevokeTenant(self, request, context):
        self.edge.meet(request, context)
        return admin_pb2.RevokeTenantResponse(ended_leases=3)

    def ResumeTenant(self, request, context):
        self.edge.meet(request, context)
        return admin_pb2.ResumeTenantResponse(resumed="demo" in self.edge.held)

    def ResumeLeases(self, request, context):
        self.edge.meet(request, context)
        return admin_pb2.ResumeLeasesResponse()

    def GetStatus(self, request, context):
        self.edge.meet(request, context)
        return admin_pb2.GetStatusResponse(
            deployment=DEPLOYMENT,
            kek_backend="local",
            kek_backend_healthy=True,
            shred="immediate",
            leases_allowed=True,
            tenants=1,
            held_tenants=self.edge.held,
        )
