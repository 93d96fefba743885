"""Server credentials that follow their files.

Certificates are short-lived and replaced on disk; every handshake takes the
newest that loads. A broken file is an alarm in the log, and the last good
certificate stays: gRPC by itself would keep it in silence.
"""

from __future__ import annotations

import logging
import threading

import grpc
from byokeep.transport import TlsFiles
from cryptography import x509
from cryptography.hazmat.primitives import serialization

from services.common import logs
from services.common.config import ConfigError

log = logging.getLogger(__name__)
_Stamp = tuple[tuple[int, int], ...]


class ServerIdentity:
    """The certificate that a server presents, and the CA that its callers need."""

    def __init__(self, files: TlsFiles) -> None:
        """Load the files once. Raises ConfigError where they don't fit together."""
        self._files = files
        self._lock = threading.Lock()  # gRPC fetches on threads of its own
        self._seen = self._stamp()
        self._load()

    def credentials(self) -> grpc.ServerCredentials:
        """Return credentials that require and verify a client's certificate."""
        return grpc.dynamic_ssl_server_credentials(
            self._load(),
            self._changed,  # type: ignore[arg-type] # None is "no change": gRPC's documentation
            require_client_authentication=True,
        )

    def _changed(self) -> grpc.ServerCertificateConfiguration | None:
        # None means "no change", and matters: gRPC core rebuilds its handshaker for every
        # configuration that it is given, without a lock against handshakes that run
        # (grpc/grpc#36693); a flood of connections could otherwise crash the process.
        with self._lock:
            failed: Exception | None = None
            try:
                stamp = self._stamp()
                if stamp == self._seen:
                    return None
                configuration = self._load()
                self._seen = stamp
                logs.event(log, "certificate_reloaded")
                return configuration
            except (OSError, ConfigError) as error:
                failed = error
            logs.failure(log, "certificate_reload_failed", failed)
            return None

    def _stamp(self) -> _Stamp:
        try:
            files = (self._files.certificate, self._files.key, self._files.ca)
            return tuple((path.stat().st_mtime_ns, path.stat().st_size) for path in files)
        except OSError as error:
            raise ConfigError(f"{error.filename}: {error.strerror}") from None

    def _load(self) -> grpc.ServerCertificateConfiguration:
        certificate, key, ca = self._files.read()
        try:
            leaf = x509.load_pem_x509_certificates(certificate)[0]
            private = serialization.load_pem_private_key(key, None)
            x509.load_pem_x509_certificates(ca)
        except ValueError:
            raise ConfigError("a TLS file is not PEM of the expected kind") from None
        if leaf.public_key() != private.public_key():
            raise ConfigError("BYOKEEP_TLS_KEY does not belong to BYOKEEP_TLS_CERT")
        return grpc.ssl_server_certificate_configuration([(key, certificate)], ca)
