"""Certificates for tests: an authority of the test's own, and what it signs, as PEM files."""

from __future__ import annotations

import datetime
import ipaddress
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from control_plane.config import TlsPaths


class Authority:
    """A CA, and certificates in files. (trustme makes no URI names, so the library under it is asked.)"""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"test authority {directory.name}")])
        basics = x509.BasicConstraints(ca=True, path_length=0)
        self._cert = self._build(name, name, self._key.public_key()).add_extension(basics, critical=True)
        self._signed = self._cert.sign(self._key, hashes.SHA256())

    def issue(self, name: str, *identities: str) -> TlsPaths:
        """Files of a certificate for hosts, addresses and URIs."""
        paths = TlsPaths(*(self._directory / f"{name}.{end}" for end in ("cert", "key", "ca")))
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        names = x509.SubjectAlternativeName([_general(identity) for identity in identities])
        cert = self._build(subject, self._signed.subject, key.public_key()).add_extension(names, critical=False)
        pem = serialization.Encoding.PEM
        plain = serialization.NoEncryption()
        paths.key.write_bytes(key.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain))
        paths.cert.write_bytes(cert.sign(self._key, hashes.SHA256()).public_bytes(pem))
        paths.ca.write_bytes(self._signed.public_bytes(pem))
        return paths

    @staticmethod
    def _build(subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey) -> x509.CertificateBuilder:
        now = datetime.datetime.now(datetime.UTC)
        return x509.CertificateBuilder(
            issuer_name=issuer,
            subject_name=subject,
            public_key=key,
            serial_number=x509.random_serial_number(),
            not_valid_before=now - datetime.timedelta(hours=1),
            not_valid_after=now + datetime.timedelta(hours=1),
        )


def _general(identity: str) -> x509.GeneralName:
    if "://" in identity:
        return x509.UniformResourceIdentifier(identity)
    if identity.replace(".", "").isdigit():
        return x509.IPAddress(ipaddress.ip_address(identity))
    return x509.DNSName(identity)
