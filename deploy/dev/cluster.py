"""The few calls of the Kubernetes API that the PKI job makes, with its pod's own token."""

from __future__ import annotations

import base64
import json
import ssl
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
_API = "https://kubernetes.default.svc"
_SECONDS = 10.0


class Cluster:
    """Secrets and ConfigMaps of the cluster that this pod runs in."""

    def __init__(self, account: Path = _ACCOUNT) -> None:
        """Use a service account's folder."""
        self._token = account / "token"
        self._context = ssl.create_default_context(cafile=account / "ca.crt")

    def secret(self, namespace: str, name: str) -> dict[str, bytes]:
        """Return a Secret's files; none where there is no such Secret."""
        found = self._call("GET", f"/api/v1/namespaces/{namespace}/secrets/{name}")
        data = {} if found is None else found.get("data") or {}
        return {key: base64.b64decode(value) for key, value in data.items()}

    def write_secret(self, namespace: str, name: str, files: Mapping[str, bytes]) -> None:
        """Create a Secret, or give it these files."""
        data = {key: base64.b64encode(value).decode() for key, value in files.items()}
        self._write("secrets", namespace, name, {"kind": "Secret", "type": "Opaque", "data": data})

    def write_config(self, namespace: str, name: str, files: Mapping[str, str]) -> None:
        """Create a ConfigMap, or give it these files."""
        self._write("configmaps", namespace, name, {"kind": "ConfigMap", "data": dict(files)})

    def _write(self, kind: str, namespace: str, name: str, body: dict[str, Any]) -> None:
        path = f"/api/v1/namespaces/{namespace}/{kind}/{name}"
        body |= {"apiVersion": "v1", "metadata": {"name": name, "namespace": namespace}}
        # Server-side apply: creates or changes, whoever was first.
        self._call("PATCH", f"{path}?fieldManager=byokeep-pki&force=true", body)

    def _call(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        request = urllib.request.Request(  # noqa: S310 the cluster's own API
            _API + path,
            method=method,
            data=None if body is None else json.dumps(body).encode(),
            headers={
                "Authorization": f"Bearer {self._token.read_text().strip()}",
                "Content-Type": "application/apply-patch+yaml",
            },
        )
        try:
            with urllib.request.urlopen(  # noqa: S310
                request, timeout=_SECONDS, context=self._context
            ) as reply:
                return json.load(reply)
        except urllib.error.HTTPError as error:
            if error.code == 404 and method == "GET":
                return None
            raise
