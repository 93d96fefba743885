"""A stand-in for an adapter of the external metrics API, in a pod of image tools: the length of the
queue as the orchestrators' own metrics say it. Run as a program."""

import contextlib
import datetime
import http.server
import json
import re
import socket
import ssl
import urllib.parse
import urllib.request

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

ORCHESTRATOR = "orchestrator.byokeep-orchestrator.svc.cluster.local"
API = "/apis/external.metrics.k8s.io/v1beta1"


def read(metric: str, reasons: set[str]) -> float:
    """Return what waits for one of the reasons: of each the greatest that a pod tells, summed."""
    found = dict[str, float]()
    for *_, (address, port) in socket.getaddrinfo(
        ORCHESTRATOR, 9464, socket.AF_INET, socket.SOCK_STREAM
    ):
        with contextlib.suppress(OSError):  # on its way out
            answer = urllib.request.urlopen(f"http://{address}:{port}/metrics", timeout=5)
            pattern = rf'^{metric}\{{reason="(\w+)"\}} (\S+)$'
            for reason, value in re.findall(pattern, answer.read().decode(), re.M):
                found[reason] = max(float(value), found.get(reason, 0))
    return sum(value for reason, value in found.items() if reason in reasons)


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers discovery, and one list of values."""

    def do_GET(self) -> None:
        url = urllib.parse.urlsplit(self.path)
        selector = urllib.parse.parse_qs(url.query).get("labelSelector", [""])[0]
        if url.path == API:
            resource = {"name": "byokeep_queue_depth", "singularName": "", "namespaced": True}
            resource |= {"kind": "ExternalMetricValueList", "verbs": ["get"]}
            self._answer("v1", "APIResourceList", groupVersion=API[6:], resources=[resource])
            return
        metric = url.path.rpartition("/")[2]
        value = {
            "metricName": metric,
            "metricLabels": {},
            "timestamp": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "value": str(int(read(metric, set(re.findall(r"[A-Z_]+", selector))))),
        }
        self._answer(API[6:], "ExternalMetricValueList", metadata={}, items=[value])

    def _answer(self, version: str, kind: str, **fields: object) -> None:
        body = json.dumps({"apiVersion": version, "kind": kind, **fields}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def certificate(path: str) -> None:
    """Write a certificate that nobody checks (insecureSkipTLSVerify), and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "external-metrics")])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now)
        .not_valid_after(now + datetime.timedelta(days=1))
        .sign(key, hashes.SHA256())
    )
    with open(path, "wb") as file:
        file.write(made.public_bytes(serialization.Encoding.PEM))
        file.write(
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
        )


if __name__ == "__main__":
    certificate("/tmp/tls.pem")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain("/tmp/tls.pem")
    server = http.server.ThreadingHTTPServer(("", 8443), Handler)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    server.serve_forever()
