"""What Vault's Kubernetes login asks of a Kubernetes API server: a real HTTPS server for it.

It keeps service accounts, signs their tokens (RS256, the claims of a projected token), and
answers `POST /apis/authentication.k8s.io/v1/tokenreviews` as the API server does: only to a
caller with a token of its own that may create TokenReviews, by signature, end, audience and
whether the account still exists.
https://kubernetes.io/docs/reference/kubernetes-api/authentication-resources/token-review-v1/
"""

from __future__ import annotations

import base64
import json
import ssl
import threading
import time
import uuid
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.hazmat.primitives.hashes import SHA256

from deploy.local.pki import CertificateAuthority

ISSUER = "https://kubernetes.default.svc"
_PATH = "/apis/authentication.k8s.io/v1/tokenreviews"
#: Who may create TokenReviews: Vault's own service account.
REVIEWER = "vault/vault"


class KubernetesApi:
    """An API server with the service accounts that `accounts` has (`namespace/name` → uid)."""

    def __init__(self, folder: Path) -> None:
        self.accounts: dict[str, str] = {}
        #: The `spec` of each TokenReview that was answered.
        self.reviews: list[dict] = []
        self._key = rsa.generate_private_key(65537, 2048)
        authority = CertificateAuthority.new("kubernetes.test")
        self.ca = folder / "kubernetes-ca.pem"
        self.ca.write_text(authority.pem)
        authority.issue(folder / "kubernetes", spiffe_id="kubernetes", dns=["localhost"])
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.load_cert_chain(folder / "kubernetes.pem", folder / "kubernetes.key")
        self._port = 0
        self.start()
        self.create(REVIEWER)

    @property
    def address(self) -> str:
        return f"https://localhost:{self._port}"

    def create(self, account: str) -> None:
        """Create a service account; one of the same name is another account."""
        self.accounts[account] = str(uuid.uuid4())

    def token(
        self, account: str, *, audience: str = "vault", seconds: float = 600, uid: str = ""
    ) -> str:
        """Return a projected token of an account, valid for so long."""
        namespace, _, name = account.partition("/")
        now = int(time.time())
        claims = {
            "aud": [audience],
            "exp": int(now + seconds),
            "iat": now,
            "iss": ISSUER,
            "jti": str(uuid.uuid4()),
            "kubernetes.io": {
                "namespace": namespace,
                "serviceaccount": {"name": name, "uid": uid or self.accounts.get(account, "")},
            },
            "nbf": now,
            "sub": f"system:serviceaccount:{namespace}:{name}",
        }
        head = {"alg": "RS256", "kid": "test", "typ": "JWT"}
        signed = ".".join(_encode(json.dumps(part).encode()) for part in (head, claims))
        signature = self._key.sign(signed.encode(), padding.PKCS1v15(), SHA256())
        return f"{signed}.{_encode(signature)}"

    def start(self) -> None:
        """Serve, at the same address as before."""
        api = self

        class Handler(BaseHTTPRequestHandler):
            def setup(self) -> None:
                self.request = api._context.wrap_socket(self.request, server_side=True)
                super().setup()

            def finish(self) -> None:
                super().finish()
                # The server closes the plain socket, which TLS has taken over.
                self.request.close()

            def do_POST(self) -> None:
                asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                bearer = self.headers.get("Authorization", "").removeprefix("Bearer ")
                status, answer = api._answer(self.path, bearer, asked)
                body = json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *arguments: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", self._port), Handler)
        self._port = self._server.server_port
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))
        self._thread.start()

    def stop(self) -> None:
        """Refuse connections."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def _answer(self, path: str, bearer: str, asked: dict) -> tuple[int, dict]:
        if path != _PATH:
            return 404, _status(404, "NotFound")
        caller = self._account(bearer)
        if caller is None:
            return 401, _status(401, "Unauthorized")
        if caller != REVIEWER:
            return 403, _status(403, "Forbidden")
        spec = asked["spec"]
        self.reviews.append(spec)
        status: dict = {"authenticated": False, "user": {}}
        account = self._account(spec["token"])
        audiences = set(_claims(spec["token"])["aud"]) & set(spec.get("audiences") or [ISSUER])
        if account is None:
            status["error"] = "[invalid bearer token, service account token has expired]"
        elif not audiences:
            status["error"] = "token audiences are invalid for the target audiences"
        else:
            namespace, _, name = account.partition("/")
            status = {
                "authenticated": True,
                "audiences": sorted(audiences),
                "user": {
                    "username": f"system:serviceaccount:{namespace}:{name}",
                    "uid": self.accounts[account],
                },
            }
        return 201, {
            "apiVersion": "authentication.k8s.io/v1",
            "kind": "TokenReview",
            "metadata": {},
            "spec": spec,
            "status": status,
        }

    def _account(self, token: str) -> str | None:
        """Return whose token it is; None where it is nobody's, or not any more."""
        signed, _, signature = token.rpartition(".")
        try:
            self._key.public_key().verify(
                _decode(signature), signed.encode(), padding.PKCS1v15(), SHA256()
            )
        except (InvalidSignature, ValueError):
            return None
        claims = _claims(token)
        bound = claims["kubernetes.io"]
        account = f"{bound['namespace']}/{bound['serviceaccount']['name']}"
        alive = self.accounts.get(account) == bound["serviceaccount"]["uid"]
        return account if alive and claims["exp"] > time.time() else None


def _claims(token: str) -> dict:
    return json.loads(_decode(token.split(".")[1]))


def _status(code: int, reason: str) -> dict:
    return {
        "apiVersion": "v1",
        "kind": "Status",
        "status": "Failure",
        "message": reason,
        "reason": reason,
        "code": code,
    }


def _encode(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode().rstrip("=")


def _decode(text: str) -> bytes:
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
