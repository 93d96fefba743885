"""The development PKI: shapes of certificates, modes of files, and when they are re-made."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509 import verification

from deploy.local import pki
from deploy.local.pki import CertificateAuthority

DOMAIN = "byokeep.local"


def _leaf(path: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate(path.read_bytes())


def _sans(path: Path, kind: type[x509.GeneralName]) -> list[str]:
    try:
        extension = _leaf(path).extensions.get_extension_for_class(x509.SubjectAlternativeName)
    except x509.ExtensionNotFound:
        return []
    return [name.value for name in extension.value if isinstance(name, kind)]


@pytest.fixture
def ca() -> CertificateAuthority:
    return CertificateAuthority.new(DOMAIN)


def test_leaf_has_one_uri_and_its_dns_names(ca, tmp_path) -> None:
    files = ca.issue(tmp_path / "kv", spiffe_id="keyvault", dns=["keyvault.byokeep.internal"])
    assert _sans(files.certificate, x509.UniformResourceIdentifier) == [
        "spiffe://byokeep.local/keyvault"
    ]
    assert _sans(files.certificate, x509.DNSName) == ["keyvault.byokeep.internal"]


def test_leaf_verifies_for_its_name_and_no_other(ca, tmp_path) -> None:
    files = ca.issue(tmp_path / "kv", spiffe_id="keyvault", dns=["keyvault.byokeep.internal"])
    store = verification.Store([ca.certificate])
    builder = verification.PolicyBuilder().store(store)
    leaf = _leaf(files.certificate)
    builder.build_server_verifier(x509.DNSName("keyvault.byokeep.internal")).verify(leaf, [])
    with pytest.raises(verification.VerificationError):
        builder.build_server_verifier(x509.DNSName("runner.byokeep.internal")).verify(leaf, [])


def test_key_is_private_and_fits_the_certificate(ca, tmp_path) -> None:
    files = ca.issue(tmp_path / "kv", spiffe_id="keyvault")
    key = serialization.load_pem_private_key(files.key.read_bytes(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    assert isinstance(key.curve, ec.SECP256R1)
    assert files.key.stat().st_mode & 0o777 == 0o600
    assert key.public_key() == _leaf(files.certificate).public_key()


def test_leaf_lives_for_a_day(ca, tmp_path) -> None:
    leaf = _leaf(ca.issue(tmp_path / "x", spiffe_id="x").certificate)
    left = leaf.not_valid_after_utc - datetime.now(UTC)
    assert timedelta(hours=23, minutes=59) < left <= timedelta(hours=24)


@pytest.mark.parametrize(
    "uris",
    [[], ["spiffe://byokeep.local/a", "spiffe://byokeep.local/b"], ["spiffe://elsewhere/a"]],
)
def test_bad_shapes_can_be_issued_for_tests(ca, tmp_path, uris) -> None:
    files = ca.issue(tmp_path / "bad", uris=uris, dns=["x.internal"])
    assert _sans(files.certificate, x509.UniformResourceIdentifier) == uris


def test_no_name_at_all_can_be_issued(ca, tmp_path) -> None:
    assert _sans(ca.issue(tmp_path / "bare").certificate, x509.DNSName) == []


def test_expired_leaf_can_be_issued(ca, tmp_path) -> None:
    past = datetime.now(UTC) - timedelta(hours=1)
    leaf = _leaf(ca.issue(tmp_path / "old", spiffe_id="x", not_after=past).certificate)
    assert leaf.not_valid_before_utc < leaf.not_valid_after_utc < datetime.now(UTC)


def test_fresh_leaf_is_kept(ca, tmp_path) -> None:
    first = ca.ensure_leaf(tmp_path / "a", spiffe_id="a").certificate.read_bytes()
    assert ca.ensure_leaf(tmp_path / "a", spiffe_id="a").certificate.read_bytes() == first


@pytest.mark.parametrize("stale", ["soon", "expired", "other ca", "other id", "no key", "broken"])
def test_stale_leaf_is_made_again(ca, tmp_path, stale) -> None:
    prefix = tmp_path / "a"
    now = datetime.now(UTC)
    issuer = CertificateAuthority.new(DOMAIN) if stale == "other ca" else ca
    ends = {"soon": now + pki.LEAF_LIFE / 3, "expired": now - timedelta(hours=1)}.get(stale)
    name = "b" if stale == "other id" else "a"
    files = issuer.issue(prefix, spiffe_id=name, not_after=ends)
    if stale == "no key":
        files.key.unlink()
    if stale == "broken":
        files.certificate.write_text("not a certificate")
    before = files.certificate.read_bytes()
    assert ca.ensure_leaf(prefix, spiffe_id="a").certificate.read_bytes() != before
    _leaf(files.certificate).verify_directly_issued_by(ca.certificate)


def test_ca_is_kept_then_made_again_when_it_nears_its_end(tmp_path) -> None:
    first = CertificateAuthority.ensure(tmp_path / "ca", DOMAIN)
    assert CertificateAuthority.ensure(tmp_path / "ca", DOMAIN).pem == first.pem
    CertificateAuthority.new(DOMAIN, life=timedelta(hours=30)).write(tmp_path / "ca")
    assert CertificateAuthority.ensure(tmp_path / "ca", DOMAIN).pem != first.pem
    assert (tmp_path / "ca.key").stat().st_mode & 0o777 == 0o600


def test_ca_of_another_trust_domain_is_not_reused(tmp_path) -> None:
    other = CertificateAuthority.ensure(tmp_path / "ca", "other.example")
    assert CertificateAuthority.ensure(tmp_path / "ca", DOMAIN).pem != other.pem
