"""The one module that imports hvac: it builds the requests of Vault's API.

hvac's transport is replaced (see `wire`), and with it everything that hvac would raise: an
answer comes back as a status and a body, and no exception is ever made from a body's text.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlencode

from hvac.adapters import Adapter
from hvac.api.auth_methods import AppRole, Kubernetes, Token
from hvac.api.secrets_engines import Transit
from hvac.api.secrets_engines.kv_v2 import KvV2
from hvac.api.system_backend import Health as HealthApi

from services.keyvault.kek.vault.reply import Reply
from services.keyvault.kek.vault.wire import Wire


class Call(Adapter):  # type: ignore[misc] # hvac has no types
    """One call: hvac's API classes see an adapter. Its methods return a `Reply`, or raise
    WireError."""

    def __init__(
        self,
        wire: Wire,
        token: str,
        namespace: str,
        deadline: float,
        headers: Mapping[str, str] = {},
    ) -> None:
        """Call with a token ("" for none) and extra headers, until `deadline` (monotonic)."""
        # Not the base's: it opens a session of `requests`, which nothing here uses.
        self._wire = wire
        self._deadline = deadline
        self._headers = {"X-Vault-Request": "true", **headers}
        if token:
            self._headers["X-Vault-Token"] = token
        if namespace:
            self._headers["X-Vault-Namespace"] = namespace

    def request(
        self,
        method: str,
        url: str,
        headers: Mapping[str, str] | None = None,
        raise_exception: bool = True,
        **kwargs: Any,
    ) -> Reply:
        """Send what hvac built."""
        body = b""
        if kwargs.get("json") is not None:
            body = json.dumps(kwargs["json"], separators=(",", ":")).encode()
        if kwargs.get("params"):
            url += "?" + urlencode(kwargs["params"])
        return self._wire.send(method.upper(), url, self._headers, body, self._deadline)

    def get_login_token(self, response: Any) -> str:
        """Never used: tokens are kept by `login.Session`."""
        raise NotImplementedError

    @property
    def transit(self) -> Any:
        """The Transit secrets engine."""
        return Transit(self)

    @property
    def kv(self) -> Any:
        """The key/value secrets engine, version 2."""
        return KvV2(self)

    @property
    def token(self) -> Any:
        """The token's own methods: look up, renew."""
        return Token(self)

    def login_kubernetes(self, mount: str, role: str, jwt: str) -> Reply:
        """Log in with a service account's token."""
        reply: Reply = Kubernetes(self).login(role, jwt, use_token=False, mount_point=mount)
        return reply

    def login_approle(self, mount: str, role_id: str, secret_id: str) -> Reply:
        """Log in with an AppRole."""
        reply: Reply = AppRole(self).login(role_id, secret_id, use_token=False, mount_point=mount)
        return reply

    def health(self) -> Reply:
        """Ask how the node is; needs no token."""
        reply: Reply = HealthApi(self).read_health_status(method="GET")
        return reply

    def configure_minimum(self, mount: str, key: str, minimum: int) -> Reply:
        """Allow a key's versions from `minimum` on, to encrypt and to decrypt.

        Sent directly: hvac refuses equal minima, which Vault takes and `trim` needs.
        """
        body = {"min_decryption_version": minimum, "min_encryption_version": minimum}
        return self.request("post", f"/v1/{mount}/keys/{key}/config", json=body)
