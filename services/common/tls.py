"""Server credentials that follow their files: every handshake takes the newest that load."""

from __future__ import annotations

import grpc
from byokeep.identity import Followed, IdentityError, Pem, TlsFiles
from cryptography import x509

from services.common.config import ConfigError


class ServerIdentity:
    """The certificate that a server presents, and the CA that its callers need."""

    def __init__(self, files: TlsFiles) -> None:
        """Load the files once. Raises ConfigError where they don't fit together."""
        try:
            self._identity = Followed(files.paths, files.load)
        except IdentityError as error:
            raise ConfigError(
                f"BYOKEEP_TLS_CERT, BYOKEEP_TLS_KEY, BYOKEEP_TLS_CA: {error}"
            ) from None

    def expiry(self) -> float:
        """Return the Unix time at which the certificate that is presented ends."""
        certificate = x509.load_pem_x509_certificate(self._identity.value.certificate)
        return certificate.not_valid_after_utc.timestamp()

    def credentials(self) -> grpc.ServerCredentials:
        """Return credentials that require and verify a client's certificate."""
        return grpc.dynamic_ssl_server_credentials(
            _configuration(self._identity.value),
            self._changed,  # type: ignore[arg-type] # None is "no change": gRPC's documentation
            require_client_authentication=True,
        )

    def _changed(self) -> grpc.ServerCertificateConfiguration | None:
        # None means "no change", and matters: gRPC core rebuilds its handshaker for every
        # configuration that it is given, without a lock against handshakes that run
        # (grpc/grpc#36693); a flood of connections could otherwise crash the process.
        return _configuration(self._identity.value) if self._identity.refresh() else None


def _configuration(pem: Pem) -> grpc.ServerCertificateConfiguration:
    return grpc.ssl_server_certificate_configuration([(pem.key, pem.certificate)], pem.ca)
