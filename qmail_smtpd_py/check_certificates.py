"""What qmail-smtpd-check makes of certificates: names, days, chain, authorities, revocation lists.

Whether a key belongs to its certificate, and whether the files can be loaded, the program itself
says; this looks at what a client then gets.
"""

from __future__ import annotations

from datetime import datetime, timezone

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import (
    AuthorityInformationAccessOID,
    ExtendedKeyUsageOID,
    ExtensionOID,
    NameOID,
)

from .certificates import contents, revocation_lists

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from .findings import Report

SOON = 14
"""Days before its end when a certificate that is not renewed is worth a warning."""

_SMALLEST_RSA = 2048  # bits

RENEW = "renew it (certbot renew, or make cert FORCE=1), and see that the deploy hook ran"
_IN_ORDER = "key, the server's certificate, then each issuer's: cat privkey.pem fullchain.pem"


def name_of(certificate: x509.Certificate) -> str:
    """The common name of the subject, or all of the subject."""
    return _common_name(certificate.subject)


def _common_name(name: x509.Name) -> str:
    for attribute in name.get_attributes_for_oid(NameOID.COMMON_NAME):
        return str(attribute.value)
    return name.rfc4514_string()


def host_names(certificate: x509.Certificate) -> list[str]:
    """The host names that a certificate is for (RFC 6125); without any, its common name."""
    try:
        found = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    except (x509.ExtensionNotFound, ValueError):
        return [name_of(certificate)]
    return found.value.get_values_for_type(x509.DNSName)


def covers(certificate: x509.Certificate, host: str) -> bool:
    """Whether it is for this host; an asterisk stands for one label (RFC 6125 section 6.4.3)."""
    host = host.lower().rstrip(".")
    for name in host_names(certificate):
        name = name.lower()
        if name == host or (name.startswith("*.") and name[1:] == host[host.find(".") :]):
            return True
    return False


def key_type(certificate: x509.Certificate) -> str:
    """The kind of its key, and how long it is."""
    key = certificate.public_key()
    if isinstance(key, rsa.RSAPublicKey):
        return f"RSA {key.key_size}"
    if isinstance(key, ec.EllipticCurvePublicKey):
        return f"ECDSA {key.curve.name}"
    return type(key).__name__.replace("PublicKey", "").strip("_")


def days_left(certificate: x509.Certificate, now: datetime | None = None) -> int:
    """Whole days until it expires, negative if it has."""
    left = certificate.not_valid_after_utc - (now or datetime.now(timezone.utc))
    return left.days


def is_authority(certificate: x509.Certificate) -> bool:
    """Whether it is one that signs others."""
    try:
        constraints = certificate.extensions.get_extension_for_class(x509.BasicConstraints)
    except (x509.ExtensionNotFound, ValueError):
        return False
    return constraints.value.ca


def issued(issuer: x509.Certificate, certificate: x509.Certificate) -> bool:
    """Whether the one signed the other."""
    try:
        certificate.verify_directly_issued_by(issuer)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True


def describe(certificate: x509.Certificate) -> str:
    """A line about a server's certificate."""
    until = certificate.not_valid_after_utc.date()
    names = ", ".join(host_names(certificate)) or "no host name"
    by = "itself" if issued(certificate, certificate) else _common_name(certificate.issuer)
    return (
        f"{names}; {key_type(certificate)}; {days_left(certificate)} days left ({until}); by {by}"
    )


def examine_chain(chain: Sequence[x509.Certificate], where: str, report: Report) -> None:
    """Look at the certificates that a client is sent, in this order."""
    for number, certificate in enumerate(chain):
        whose = (
            where if number == 0 else f"{where}: the issuer's certificate {name_of(certificate)}"
        )
        _examine_dates(certificate, whose, report)
    server = chain[0]
    key = server.public_key()
    if isinstance(key, rsa.RSAPublicKey) and key.key_size < _SMALLEST_RSA:
        what = f"{where}: an RSA key of {key.key_size} bits, which many clients refuse"
        report.warning("certificate-weak", what, "get a certificate with a key of 2048 bits")
    if not _is_for_servers(server):
        what = f"{where}: the certificate is not for servers (extended key usage)"
        report.warning("certificate-purpose", what, "get one for TLS servers")
    _examine_order(chain, where, report)


def _examine_dates(certificate: x509.Certificate, whose: str, report: Report) -> None:
    now = datetime.now(timezone.utc)
    days = days_left(certificate, now)
    until = certificate.not_valid_after_utc.strftime("%Y-%m-%d %H:%M UTC")
    if certificate.not_valid_before_utc > now:
        since = certificate.not_valid_before_utc.strftime("%Y-%m-%d %H:%M UTC")
        report.error(
            "certificate-not-yet-valid", f"{whose} is valid from {since} on", "look at the clock"
        )
    if certificate.not_valid_after_utc < now:
        report.error("certificate-expired", f"{whose} has expired: {until}", RENEW)
    elif days < SOON:
        report.warning("certificate-expires", f"{whose} expires in {days} days: {until}", RENEW)


def _is_for_servers(certificate: x509.Certificate) -> bool:
    try:
        usage = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    except (x509.ExtensionNotFound, ValueError):
        return True
    return ExtendedKeyUsageOID.SERVER_AUTH in usage or any(
        purpose == ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE for purpose in usage
    )


def _examine_order(chain: Sequence[x509.Certificate], where: str, report: Report) -> None:
    """See that each certificate is followed by its issuer's."""
    server = chain[0]
    if is_authority(server) and any(not is_authority(other) for other in chain[1:]):
        what = f"{where}: the first certificate is an authority's, {name_of(server)}"
        report.error("chain-order", what, _IN_ORDER)
        return
    for number in range(1, len(chain)):
        lower, upper = chain[number - 1], chain[number]
        if issued(upper, lower):
            continue
        names = f"{name_of(upper)} did not issue {name_of(lower)}, behind which it stands"
        if any(issued(other, lower) for other in chain if other is not lower):
            report.warning("chain-order", f"{where}: wrong order: {names}", _IN_ORDER)
        else:
            remedy = f"put the certificate of {_common_name(lower.issuer)} there: {_IN_ORDER}"
            report.warning("chain-broken", f"{where}: {names}", remedy)
        return


def is_self_signed(certificate: x509.Certificate) -> bool:
    """Whether nobody but itself vouches for it."""
    return issued(certificate, certificate)


def missing_issuer(chain: Sequence[x509.Certificate]) -> str | None:
    """The name of the authority that clients need and are not sent, where that is a public one: it
    says where its certificate can be had (RFC 5280 section 4.2.2.1).
    """
    last = chain[-1]
    if is_self_signed(last):
        return None
    try:
        found = last.extensions.get_extension_for_oid(ExtensionOID.AUTHORITY_INFORMATION_ACCESS)
    except (x509.ExtensionNotFound, ValueError):
        return None
    assert isinstance(found.value, x509.AuthorityInformationAccess)
    methods = {access.access_method for access in found.value}
    if AuthorityInformationAccessOID.CA_ISSUERS in methods:
        return _common_name(last.issuer)
    return None


def load(path: str) -> list[x509.Certificate]:
    """The certificates in a PEM file; raises OSError, and ValueError where one is malformed."""
    return x509.load_pem_x509_certificates(contents(path))


def examine_authorities(path: str, crl_path: str, report: Report) -> int:
    """Look at clientca.pem, and clientcrl.pem if it is there; how many authorities there are."""
    try:
        authorities = load(path)
    except (OSError, ValueError):
        return 0  # the program has told
    for authority in authorities:
        _examine_dates(authority, f"{path}: {name_of(authority)}", report)
    try:
        lists = revocation_lists(contents(crl_path))
    except (OSError, ValueError):  # there is none, or the program has told
        return len(authorities)
    if lists:
        _examine_lists(lists, authorities, crl_path, report)
    return len(authorities)


def _examine_lists(
    lists: Sequence[x509.CertificateRevocationList],
    authorities: Sequence[x509.Certificate],
    path: str,
    report: Report,
) -> None:
    get_anew = "get the list of the authority anew, before it expires: cron"
    now = datetime.now(timezone.utc)
    for revoked in lists:
        end = revoked.next_update_utc
        if end is not None and end < now:
            what = f"{path}: the list of {_common_name(revoked.issuer)} has expired: {end:%Y-%m-%d}"
            cause = "no certificate of that authority counts any more"
            report.error("crl-expired", what, get_anew, cause)
    listed = {revoked.issuer for revoked in lists}
    for authority in authorities:
        if authority.subject not in listed:
            what = f"{path}: no list of {name_of(authority)}, so none of its certificates counts"
            report.error("crl-missing", what, "append the list of that authority")
