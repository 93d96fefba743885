"""Development PKI: a CA per stack, leaf certificates that live for a day.

SPIFFE X.509-SVIDs (spiffe.io, X509-SVID): exactly one URI SAN, the identity. gRPC
in Python checks a server's DNS name only, so servers carry a DNS SAN as well.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Self

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

LEAF_LIFE = timedelta(hours=24)
CA_LIFE = timedelta(days=30)
_SKEW = timedelta(minutes=5)  # a clock that is behind ours still accepts what is new


@dataclass(frozen=True, slots=True)
class Identity:
    """PEM files of one identity; the key's has mode 0600."""

    certificate: Path
    key: Path

    @classmethod
    def at(cls, path_prefix: Path) -> Self:
        """The files `PREFIX.pem` and `PREFIX.key`."""
        return cls(Path(f"{path_prefix}.pem"), Path(f"{path_prefix}.key"))


class CertificateAuthority:
    """An ECDSA P-256 CA that issues for one trust domain; flexible enough for bad leaves."""

    def __init__(
        self, trust_domain: str, certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey
    ) -> None:
        """Use `new` or `ensure`."""
        self.trust_domain = trust_domain
        self.certificate = certificate
        self._key = key

    @classmethod
    def new(
        cls, trust_domain: str, *, name: str = "byokeep development CA", life: timedelta = CA_LIFE
    ) -> Self:
        """Make a CA with a fresh key, in memory."""
        key = ec.generate_private_key(ec.SECP256R1())
        now = datetime.now(UTC)
        subject = x509.Name(
            [
                x509.NameAttribute(NameOID.ORGANIZATION_NAME, trust_domain),
                x509.NameAttribute(NameOID.COMMON_NAME, name),
            ]
        )
        identifier = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
        certificate = (
            x509.CertificateBuilder(subject, subject, key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - _SKEW)
            .not_valid_after(now + life)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_key_usage(ca=True), critical=True)
            .add_extension(identifier, critical=False)
            .sign(key, hashes.SHA256())
        )
        return cls(trust_domain, certificate, key)

    @classmethod
    def ensure(
        cls, path_prefix: Path, trust_domain: str, name: str = "byokeep development CA"
    ) -> Self:
        """Load the CA at `PREFIX.pem` and `PREFIX.key`, or make a new one there if it is
        missing, unreadable, for another trust domain, or has less than a leaf's life left."""
        files = Identity.at(path_prefix)
        certificate = _read_certificate(files.certificate)
        if (
            certificate is not None
            and files.key.exists()
            and certificate.not_valid_after_utc > datetime.now(UTC) + 2 * LEAF_LIFE
            and certificate.subject.get_attributes_for_oid(NameOID.ORGANIZATION_NAME)[0].value
            == trust_domain
        ):
            key = serialization.load_pem_private_key(files.key.read_bytes(), None)
            if isinstance(key, ec.EllipticCurvePrivateKey):
                return cls(trust_domain, certificate, key)
        made = cls.new(trust_domain, name=name)
        made.write(path_prefix)
        return made

    @property
    def pem(self) -> str:
        """The CA certificate, PEM."""
        return self.certificate.public_bytes(serialization.Encoding.PEM).decode()

    def write(self, path_prefix: Path) -> Identity:
        """Write `PREFIX.pem` and `PREFIX.key`."""
        return _write(path_prefix, self.certificate, self._key)

    def issue(
        self,
        path_prefix: Path,
        *,
        spiffe_id: str | None = None,
        dns: Sequence[str] = (),
        uris: Sequence[str] | None = None,
        not_before: datetime | None = None,
        not_after: datetime | None = None,
    ) -> Identity:
        """Issue a leaf with a fresh key to `PREFIX.pem` and `PREFIX.key`.

        ``spiffe_id`` is a full ID, or a path that this CA's trust domain is put before.
        ``uris`` replaces the URI SANs: none, two, or another trust domain's, as a test
        needs. Life: now to 24 h from now, unless said otherwise.
        """
        key = ec.generate_private_key(ec.SECP256R1())
        now = datetime.now(UTC)
        certificate = (
            x509.CertificateBuilder(
                self.certificate.subject,
                x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, path_prefix.name[:64])]),
                key.public_key(),
            )
            .serial_number(x509.random_serial_number())
            .not_valid_before(not_before or min(now - _SKEW, (not_after or now) - _SKEW))
            .not_valid_after(not_after or now + LEAF_LIFE)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_key_usage(ca=False), critical=True)
            .add_extension(
                x509.ExtendedKeyUsage(
                    [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
                ),
                critical=False,
            )
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), False)
            .add_extension(self._authority_identifier(), False)
        )
        names = self._names(spiffe_id, dns, uris)
        if names:
            certificate = certificate.add_extension(x509.SubjectAlternativeName(names), False)
        return _write(path_prefix, certificate.sign(self._key, hashes.SHA256()), key)

    def ensure_leaf(
        self, path_prefix: Path, *, spiffe_id: str | None = None, dns: Sequence[str] = ()
    ) -> Identity:
        """Return the leaf at the prefix, made anew if it is missing, past half its life,
        not of this CA, or for other names."""
        files = Identity.at(path_prefix)
        leaf = _read_certificate(files.certificate)
        if leaf is not None and files.key.exists() and self._fresh(leaf, spiffe_id, dns):
            return files
        return self.issue(path_prefix, spiffe_id=spiffe_id, dns=dns)

    def _fresh(self, leaf: x509.Certificate, spiffe_id: str | None, dns: Sequence[str]) -> bool:
        names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        try:
            leaf.verify_directly_issued_by(self.certificate)
        except Exception:  # any reason means: not ours
            return False
        left = leaf.not_valid_after_utc - datetime.now(UTC)
        return left > LEAF_LIFE / 2 and list(names) == self._names(spiffe_id, dns, None)

    def _names(
        self, spiffe_id: str | None, dns: Sequence[str], uris: Sequence[str] | None
    ) -> list[x509.GeneralName]:
        if uris is None:
            uris = [] if spiffe_id is None else [self._full(spiffe_id)]
        return [
            *(x509.UniformResourceIdentifier(uri) for uri in uris),
            *(x509.DNSName(name) for name in dns),
        ]

    def _full(self, spiffe_id: str) -> str:
        if spiffe_id.startswith("spiffe://"):
            return spiffe_id
        return f"spiffe://{self.trust_domain}/{spiffe_id}"

    def _authority_identifier(self) -> x509.AuthorityKeyIdentifier:
        own = self.certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier)
        return x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(own.value)


def _key_usage(*, ca: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not ca,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=ca,
        crl_sign=ca,
        encipher_only=False,
        decipher_only=False,
    )


def _read_certificate(path: Path) -> x509.Certificate | None:
    try:
        return x509.load_pem_x509_certificate(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return None


def _write(
    path_prefix: Path, certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey
) -> Identity:
    files = Identity.at(path_prefix)
    path_prefix.parent.mkdir(parents=True, exist_ok=True)
    private = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    write_file(files.key, private, mode=0o600)
    write_file(files.certificate, certificate.public_bytes(serialization.Encoding.PEM), mode=0o644)
    return files


def write_file(path: Path, content: bytes, *, mode: int) -> None:
    """Replace a file whole, with this mode from its first byte on."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}.new")
    scratch.unlink(missing_ok=True)
    descriptor = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    with os.fdopen(descriptor, "wb") as output:
        os.fchmod(output.fileno(), mode)  # whatever the umask is
        output.write(content)
    scratch.replace(path)
