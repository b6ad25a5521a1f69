#!/usr/bin/env python3
"""Make the fixtures anew: certificates with their keys, a revocation list, and morercpthosts.cdb.

    tests/conformance/make_fixtures.py

All are valid from 2020 to 2056 but client-expired.pem; no key is a secret, as all are here to be
read.  It needs cryptography, which pyOpenSSL brings along.

    server-rsa, server-ecdsa   servercert.pem as it should be, with its key before it
    server-nokey               without a key
    server-wrongkey            with the key of another certificate
    client-ca                  clientca.pem, the authority that signed the clients' certificates
    client-alice, -carol       for the addresses alice@ and carol@clients.example
    client-noemail             with no address but in the common name
    client-revoked             in client-crl, which is clientcrl.pem
    client-expired             since 2020
    client-stranger            for alice's address, by an authority that nobody knows
"""

from __future__ import annotations

import datetime

from cases import FIXTURES
from cdb_writer import make_cdb
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import NameOID

BEGIN = datetime.datetime(2020, 1, 1)
END = datetime.datetime(2056, 1, 1)
SOON_AFTER_BEGIN = datetime.datetime(2020, 2, 1)

DOMAINS = [
    *("more.example.net", ".wild.example.net", "mixedcase.example.net", "192.0.2.7", "a"),
    *(f"host{number}.bulk.example" for number in range(200)),
    *(f".zone{number}.bulk.example" for number in range(40)),
]


def new_key() -> rsa.RSAPrivateKey:
    return rsa.generate_private_key(65537, 2048)


def name(common_name: str, address: str | None = None) -> x509.Name:
    attributes = [x509.NameAttribute(NameOID.COMMON_NAME, common_name)]
    if address:
        attributes.append(x509.NameAttribute(NameOID.EMAIL_ADDRESS, address))
    return x509.Name(attributes)


class Authority:
    """A certificate authority, with a certificate that it has signed itself."""

    def __init__(self, common_name: str) -> None:
        self.key = new_key()
        self.name = name(common_name)
        self._serial = 0
        extension = x509.BasicConstraints(ca=True, path_length=None)
        self.certificate = self.sign(self.name, self.key, extension=extension)

    def sign(
        self,
        subject: x509.Name,
        key: rsa.RSAPrivateKey,
        end: datetime.datetime = END,
        extension: x509.ExtensionType | None = None,
    ) -> x509.Certificate:
        self._serial += 1
        builder = _builder(subject, self.name, key, end).serial_number(self._serial)
        if extension:
            builder = builder.add_extension(extension, critical=True)
        return builder.sign(self.key, hashes.SHA256())

    def revoke(self, certificate: x509.Certificate) -> bytes:
        """A revocation list with one certificate in it."""
        builder = x509.CertificateRevocationListBuilder()
        entry = x509.RevokedCertificateBuilder()
        entry = entry.serial_number(certificate.serial_number).revocation_date(BEGIN)
        crl = builder.issuer_name(self.name).last_update(BEGIN).next_update(END)
        crl = crl.add_revoked_certificate(entry.build())
        return crl.sign(self.key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def _builder(
    subject: x509.Name, issuer: x509.Name, key, end: datetime.datetime
) -> x509.CertificateBuilder:
    builder = x509.CertificateBuilder().subject_name(subject).issuer_name(issuer)
    return builder.public_key(key.public_key()).not_valid_before(BEGIN).not_valid_after(end)


def self_signed(key) -> x509.Certificate:
    """The certificate of a mail host."""
    host = "mx.example.org"
    builder = _builder(name(host), name(host), key, END).serial_number(1)
    names = x509.SubjectAlternativeName([x509.DNSName(host)])
    return builder.add_extension(names, critical=False).sign(key, hashes.SHA256())


def pem(*parts) -> bytes:
    """Keys and certificates, as they stand in a file."""
    return b"".join(_pem(part) for part in parts)


def _pem(part) -> bytes:
    if isinstance(part, x509.Certificate):
        return part.public_bytes(serialization.Encoding.PEM)
    return part.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


def servers() -> dict[str, bytes]:
    rsa_key, ecdsa_key = new_key(), ec.generate_private_key(ec.SECP256R1())
    certificate = self_signed(rsa_key)
    return {
        "server-rsa.pem": pem(rsa_key, certificate),
        "server-ecdsa.pem": pem(ecdsa_key, self_signed(ecdsa_key)),
        "server-nokey.pem": pem(certificate),
        "server-wrongkey.pem": pem(new_key(), certificate),
    }


def clients() -> dict[str, bytes]:
    known, unknown = Authority("known client authority"), Authority("unknown client authority")
    revoked_key = new_key()
    revoked = known.sign(name("dave", "dave@clients.example"), revoked_key)

    def client(authority: Authority, subject: x509.Name, end: datetime.datetime = END) -> bytes:
        key = new_key()
        return pem(key, authority.sign(subject, key, end))

    alice = name("alice", "alice@clients.example")
    return {
        "client-ca.pem": pem(known.certificate),
        "client-alice.pem": client(known, alice),
        "client-carol.pem": client(known, name("carol", "carol@clients.example")),
        "client-noemail.pem": client(known, name("alice@clients.example")),
        "client-expired.pem": client(known, alice, end=SOON_AFTER_BEGIN),
        "client-stranger.pem": client(unknown, alice),
        "client-revoked.pem": pem(revoked_key, revoked),
        "client-crl.pem": known.revoke(revoked),
    }


def main() -> None:
    files = {**servers(), **clients()}
    files["morercpthosts.cdb"] = make_cdb({domain.encode(): b"" for domain in DOMAINS})
    for file, content in files.items():
        (FIXTURES / file).write_bytes(content)


if __name__ == "__main__":
    main()
