"""`byokeep tenant`, `caller`, `model`, `admin` against a fake edge over real mutual TLS."""

from __future__ import annotations

import pytest
from byokeep.common.v1 import options_pb2
from byokeep.keyvault.v1 import admin_pb2
from byokeep.orchestrator.v1 import settings_pb2, tenant_pb2

pytest_plugins = ["tests.harness.cli_fixtures"]

CI = "spiffe://acme.example/ci"


def test_create_makes_the_kek_once_the_orchestrator_agreed(edge, byokeep):
    ran = byokeep("tenant", "create", "acme", "--plan", "starter")
    assert ran.code == 0
    kinds = [type(request) for request in edge.requests]
    assert kinds == [tenant_pb2.CreateTenantRequest, admin_pb2.CreateTenantKeyRequest]
    assert edge.requests[0].plan == "starter"


def test_a_refused_create_makes_no_kek(edge, byokeep):
    edge.denied.add("CreateTenant")
    assert byokeep("tenant", "create", "acme").code == 3
    assert edge.sent(admin_pb2.CreateTenantKeyRequest) == []


@pytest.mark.parametrize(
    ("state", "has_kek", "code"),
    [("ACTIVE", False, 0), ("ACTIVE", True, 2), ("DELETED", False, 2)],
)
def test_a_repeated_create_completes_the_kek(edge, byokeep, state, has_kek, code):
    edge.fail("CreateTenant", "ALREADY_EXISTS", "TENANT_EXISTS", "the tenant exists")
    edge.tenants["tenants/demo"].state = tenant_pb2.TenantState.Value(f"TENANT_STATE_{state}")
    edge.has_kek = has_kek
    ran = byokeep("tenant", "create", "demo")
    assert ran.code == code
    assert ("key is created" in ran.out) is (code == 0)
    assert ("TENANT_EXISTS" in ran.err) is (code == 2)
    assert bool(edge.sent(admin_pb2.CreateTenantKeyRequest)) is (state == "ACTIVE")


def test_what_takes_an_operator_says_so(edge, byokeep):
    edge.fail("SuspendTenant", "PERMISSION_DENIED", "TENANT_NOT_ALLOWED", "No.", roles="operator")
    assert "takes an operator of the deployment" in byokeep("tenant", "suspend", "demo").err


def test_tenant_commands_need_no_half_measures(edge, byokeep):
    """Without keyvault's address nothing is created or deleted at the orchestrator."""
    edge.write_config(vault=False)
    for arguments in (("create", "acme"), ("delete", "demo", "--yes")):
        ran = byokeep("tenant", *arguments)
        assert ran.code == 2
        assert "keyvault" in ran.err
    assert edge.requests == []


def test_delete_destroys_and_shreds(edge, byokeep):
    ran = byokeep("tenant", "delete", "demo", "--yes", "--json")
    assert ran.json == {"destroyedKeys": 3, "destroyedVersions": "4", "shred": "immediate"}


def test_delete_without_a_terminal_needs_yes(edge, byokeep):
    assert byokeep("tenant", "delete", "demo").code == 2
    assert edge.requests == []


def test_suspend_resume_list_plan(edge, byokeep):
    assert "SUSPENDED" in byokeep("tenant", "suspend", "demo").out
    assert "SUSPENDED" in byokeep("tenant", "list").out
    assert "ACTIVE" in byokeep("tenant", "suspend", "demo", "--resume").out
    assert byokeep("tenant", "set-plan", "demo", "enterprise").code == 0
    assert "team (default)" in byokeep("tenant", "plans").out
    assert byokeep("tenant", "plans", "--json").json["plans"][0]["keysPerProvider"] == 1
    assert edge.settings.plan == "enterprise"
    assert byokeep("tenant", "list", "--json").json["tenants"][0]["name"] == "tenants/demo"


def test_allow_list_deny(edge, byokeep):
    roles = ("--role", "submitter", "--role", "key-admin", "--role", "submitter")
    assert byokeep("caller", "allow", CI, *roles, "--assert-users").code == 0
    (request,) = edge.sent(tenant_pb2.AllowCallerRequest)
    assert list(request.caller.roles) == [
        options_pb2.TENANT_ROLE_SUBMITTER,
        options_pb2.TENANT_ROLE_KEY_ADMIN,
    ]
    assert "submitter, key-admin, may assert users" in byokeep("caller", "list").out
    assert byokeep("caller", "deny", CI).code == 0
    assert byokeep("caller", "list", "--json").json == {"callers": []}


def test_tenant_option_overrides_the_profile(edge, byokeep):
    for arguments in (
        ("caller", "list", "--tenant", "acme"),
        ("caller", "--tenant", "acme", "list"),
        ("--tenant", "acme", "caller", "list"),
    ):
        byokeep(*arguments)
    assert [r.parent for r in edge.sent(tenant_pb2.ListCallersRequest)] == ["tenants/acme"] * 3


def test_models(edge, byokeep):
    edge.models.append(
        settings_pb2.Model(model="openai/gpt-5", key_ids=["key_1"], provider_default=True)
    )
    assert byokeep("model", "set", "openai/gpt-5").code == 0
    assert byokeep("model", "set", "gemini/flash", "--repo", "acme/*").code == 0
    listed = byokeep("model", "list").out
    assert "provider's default" in listed
    assert "default: openai/gpt-5" in listed
    edge.models.append(settings_pb2.Model(model="gemini/flash", key_ids=["key_2"]))
    assert "acme/*: gemini/flash" in listed
    assert "none: choose one with byokeep model set" in byokeep("model", "unset").out
    assert byokeep("model", "list", "--json").json["defaultModel"] == ""


def test_admin(edge, byokeep):
    assert "answers" in byokeep("admin", "status").out
    assert "local v1" in byokeep("admin", "create-tenant-key", "acme").out
    assert "v2" in byokeep("admin", "rotate-kek", "acme").out
    assert "rewrapped 2 of 2" in byokeep("admin", "rewrap", "acme").out
    assert len(byokeep("admin", "rewrap", "acme", "--json").lines) == 2
    assert edge.sent(admin_pb2.RewrapTenantRequest)[-1].trim is False
    both = byokeep("admin", "rotate-kek", "acme", "--rewrap", "--trim")
    assert "all are under local v2" in both.out
    assert edge.sent(admin_pb2.RewrapTenantRequest)[-1].trim is True
    assert byokeep("admin", "shred-tenant", "acme").code == 2
    assert "for good" in byokeep("admin", "shred-tenant", "acme", "--yes").out
    assert byokeep("admin", "resume-leases", "--reason", "restored on purpose").code == 0
    assert byokeep("admin", "resume-leases").code == 2


def test_admin_ends_leases(edge, byokeep):
    lease = "lea_" + "0" * 26
    why = ("--reason", "incident 7")
    assert "is revoked" in byokeep("admin", "revoke-lease", lease, *why).out
    assert "had ended before" in byokeep("admin", "revoke-lease", lease, *why).out
    assert edge.sent(admin_pb2.RevokeLeaseRequest)[0].lease_id == lease
    assert byokeep("admin", "revoke-tenant", "acme", *why).code == 2
    assert edge.sent(admin_pb2.RevokeTenantRequest) == []
    ran = byokeep("admin", "revoke-tenant", "acme", *why, "--yes")
    assert "this ended 3" in ran.out
    assert "resume-tenant acme" in ran.err
    assert "nothing had stopped" in byokeep("admin", "resume-tenant", "acme", *why).out
    edge.held = ["acme", "demo"]
    assert "may have leases again" in byokeep("admin", "resume-tenant", "demo", *why).out
    assert edge.sent(admin_pb2.ResumeTenantRequest)[0].reason == "incident 7"
    assert byokeep("admin", "resume-tenant", "acme", *why, "--json").json == {"resumed": True}
    for command in ("revoke-lease", "revoke-tenant", "resume-tenant"):
        assert byokeep("admin", command, lease).code == 2


def test_a_rewrap_that_left_something_is_an_error(edge, byokeep):
    edge.rewrap_ends = "PARTIAL"
    ran = byokeep("admin", "rewrap", "acme")
    assert ran.code == 6
    assert "nothing was trimmed (PARTIAL)" in " ".join(ran.err.split())
    assert byokeep("admin", "migrate-kek", "--all").code == 6


def test_migrate_takes_one_tenant_or_all(edge, byokeep):
    assert byokeep("admin", "migrate-kek").code == 2
    assert byokeep("admin", "migrate-kek", "acme", "--all").code == 2
    assert edge.requests == []
    assert byokeep("admin", "migrate-kek", "acme", "--to", "vault").code == 0
    assert edge.sent(admin_pb2.RewrapTenantRequest)[0].target_backend == "vault"
    # A tenant without data keys has nothing to move.
    assert byokeep("admin", "migrate-kek", "--all", "--trim").code == 0
    assert [one.tenant for one in edge.sent(admin_pb2.RewrapTenantRequest)] == [
        "tenants/acme",
        "tenants/demo",
    ]


def test_where_data_keys_are(edge, byokeep):
    listed = [line.split(maxsplit=1) for line in byokeep("admin", "list-keks").out.splitlines()]
    assert "v1 to v3" in dict(map(tuple, listed))["demo"]
    assert "(no keys)" in dict(map(tuple, listed))["empty"]
    assert "destroyed" in dict(map(tuple, listed))["gone"]
    assert byokeep("admin", "list-keks", "--json").json["tenantKeys"][0]["tenant"] == "tenants/demo"


def test_admin_status_names_suspended_tenants(edge, byokeep):
    assert "suspended" not in byokeep("admin", "status").out
    byokeep("tenant", "suspend", "demo")
    out = byokeep("admin", "status").out
    assert "tenant demo gets no new lease" in out
    assert "byokeep tenant suspend demo --resume" in out
    assert byokeep("admin", "status", "--json").json["suspendedTenants"] == ["demo"]
    edge.denied.add("ListTenants")
    assert "suspended    not known" in byokeep("admin", "status").out


def test_a_bad_spiffe_id_is_told_what_a_good_one_is(edge, byokeep):
    for bad in ("ci.example", "spiffe://Acme/ci", "spiffe://acme.example", "spiffe://a.b/c//d/"):
        ran = byokeep("caller", "allow", bad, "--role", "auditor")
        assert (ran.code, "spiffe://TRUST-DOMAIN/PATH" in ran.err) == (2, True)
    assert edge.requests == []


def test_until_when_the_old_backend_is_needed(edge, byokeep):
    edge.kek_backends.backends.add(backend="vault", primary=True, configured=True, data_keys=4)
    old = edge.kek_backends.backends.add(backend="local", configured=True)
    ran = byokeep("admin", "migrate-kek", "acme")
    assert "backend local: nothing needs it" in " ".join(ran.err.split())
    old.epochs_end_time.FromJsonString("2027-02-22T00:00:00Z")
    for command in (("migrate-kek", "acme"), ("list-keks",)):
        said = " ".join(byokeep("admin", *command).err.split())
        assert "backend local: still needed for content and intake keys until" in said
        assert "2027-02-22 00:00 UTC" in said
    assert "backend vault" not in said
    assert byokeep("admin", "list-keks", "--json").json["backends"][1]["backend"] == "local"


def test_a_signing_key_is_prepared_then_activated(edge, byokeep):
    ran = byokeep("admin", "rotate-system-key", "intake-signing", "--json")
    assert list(ran.json["intake_signing_keys"]) == ["isk_0123456789abcdef"]
    assert edge.sent(admin_pb2.ActivateSystemKeyRequest) == []
    told = byokeep("admin", "rotate-system-key", "intake-signing").out
    assert "intake_signing_keys" in told
    ran = byokeep(
        "admin", "rotate-system-key", "intake-signing", "--activate", "isk_0123456789abcdef"
    )
    assert ran.code == 0
    (sent,) = edge.sent(admin_pb2.ActivateSystemKeyRequest)
    assert sent.key_id == "isk_0123456789abcdef"


def test_what_is_not_built_yet_says_so(edge, byokeep):
    edge.fail("RotateTenantKey", "UNIMPLEMENTED", "NOT_BUILT_YET", "RotateTenantKey comes later")
    ran = byokeep("admin", "rotate-kek", "acme")
    assert ran.code == 5
    assert "RotateTenantKey comes later" in ran.err


def test_whether_a_key_can_use_a_model_is_said(edge, byokeep):
    assert "is not known" in byokeep("model", "set", "openai/gpt-5").err
    edge.settings.default_model_use = settings_pb2.MODEL_USE_USABLE
    assert byokeep("model", "set", "openai/gpt-5").err == ""
    edge.settings.default_model_use = settings_pb2.MODEL_USE_NO_KEY
    ran = byokeep("model", "set", "gemini/flash")
    assert ran.code == 0
    assert "no active gemini key yet: byokeep key add gemini" in ran.err
    edge.settings.default_model_use = settings_pb2.MODEL_USE_LACKING
    assert "no key can use it" in byokeep("model", "list").out


@pytest.mark.parametrize(
    "arguments",
    [
        ("caller", "allow", CI),
        ("caller", "allow", "ci.example", "--role", "auditor"),
        ("caller", "deny", "ci.example"),
        ("tenant", "set-plan", "a", "X_"),
        ("tenant", "create", "Acme Inc"),
        ("tenant", "delete", "../demo", "--yes"),
        ("admin", "shred-tenant", "*", "--yes"),
        ("admin", "revoke-lease", "lea_1", "--reason", "x"),
        ("model", "set", "gpt-5"),
        ("audit", "export", "--chain", "bogus"),
        ("model", "set", "openai/gpt-5", "--repo", "a b"),
        ("key", "list", "--tenant", "tenants/demo"),
        ("review", "--dry-run", "--repo", "a b"),
    ],
    ids=" ".join,
)
def test_bad_input_is_refused_here(edge, byokeep, arguments):
    ran = byokeep(*arguments)
    assert ran.code == 2
    assert ran.err.startswith("error: ")
    assert edge.requests == []


def test_limits_are_set_alone_and_shown(edge, byokeep):
    edge.settings.max_reviews_per_day = 7
    ran = byokeep("limit", "set", "--max-calls-per-day", "500", "--max-diff-bytes", "1000")
    assert ran.code == 0
    (update,) = edge.sent(settings_pb2.UpdateSettingsRequest)
    assert sorted(update.update_mask.paths) == ["max_calls_per_day", "max_diff_bytes"]
    shown = byokeep("limit", "show").out
    assert "500" in shown
    assert "1,000" in shown
    assert "7" in shown
    assert shown.splitlines()[2].split()[-4:-1] == ["20", "the", "deployment"]


def test_limit_set_without_a_ceiling_says_so(edge, byokeep):
    ran = byokeep("limit", "set")
    assert ran.code == 2
    assert "which ceiling" in ran.err
    assert edge.requests == []


def test_a_held_tenant_is_shown_with_the_way_out(edge, byokeep):
    """Shown to fail where `way_out` looks at no held tenants."""
    edge.held = ["acme", "demo"]
    shown = byokeep("admin", "status").out
    for name in edge.held:
        assert f"tenant {name} gets no lease" in shown
        assert f"byokeep admin resume-tenant {name} --reason TEXT" in shown
    assert "byokeep admin resume-tenant demo" in byokeep("status").out
    doctor = byokeep("doctor")
    assert doctor.code == 5
    assert "leases: refused to tenant demo" in doctor.out
    edge.held = ["acme"]
    assert "held" not in byokeep("status").out
    assert "leases: given to tenant demo" in byokeep("doctor").out


def test_what_was_not_chosen_cannot_be_unset(edge, byokeep):
    assert "no default model" in byokeep("model", "unset").err
    byokeep("model", "set", "gemini/flash", "--repo", "acme/*")
    ran = byokeep("model", "unset", "--repo", "other/*")
    assert (ran.code, "there is one for acme/*" in ran.err) == (2, True)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (
            ("limit", "set", "--max-diff-bytes", "99999999"),
            "-diff-bytes takes a number from 0",
        ),
        (("limit", "set", "--max-calls-per-day", "x"), "from 0 to 1,000,000"),
        (("review", "list", "--limit", "0"), "--limit takes a number from 1 to 100,000"),
        (("key", "add", "openai", "--wait", "-3"), "--wait takes a number from 0 on"),
    ],
)
def test_a_range_is_told(edge, byokeep, arguments, says):
    assert says in byokeep(*arguments).err


def test_models_of_paths_are_set_and_what_does_not_count_is_said(edge, byokeep):
    byokeep("model", "set", "openai/a", "--repo", "acme/shop", "--path", "pay/*")
    byokeep("model", "set", "openai/b", "--path", "docs/*")
    sent = edge.sent(settings_pb2.SetModelOverrideRequest)
    assert [(one.repository_pattern, one.path_pattern) for one in sent] == [
        ("acme/shop", "pay/*"),
        ("*", "docs/*"),
    ]
    first, second = edge.settings.model_overrides
    first.matches_none, second.plan_lacks = True, True
    edge.settings.plan = "starter"
    said = byokeep("model", "list").out
    assert "acme/shop pay/*: openai/a (matches the repository of no review so far)" in said
    assert "* docs/*: openai/b (does not count: plan starter has no models per repository)" in said
    assert "for acme/shop pay/*" in byokeep("model", "unset", "--repo", "acme/shop").err
    assert byokeep("model", "unset", "--repo", "acme/shop", "--path", "pay/*").code == 0
    assert byokeep("model", "set", "openai/a", "--path", "a[b]").code == 2


def test_models_that_take_anothers_place_are_listed(edge, byokeep):
    ran = byokeep("model", "fallback", "openai/a", "openai/b")
    assert "else:    openai/a, openai/b" in ran.out
    assert byokeep("model", "list", "--json").json["fallbackModels"] == ["openai/a", "openai/b"]
    assert "else:" not in byokeep("model", "fallback", "--none").out
    for wrong in ((), ("openai/a", "--none"), ("gpt",), ("openai/a", "openai/a")):
        assert byokeep("model", "fallback", *wrong).code == 2


def test_whose_keys_a_tenant_runs_on_is_set(edge, byokeep):
    assert (
        "run on managed keys, and on no others"
        in byokeep("tenant", "set-keys", "demo", "managed").out
    )
    assert "keys: managed" in byokeep("key", "order").out
    assert "the tenant's own keys" in byokeep("tenant", "set-keys", "demo", "own").out
    sent = edge.sent(settings_pb2.SetKeyCustodyRequest)
    assert [one.managed_keys for one in sent] == [True, False]
    assert byokeep("tenant", "set-keys", "demo", "both").code == 2
