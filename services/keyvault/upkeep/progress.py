"""How far a tenant's rewrap is, counted over its state, for whoever listens."""

from __future__ import annotations

from byokeep.keyvault.v1 import admin_pb2 as pb

from services.keyvault import kek, lifecycle
from services.keyvault.ledger import Tenant
from services.keyvault.lifecycle import RETRY_SECONDS
from services.keyvault.tenant_keys import untrimmed

#: Phases in which nothing more is done.
ENDED = frozenset((pb.KEK_JOB_PHASE_DONE, pb.KEK_JOB_PHASE_PARTIAL, pb.KEK_JOB_PHASE_CANCELLED))
_MOST_FAILURES = 100


def progress(tenant: Tenant, backends: kek.Backends, *, quiet: bool) -> pb.RewrapTenantResponse:
    """Return where a tenant stands on the way to its target; all of its parts were read. `quiet`:
    nothing is destroyed now, nor soon."""
    state = tenant.state
    answer = pb.RewrapTenantResponse(backend=state.target_backend, version=state.target_version)
    waiting, refused = 0, False
    tried = tenant.now.timestamp() - RETRY_SECONDS
    for key, one in tenant.living():
        answer.total += 1
        there = lifecycle.at_target(state, one)
        answer.done += there
        if not one.unopened_time:
            waiting += not there
            continue
        refused = refused or there
        answer.failed += not there
        waiting += not there and one.unopened_time <= tried
        if len(answer.failures) < _MOST_FAILURES:
            reason = one.unopened_reason
            answer.failures.add(key_id=key.key_id, version=one.version, reason=reason)
    if state.shredded or state.target_backend != backends.primary.name:
        answer.phase = pb.KEK_JOB_PHASE_CANCELLED
    elif waiting:
        answer.phase = pb.KEK_JOB_PHASE_REWRAP
    elif answer.failed:
        answer.phase = pb.KEK_JOB_PHASE_PARTIAL
    elif not untrimmed(state, backends):
        answer.phase = pb.KEK_JOB_PHASE_DONE
    else:
        # What does not open is at the target: nothing is trimmed where its ciphertext is not there.
        over = refused or quiet
        answer.phase = pb.KEK_JOB_PHASE_PARTIAL if over else pb.KEK_JOB_PHASE_TRIM
    return answer
