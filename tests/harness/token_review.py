"""The little of a Kubernetes API server that Vault's Kubernetes login asks: TokenReview."""

from __future__ import annotations

import base64
import json
import os
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class TokenReview:
    """Answers for tokens that it made itself and has not withdrawn."""

    def __init__(self) -> None:
        self._valid: dict[str, str] = {}
        self.reviews = 0
        review = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                length = int(self.headers["Content-Length"])
                asked = json.loads(self.rfile.read(length))["spec"]["token"]
                body = json.dumps(review._answer(asked)).encode()
                self.send_response(201)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *arguments: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))
        self._thread.start()

    def token(self, account: str) -> str:
        """Return a projected service-account token of an account in namespace byokeep."""
        claims = {
            "aud": ["vault"],
            "exp": int(time.time()) + 600,
            "iat": int(time.time()),
            "iss": "https://kubernetes.default.svc",
            "kubernetes.io": {
                "namespace": "byokeep",
                "serviceaccount": {"name": account, "uid": f"uid-{account}"},
            },
            "sub": f"system:serviceaccount:byokeep:{account}",
        }
        head = {"alg": "RS256", "kid": "test"}
        # The signature is the API server's to check, which is this.
        parts = (json.dumps(head).encode(), json.dumps(claims).encode(), os.urandom(256))
        token = ".".join(base64.urlsafe_b64encode(part).decode().rstrip("=") for part in parts)
        self._valid[token] = account
        return token

    def withdraw(self, token: str) -> None:
        self._valid.pop(token)

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def _answer(self, token: str) -> dict:
        self.reviews += 1
        account = self._valid.get(token)
        status: dict = {"authenticated": account is not None}
        if account is not None:
            status["audiences"] = ["vault"]
            status["user"] = {
                "username": f"system:serviceaccount:byokeep:{account}",
                "uid": f"uid-{account}",
            }
        return {
            "apiVersion": "authentication.k8s.io/v1",
            "kind": "TokenReview",
            "status": status,
        }
