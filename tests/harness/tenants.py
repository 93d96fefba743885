"""Tenants with active keys, made as an operator and a customer make them."""

from __future__ import annotations

import secrets
from typing import Any

from byokeep.common.v1 import options_pb2
from byokeep.ids import new_id
from byokeep.keyvault.v1 import admin_pb2
from byokeep.names import tenant_name
from byokeep.orchestrator.v1 import key_pb2, review_pb2, tenant_pb2
from byokeep.testing import Stack

from deploy.local.material import TRUST_DOMAIN
from services.common import models

_PREFIXES = {"openai": "sk-proj-", "anthropic": "sk-ant-api03-", "gemini": "AIza"}
DIFF_CANARY = b"canary_of_the_diff"
_DIFF = b"""diff --git a/app.py b/app.py
--- a/app.py
+++ b/app.py
@@ -1,2 +1,3 @@
 def load(query, name):
+    return eval(canary_of_the_diff)
     return None
"""
_ROLES = (
    options_pb2.TENANT_ROLE_SUBMITTER,
    options_pb2.TENANT_ROLE_KEY_ADMIN,
    options_pb2.TENANT_ROLE_AUDITOR,
    options_pb2.TENANT_ROLE_OPERATOR,
)


def create(stack: Stack, tenant: str) -> str:
    """Create a tenant that the profile `developer` may do everything for; return its id."""
    with stack.connect("operator") as connection:
        connection.admin.CreateTenantKey(
            admin_pb2.CreateTenantKeyRequest(tenant=tenant_name(tenant), request_id=new_id("req"))
        )
        connection.tenants.CreateTenant(
            tenant_pb2.CreateTenantRequest(name=tenant_name(tenant), request_id=new_id("req"))
        )
        connection.callers.AllowCaller(
            tenant_pb2.AllowCallerRequest(
                parent=tenant_name(tenant),
                caller=tenant_pb2.Caller(
                    spiffe_id=f"spiffe://{TRUST_DOMAIN}/client/developer", roles=_ROLES
                ),
                request_id=new_id("req"),
            )
        )
    return tenant


def fresh_key(provider: str) -> str:
    """Return a made-up key of a provider's shape."""
    return _PREFIXES[provider] + secrets.token_hex(22)


def add_request(stack: Stack, tenant: str, provider: str, key: str = "") -> key_pb2.AddKeyRequest:
    """Return the request that adds a made-up key; it may be sent more than once."""
    key_id, request_id = new_id("key"), new_id("req")
    with stack.connect("developer", tenant=tenant) as connection:
        sealed = connection.seal(provider, key or fresh_key(provider), key_id, "add", request_id)
    return key_pb2.AddKeyRequest(
        parent=tenant_name(tenant),
        key_id=key_id,
        provider=f"PROVIDER_{provider.upper()}",
        display_name="default",
        sealed_key=sealed,
        request_id=request_id,
    )


def add_key(stack: Stack, tenant: str, provider: str, key: str = "") -> str:
    """Add a made-up key, wait for its verdict, and return its id."""
    request = add_request(stack, tenant, provider, key)
    with stack.connect("developer", tenant=tenant) as connection:
        name = connection.keys.AddKey(request).key.provider_key.name
        for _ in connection.keys.WatchKey(key_pb2.WatchKeyRequest(name=name), timeout=60):
            pass
    return request.key_id


def review(connection: Any, tenant: str, **how: Any) -> review_pb2.Review:
    """Submit a small review, wait for its end, and return it; `how` is for the submission."""
    answer = connection.reviews.SubmitReview(
        review_pb2.SubmitReviewRequest(
            parent=tenant_name(tenant),
            input=review_pb2.ReviewInput(repository="acme/shop", diff=_DIFF),
            request_id=new_id("req"),
        ),
        timeout=20,
        **how,
    )
    found: review_pb2.Review = answer.review
    request = review_pb2.WatchReviewRequest(name=found.name)
    for message in connection.reviews.WatchReview(request, timeout=60):
        found = message.review
    return found


def model(provider: str) -> str:
    """Return a provider's default model as `provider/model`."""
    return f"{provider}/{models.load(None).default(provider)}"
