"""The server's certificates: in which files they are, and whether a file can be used.

    control/servercert.pem                     what every client gets
    control/servercerts/NAME/servercert.pem    what those get who ask for NAME (RFC 6066 section 3)
    control/servercerts/*.PARENT/...           the same for every name one label below PARENT

Each has a private key, its certificate, and behind that the certificates of its issuers.  Beside
each there may be a second file, servercert-ecdsa.pem, with a key of another type: each client gets
the one that it can use.

Only the bindings that pyOpenSSL is made of are imported here, and they late.
"""

from __future__ import annotations

import errno
import os
import stat

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from cryptography import x509

SERVER_CERTIFICATE = "control/servercert.pem"
BY_NAME = "control/servercerts"

_LONGEST_NAME, _LONGEST_LABEL = 253, 63  # octets (RFC 1035 section 2.3.4, without the root's)
_IN_NAMES = frozenset(b"abcdefghijklmnopqrstuvwxyz0123456789-.")

_ROOM_FOR_NAMES = 64000  # octets; 65535 with all that stands beside them
_BEFORE_NAME = 2  # octets

_NO_CERTIFICATE = b"missing certificate"
_NO_KEY = b"no valid private key"
_SYSTEM_ERROR = 1 << 31  # what else an error of OpenSSL's has is errno then


class TlsError(Exception):
    """TLS can not be had; the text says why, in words for an administrator."""


class Unavailable(TlsError):
    """A certificate can not be used.

    `what` is netqmail's word for it and `reason` a short one: these a client may know.
    """

    def __init__(self, path: str, what: bytes, reason: str, remedy: str = "") -> None:
        super().__init__(f"{path}: {reason}{remedy}")
        self.what = what
        self.reason = reason


def second(path: str) -> str:
    """The file beside that of a certificate that may have one with a key of another type."""
    return path[: -len(".pem")] + "-ecdsa.pem"


def named(name: bytes) -> Iterator[str]:
    """The files that may have the certificate for a name that a client asks for, the best first.

    A name that is no host name has none: no octet of it that could lead elsewhere gets into a path.
    """
    name = name.lower()
    labels = name.split(b".")
    if len(name) > _LONGEST_NAME or not _IN_NAMES.issuperset(name):
        return
    if not all(0 < len(label) <= _LONGEST_LABEL for label in labels):
        return
    yield f"{BY_NAME}/{name.decode()}/servercert.pem"
    if len(labels) > 1:
        yield f"{BY_NAME}/*.{b'.'.join(labels[1:]).decode()}/servercert.pem"


def check(path: str = SERVER_CERTIFICATE) -> None:
    """See that a file has a certificate and its key; raises Unavailable."""
    text = read(path)
    if b"-----BEGIN CERTIFICATE-----" not in text:
        raise Unavailable(path, _NO_CERTIFICATE, "no certificate in it")
    _check_pair(path, text)


def read(path: str) -> bytes:
    """The octets of a file in PEM; raises Unavailable, with a reason where OpenSSL has none."""
    try:
        return contents(path)
    except OSError as error:
        who = f" (uid {os.geteuid()})"
        raise Unavailable(path, _NO_CERTIFICATE, str(error.strerror), who) from None


def contents(path: str) -> bytes:
    """The octets of a file; raises OSError, for what is there and no file too."""
    with open(path, "rb", opener=_open_at_once) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(errno.EINVAL, "not a file")
        return file.read()


def _open_at_once(path: str, flags: int) -> int:
    """Open a file, and a named pipe without waiting for its writer."""
    return os.open(path, flags | os.O_NONBLOCK)


def _check_pair(path: str, text: bytes) -> None:
    """Let OpenSSL load certificate and key, by the bindings that pyOpenSSL itself uses."""
    from cryptography.hazmat.bindings.openssl.binding import Binding

    lib, ffi = Binding.lib, Binding.ffi
    context = ffi.gc(lib.SSL_CTX_new(lib.TLS_method()), lib.SSL_CTX_free)

    def why() -> str:
        code = lib.ERR_get_error()
        lib.ERR_clear_error()
        if code & _SYSTEM_ERROR:
            return os.strerror(code & ~_SYSTEM_ERROR)
        words = lib.ERR_reason_error_string(code)
        return ffi.string(words).decode() if words else "unknown error"

    if not lib.SSL_CTX_use_certificate_chain_file(context, path.encode()):
        raise Unavailable(path, _NO_CERTIFICATE, why())
    _check_key(path, text)
    if not lib.SSL_CTX_use_PrivateKey_file(context, path.encode(), lib.SSL_FILETYPE_PEM):
        raise Unavailable(path, _NO_KEY, why(), _why_no_pair(text))
    # A key of another type than the certificate's has a place of its own, and is no error so far.
    if not lib.SSL_CTX_check_private_key(context):
        lib.ERR_clear_error()
        raise Unavailable(path, _NO_KEY, "key type mismatch", _why_no_pair(text))


def _check_key(path: str, text: bytes) -> None:
    """See that there is a key that can be read without anybody; raises Unavailable."""
    if b"PRIVATE KEY-----" not in text:
        remedy = "; append the key to the certificate"
        raise Unavailable(path, _NO_KEY, "no private key in it", remedy)
    if b"-----BEGIN ENCRYPTED" in text or b"Proc-Type: 4,ENCRYPTED" in text:
        raise Unavailable(path, _NO_KEY, "the private key has a passphrase", "; take it off")


def _why_no_pair(text: bytes) -> str:
    """What to do about a key that is not that of the first certificate."""
    from cryptography import x509
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        with Parsing():
            key = load_pem_private_key(_private_key(text), None).public_key()
            for place, certificate in enumerate(x509.load_pem_x509_certificates(text), 1):
                if certificate.public_key() == key:
                    its = f"certificate {place} in it, which has to be the first"
                    return f"; the key is that of {its}"
    except ValueError:
        return "; a certificate or the key is damaged"
    return "; the key is that of no certificate in it"


def _private_key(text: bytes) -> bytes:
    """The private key in a file (RFC 7468), of which there is one."""
    before, label, behind = text.partition(b"PRIVATE KEY-----")
    begin = before[before.rindex(b"-----BEGIN ") :]
    return begin + label + behind.partition(label)[0] + label


def revocation_lists(text: bytes) -> list[x509.CertificateRevocationList]:
    """The certificate revocation lists in a PEM file's text; raises ValueError where one is
    malformed.
    """
    from cryptography import x509

    end = b"-----END X509 CRL-----"
    with Parsing():
        return [x509.load_pem_x509_crl(one + end) for one in text.split(end)[:-1]]


def can_be_named(text: bytes) -> bool:
    """Whether the names of all authorities in a PEM file's text have room where a client is asked
    for a certificate (RFC 5246 section 7.4.4, RFC 8446 section 4.2.4): with more than that every
    handshake would fail.
    """
    if len(text) < _ROOM_FOR_NAMES:
        return True
    from cryptography import x509

    try:
        with Parsing():
            subjects = [found.subject for found in x509.load_pem_x509_certificates(text)]
            names = {subject.public_bytes() for subject in subjects}
    except ValueError:
        return True  # OpenSSL reads more than that; how much it is that nobody can tell here
    return sum(len(name) + _BEFORE_NAME for name in names) < _ROOM_FOR_NAMES


def same_type(path: str, other: str) -> bool:
    """Whether two files that OpenSSL can use have keys of one type, of which it keeps one; raises
    TlsError.
    """
    return _type_of_certificate(path) is _type_of_certificate(other)


def _type_of_certificate(path: str) -> type:
    from cryptography import x509

    try:
        with Parsing():
            return type(x509.load_pem_x509_certificate(read(path)).public_key())
    except ValueError as error:
        raise TlsError(f"{path}: {error}") from None


class Parsing:
    """Makes a ValueError of every exception that cryptography raises for what is in a certificate;
    by itself it raises others, too.  What it warns of is ignored: the interpreter would write it
    into the log.
    """

    def __enter__(self) -> None:
        import warnings

        self._warnings = warnings.catch_warnings()
        self._warnings.__enter__()
        warnings.simplefilter("ignore")

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._warnings.__exit__(None, None, None)
        if isinstance(error, Exception) and not isinstance(error, (MemoryError, TlsError)):
            raise ValueError(str(error)) from None
