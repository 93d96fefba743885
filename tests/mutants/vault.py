"""The protections of the Vault backend; their tests need a real Vault (`tests/harness/vault.py`)."""

from __future__ import annotations

from tests.mutants.table import Mutant

_KV = "services/keyvault/"
_VT = _KV + "kek/vault/"
_INT = "tests/integration/"

MUTANTS = (
    Mutant(
        "Vault: one Transit key for every tenant",
        _VT + "backend.py",
        'name = self._prefix + kek.replace("/", "-")',
        'name = self._prefix + "tenant-all"',
        (_INT + "test_transit.py::test_transit_wrong_tenant",),
    ),
    Mutant(
        "Vault: an answer's buffer is not wiped",
        _VT + "reply.py",
        "self._view[: self._end] = bytes(self._end)",
        "pass",
        (_INT + "test_vault_memory.py",),
    ),
    Mutant(
        "Vault: a refused token is not replaced",
        _VT + "session.py",
        "if reply.status == 403 and await self._replaced(token):",
        "if False:",
        (_INT + "test_token_lifecycle.py::test_token_lifecycle_refused",),
    ),
    Mutant(
        "Vault: each refused call logs in",
        _VT + "session.py",
        "            if self._token != refused:\n                return\n",
        "",
        (_INT + "test_token_lifecycle.py::test_token_lifecycle_refused",),
    ),
    Mutant(
        "Vault: tokens are not renewed",
        _VT + "session.py",
        'if self._renewable and self._login.method != "token_file":',
        "if False:",
        (_INT + "test_token_lifecycle.py::test_token_lifecycle_renewed",),
    ),
    Mutant(
        "Vault: no bulkhead",
        _VT + "pool.py",
        "if self._held >= self._limit:",
        "if False:",
        ("tests/component/test_vault_wire.py::test_the_pool_turns_away_what_is_too_much",),
    ),
    Mutant(
        "Vault: an answer that nobody waits for is kept",
        _VT + "pool.py",
        "            future.add_done_callback(_discard)\n            raise\n",
        "            raise\n",
        ("tests/component/test_vault_wire.py::test_an_answer_that_nobody_waits_for_is_wiped",),
    ),
    Mutant(
        "Vault: the deadline is one read's, not the call's",
        _VT + "reply.py",
        "self._socket.settimeout(remaining(self._deadline))",
        "self._socket.settimeout(5.0)",
        ("tests/component/test_vault_wire.py::test_an_answer_that_drips_ends_at_the_deadline",),
    ),
    Mutant(
        "Vault: calls that fail close nothing",
        _VT + "watch.py",
        'return self._last_failure if self._failures >= _FAILURES else ""',
        'return ""',
        (_INT + "test_vault_states.py::test_vault_slow",),
    ),
    Mutant(
        "Vault: a state of Vault's is taken for an answer",
        _VT + "session.py",
        'if state != "ok":\n            reply.wipe()',
        "if False:\n            reply.wipe()",
        (_INT + "test_vault_states.py::test_vault_states",),
    ),
    Mutant(
        "Vault: an answer's text goes into an exception",
        _VT + "reply.py",
        'pass\n        raise WireError("broken")',
        "pass\n        raise ValueError(bytes(self.body))",
        (_INT + "test_vault_states.py::test_vault_error_text",),
    ),
    Mutant(
        "Vault: a credential that others may read is taken",
        _VT + "login.py",
        "if not private or not path.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO):",
        "if True:",
        ("tests/unit/test_vault_parts.py::test_a_credential_that_others_may_read_is_refused",),
    ),
    Mutant(
        "Vault: a lease that Vault failed stays alive",
        _KV + "leasing.py",
        "            await self._end(redeemed, audit_pb2.AUDIT_EVENT_TYPE_RELEASED, unavailable.reason)\n",
        "",
        (_INT + "test_vault_states.py::test_a_failed_lease_does_not_stay_alive",),
    ),
    Mutant(
        "Vault: a grant is spent on a Vault that is known to be away",
        _KV + "redemption.py",
        "        if unavailable is not None:\n            # Before",
        "        if False:\n            # Before",
        (_INT + "test_vault_states.py::test_vault_states",),
    ),
    Mutant(
        "Vault policy: data opens batches",
        "deploy/vault/policies/keyvault-data.hcl",
        '  allowed_parameters = { "ciphertext" = [] }\n  denied_parameters  = { "batch_input" = [] }\n',
        "",
        (_INT + "test_policy_matrix.py::test_policy_matrix_data",),
    ),
    Mutant(
        "Vault policy: data may create keys by encrypting",
        "deploy/vault/policies/keyvault-data.hcl",
        "# Never returns a plaintext.\n",
        'path "transit/encrypt/byokeep-*" {\n  capabilities = ["create", "update"]\n}\n',
        (_INT + "test_policy_matrix.py::test_policy_matrix_refused_to_both",),
    ),
    Mutant(
        "Vault policy: admin makes keys exportable",
        "deploy/vault/policies/keyvault-admin.hcl",
        '    "deletion_allowed"       = []\n',
        '    "deletion_allowed"       = []\n    "exportable" = []\n',
        (_INT + "test_policy_matrix.py::test_policy_matrix_refused_to_both",),
    ),
    Mutant(
        "Vault: the anchor is written without check-and-set",
        _VT + "log.py",
        "cas=int(after.version), ",
        "",
        (_INT + "test_vault_log.py::test_two_replicas_share_the_anchor",),
    ),
    Mutant(
        "Vault's log is not told the lease",
        _VT + "backend.py",
        "return {LEASE_HEADER: what} if what else {}",
        "return {}",
        (_INT + "test_vault_reconcile.py::test_vault_reconcile",),
    ),
    Mutant(
        "Vault's log: a lease explains any number of openings",
        "clients/python/src/byokeep/vaultlog.py",
        "used.add(access.purpose)",
        "pass",
        ("tests/unit/test_vaultlog.py::test_a_lease_explains_one_opening",),
    ),
    Mutant(
        "Vault's log: another tenant's lease explains an opening",
        "clients/python/src/byokeep/vaultlog.py",
        "if tenant != access.tenant:",
        "if not tenant:",
        ("tests/unit/test_vaultlog.py::test_openings_without_a_lease",),
    ),
    Mutant(
        "Vault: a shred sweep trims nothing",
        "services/keyvault/rotation.py",
        "            await self._backends.named(job.target_backend).trim(name, job.target_version)",
        "            pass",
        (_INT + "test_shred.py::test_shred_key",),
    ),
    Mutant(
        "Vault: a destroyed tenant's KEK stays",
        "services/keyvault/service/admin.py",
        "            await backend.destroy(kek.tenant_kek(tenant))",
        "            pass",
        (_INT + "test_shred.py::test_shred_tenant",),
    ),
)
