"""The Received field that is put in front of each message (RFC 5321 section 4.4).

What a client says (its HELO name, its ident answer) and what DNS says of it passes through `safe`:
no octet of it can end the line, open a comment or forge a field.
"""

from __future__ import annotations

import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .connection import Connection

_SAFE = b".@%+/=:-abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
_UNSAFE = bytes(range(256)).translate(None, _SAFE)
_TO_SAFE = bytes.maketrans(_UNSAFE, b"?" * len(_UNSAFE))
_MONTHS = b"Jan Feb Mar Apr May Jun Jul Aug Sep Oct Nov Dec".split()


def safe(text: bytes) -> bytes:
    """The text with every octet that could mean something in a header field made a question mark.

    The octets that stay are those of netqmail's received.c.
    """
    return text.translate(_TO_SAFE)


def date(now: int) -> bytes:
    """A time, in seconds since 1970, as RFC 5322 section 3.3 has it, in UTC as qmail has it."""
    at = time.gmtime(now)
    month = _MONTHS[at.tm_mon - 1]
    clock = b"%02d:%02d:%02d" % (at.tm_hour, at.tm_min, at.tm_sec)
    return b"%d %s %d %s -0000" % (at.tm_mday, month, at.tm_year, clock)


def received(
    connection: Connection,
    remote_info: bytes | None,
    helo: bytes | None,
    protocol: bytes,
    date_time: bytes,
) -> bytes:
    """The Received field of a message, its line ends bare line feeds as qmail-queue wants them.

    `helo` is None where the client gave no name, or that of its host; `protocol` and `date_time`
    are put in as they are.
    """
    host = safe(connection.remote_host)
    said = b"" if helo is None else b" (HELO %s)" % safe(helo)
    ident = b"" if remote_info is None else safe(remote_info) + b"@"
    return b"Received: from %s%s (%s%s)\n  by %s with %s; %s\n" % (
        host,
        said,
        ident,
        safe(connection.remote_ip),
        safe(connection.local),
        protocol,
        date_time,
    )


def protocol(cipher: bytes | None, authenticated: bool, certificate: bytes | None) -> bytes:
    """The protocol in the Received field (RFC 3848): the cipher and the address vouched for too.

    qmail: without TLS and AUTH it is SMTP, after EHLO as well.
    """
    if cipher is None:
        return b"ESMTPA" if authenticated else b"SMTP"
    name, suffix = (b"ESMTPSA", b", authenticated") if authenticated else (b"ESMTPS", b"")
    text = b"%s (%s encrypted%s)" % (name, safe_cipher(cipher), suffix)
    if certificate is not None:
        text += b"\n  (cert %s)" % safe(certificate)
    return text


def safe_cipher(cipher: bytes) -> bytes:
    """A cipher's name; they have underscores, which `safe` would not leave."""
    return b"_".join(safe(part) for part in cipher.split(b"_"))
