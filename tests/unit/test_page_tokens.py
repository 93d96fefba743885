"""A page token that no page gave is refused, by every list of every service."""

from __future__ import annotations

import pytest
from byokeep.keyvault.v1 import admin_pb2, audit_pb2, custody_pb2
from byokeep.orchestrator.v1 import key_pb2, review_pb2, settings_pb2, tenant_pb2
from google.protobuf import message_factory

from services.common.errors import ByokeepError
from services.common.interceptor import validate

GIVEN = {
    "ListEvents": "17",
    "ListCheckpoints": "4096",
    "ListTenantKeys": "acme-2",
    "ListTenants": "acme",
    "ListPlans": "team",
    "ListCallers": "spiffe://byokeep.local/client/ci",
    "GetReview": "17",
    "ListReviews": "rev_" + "0" * 26 + "." + "a" * 16,
    "CancelReviews": "rev_" + "0" * 26 + "." + "a" * 16,
    "RetryReviews": "rev_" + "0" * 26 + "." + "a" * 16,
    "ListKeyUses": "att_" + "0" * 26,
    "ListKeys": "key_" + "0" * 26,
    "ListModels": "openai/ft:gpt-6:acme::x1",
}
FORGED = ["forged!", "../x", "a\0", "a b", "é", "-" * 5000, "' OR 1=1 --", "eyJpZCI6MX0="]
_MANY = {"filter": review_pb2.ReviewFilter(), "request_id": "req-12345678"}
OTHERS = {
    "ListKeyUses": {"name": "tenants/acme/providerKeys/key_" + "0" * 26},
    "GetReview": {"name": "tenants/acme/reviews/rev_" + "0" * 26},
    "CancelReviews": _MANY,
    "RetryReviews": _MANY,
}


def lists():
    modules = admin_pb2, audit_pb2, custody_pb2, key_pb2, review_pb2, settings_pb2, tenant_pb2
    for module in modules:
        for service in module.DESCRIPTOR.services_by_name.values():
            for method in service.methods:
                if "page_token" in method.input_type.fields_by_name:
                    yield pytest.param(method, id=method.full_name)


@pytest.mark.parametrize("method", list(lists()))
def test_forged_page_tokens_are_refused(method):
    """Shown to fail with a `max_len` in place of a list's pattern: the token becomes a parameter
    of SQL, where a NUL is INTERNAL."""
    request = message_factory.GetMessageClass(method.input_type)
    fields = dict(OTHERS.get(method.name, {}))
    if "parent" in method.input_type.fields_by_name:
        fields["parent"] = "tenants/acme"
    validate(request(**fields))
    validate(request(**fields, page_token=GIVEN[method.name]))
    for token in FORGED:
        with pytest.raises(ByokeepError) as refused:
            validate(request(**fields, page_token=token))
        assert refused.value.metadata["field"] == "page_token", token
