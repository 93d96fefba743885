"""Vault's states: what each is called, what it means, and whether calls may be tried in it.

Sources: the `sys/health` API (its status codes), and HTTP statuses of ordinary calls,
https://developer.hashicorp.com/vault/api-docs/system/health and `.../api-docs#http-status-codes`.
"""

from __future__ import annotations

from services.keyvault.kek import Health, KekUnavailableError

#: `sys/health` answers one of these.
OF_HEALTH = {
    200: "ok",
    429: "standby",
    472: "dr_secondary",
    473: "performance_standby",
    474: "standby_without_leader",
    501: "uninitialized",
    503: "sealed",
    530: "removed",
}
# A standby forwards what it is asked to the active node, so calls are tried on it; one whose
# leader is away (474), a disaster-recovery secondary and a removed node can't.
USABLE = frozenset({"ok", "standby", "performance_standby"})

SENTENCES = {
    "ok": "Vault answers",
    "standby": "Vault's node is a standby; it forwards calls to the active one",
    "performance_standby": "Vault's node is a performance standby; it answers by itself",
    "dr_secondary": "Vault's node is a disaster-recovery secondary; point keyvault at the primary",
    "standby_without_leader": "Vault's node is a standby that does not reach the active node",
    "uninitialized": "Vault is not initialised",
    "sealed": "Vault is sealed; unseal it",
    "removed": "Vault's node was removed from its cluster; point keyvault at another",
    "starting": "keyvault has not reached Vault yet",
    "unwatched": "keyvault's watch on Vault, or on its own token, died; it is started again",
    "unreachable": "Vault can't be reached at its address",
    "slow": "Vault does not answer within the deadline",
    "broken": "Vault's connection breaks off, or something else answers at its address",
    "tls": "Vault's certificate is not signed by the configured CA, or not for that name",
    "failing": "Vault answers with errors of its own; see its log",
    "busy": "more calls to Vault wait than are allowed; the newest are turned away",
    "rate_limited": "Vault refuses calls above a rate-limit quota",
    "redirected": "Vault redirects to another node; allow request forwarding, or point keyvault"
    " at the active node",
    "denied": "Vault's policy or token does not allow what keyvault must do",
    "login_refused": "Vault refuses keyvault's login",
    "no_credential": "the file with keyvault's credential for Vault can't be read",
    "no_mount": "Vault has no such secrets engine or login method; see deploy/vault",
    "no_namespace": "Vault has no such namespace; see BYOKEEP_VAULT_NAMESPACE",
    "misconfigured": "Vault does not take the request: does the set-up match deploy/vault?",
}


def of_answer(status: int) -> str:
    """Return the state that the status of an ordinary call stands for; "ok" where it answers."""
    if status < 300 or status == 400:
        return "ok"
    if 300 <= status < 400:
        return "redirected"
    named = {403: "denied", 404: "no_mount", 405: "misconfigured", 429: "rate_limited"}
    return named.get(status) or OF_HEALTH.get(status, "failing")


def health(state: str) -> Health:
    """Return a state as the protocol has it."""
    return Health(ok=state in USABLE, state=state, detail=SENTENCES[state])


def unavailable(state: str) -> KekUnavailableError:
    """Return the error for a state in which Vault did not do what it was asked."""
    return KekUnavailableError("vault", state, SENTENCES[state])
