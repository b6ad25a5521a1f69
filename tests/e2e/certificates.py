"""Certificates as an administrator may have them: of any key type, from an authority of any depth.

They are made when a test asks for them and are valid for a day, unless it says otherwise.
"""

from __future__ import annotations

import datetime
import ipaddress

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import AuthorityInformationAccessOID, NameOID

KEYS = {
    "RSA-2048": lambda: rsa.generate_private_key(65537, 2048),
    "ECDSA-P256": lambda: ec.generate_private_key(ec.SECP256R1()),
    "Ed25519": ed25519.Ed25519PrivateKey.generate,
}

_SIGNS = x509.KeyUsage(
    digital_signature=False,
    content_commitment=False,
    key_encipherment=False,
    data_encipherment=False,
    key_agreement=False,
    key_cert_sign=True,
    crl_sign=True,
    encipher_only=False,
    decipher_only=False,
)

_DAY = datetime.timedelta(days=1)


class Certificate:
    """A certificate and its key; `issuer` is the Certificate that signed it, or None for itself.

    `name` is its common name, however long, `hosts` are the names that it is good for.  It ends in
    so many `days`, which may be fewer than 0; with `url` it says where its issuer's certificate can
    be had, as those of public authorities do.
    """

    def __init__(
        self,
        name,
        key_type="ECDSA-P256",
        issuer=None,
        authority=False,
        email=None,
        hosts=("mail.example.org",),
        days=1,
        url=None,
    ):
        self._hosts = hosts
        self.key = KEYS[key_type]()
        self._days = days
        self._url = url
        self.issuer = issuer
        self.name = _name(name, email)
        self.x509 = self._sign(authority)

    @property
    def pem(self):
        """The certificate alone."""
        return self.x509.public_bytes(Encoding.PEM)

    @property
    def chain(self):
        """The certificate, and what stands between it and the root."""
        return self.pem + (self.issuer.chain if self.issuer and self.issuer.issuer else b"")

    @property
    def key_pem(self):
        """The key, without a passphrase."""
        return self.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())

    def _sign(self, authority):
        issuer = self.issuer or self
        now = datetime.datetime.now(datetime.timezone.utc)
        builder = x509.CertificateBuilder(
            issuer.name, self.name, self.key.public_key(), x509.random_serial_number()
        )
        end = now + self._days * _DAY
        builder = builder.not_valid_before(min(now, end) - _DAY).not_valid_after(end)
        constraints = x509.BasicConstraints(ca=authority, path_length=None)
        builder = builder.add_extension(constraints, critical=True)
        for extension in _key_identifiers(self.key, issuer.key):
            builder = builder.add_extension(extension, critical=False)
        if authority:
            builder = builder.add_extension(_SIGNS, critical=True)
        else:
            builder = builder.add_extension(_alternative_names(self._hosts), critical=False)
        if self._url:
            where = x509.UniformResourceIdentifier(self._url)
            method = AuthorityInformationAccessOID.CA_ISSUERS
            access = x509.AuthorityInformationAccess([x509.AccessDescription(method, where)])
            builder = builder.add_extension(access, critical=False)
        return builder.sign(issuer.key, _hash_for(issuer.key))

    def revoke(self, *certificates, days=1):
        """The list of those that this authority takes back, as in clientcrl.pem."""
        now = datetime.datetime.now(datetime.timezone.utc)
        begin, end = now - 9 * _DAY, now + days * _DAY
        builder = x509.CertificateRevocationListBuilder(self.name, begin, end)
        for certificate in certificates:
            revoked = x509.RevokedCertificateBuilder(certificate.x509.serial_number, now - _DAY)
            builder = builder.add_revoked_certificate(revoked.build())
        return builder.sign(self.key, _hash_for(self.key)).public_bytes(Encoding.PEM)


def _name(name, email):
    attributes = [x509.NameAttribute(NameOID.COMMON_NAME, name, _validate=False)]
    if email:
        attributes.append(x509.NameAttribute(NameOID.EMAIL_ADDRESS, email))
    return x509.Name(attributes)


def _key_identifiers(key, issuer_key):
    """What a strict client asks for (RFC 5280 sections 4.2.1.1 and 4.2.1.2)."""
    return (
        x509.SubjectKeyIdentifier.from_public_key(key.public_key()),
        x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()),
    )


def _alternative_names(hosts):
    address = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
    return x509.SubjectAlternativeName([*map(x509.DNSName, hosts), address])


def _hash_for(key):
    return None if isinstance(key, ed25519.Ed25519PrivateKey) else hashes.SHA256()
