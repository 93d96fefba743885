"""Who this client is, read from its own certificate."""

from __future__ import annotations

import datetime
from dataclasses import dataclass

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization

from byokeep.profile import Profile, ProfileError


@dataclass(frozen=True, slots=True)
class Identity:
    """The first certificate of the client's chain, and what is to be said of it."""

    spiffe_id: str
    not_before: datetime.datetime
    not_after: datetime.datetime
    key_fits: bool
    issued_by_trusted_ca: bool


def read_identity(profile: Profile) -> Identity:
    """Return the profile's identity.

    Raises:
        ProfileError: certificate or key can't be read, or is not PEM.
    """
    certificate, key = profile.read_identity()
    what = profile.certificate
    try:
        chain = x509.load_pem_x509_certificates(certificate)
        what = profile.key
        private = serialization.load_pem_private_key(key, None)
    except (ValueError, TypeError):
        private = None  # its frames hold the key
    if private is None:
        raise ProfileError(f"{what} is not PEM of the expected kind", "issue both again")
    leaf = chain[0]
    return Identity(
        spiffe_id=_spiffe_id(leaf),
        not_before=leaf.not_valid_before_utc,
        not_after=leaf.not_valid_after_utc,
        key_fits=private.public_key() == leaf.public_key(),
        issued_by_trusted_ca=any(
            _issued(chain[-1], ca) for ca in x509.load_pem_x509_certificates(profile.trust.ca)
        ),
    )


def _spiffe_id(leaf: x509.Certificate) -> str:
    try:
        names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return ""
    uris = names.get_values_for_type(x509.UniformResourceIdentifier)
    return uris[0] if len(uris) == 1 and uris[0].startswith("spiffe://") else ""


def _issued(certificate: x509.Certificate, ca: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(ca)
    except (ValueError, TypeError, InvalidSignature):
        return certificate == ca
    return True
