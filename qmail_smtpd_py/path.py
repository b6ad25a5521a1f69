"""Arguments of MAIL and RCPT: reverse-path, forward-path and parameters, with qmail's leniency.

What qmail takes is wider than RFC 5321 section 4.1.2, and what it makes of it is an address with
neither quotes nor escapes, as qmail-queue wants it:

    path       what stands between `<` and `>`; without `<`, what follows the first colon and
               blanks, up to a blank
    route      `@a,@b:` at the start is taken off
    quoting    a backslash keeps the next octet; double quotes keep `>` and blanks; both are dropped

An octet below 32, or 127, in an address only serves to deceive what reads it later: refused.
"""

from __future__ import annotations

LIMIT = 899
"""Octets in an address, as in qmail-smtpd."""

# qmail: parameters count only where a `>` stands behind this octet of the argument.
_PARAMETERS_BEHIND = 4

_CONTROLS = bytes([*range(32), 127])
_QUOTE = ord('"')
_ESCAPE = ord("\\")


class PathError(Exception):
    """An argument has no address that could be taken."""


def parse_path(argument: bytes) -> bytes:
    """The address in the argument of MAIL or RCPT; raises PathError."""
    _, bracket, path = argument.partition(b"<")
    if bracket:
        address = _unquote(_without_route(path), b">")
    else:
        path = argument.partition(b":")[2].lstrip(b" ")
        address = _unquote(_without_route(path), b" ")
    if len(address) != len(address.translate(None, _CONTROLS)):
        raise PathError("control octet in an address")
    return address


def check_length(address: bytes) -> bytes:
    """The address itself, if it is no longer than LIMIT; raises PathError."""
    if len(address) > LIMIT:
        raise PathError("address too long")
    return address


def domain_of(address: bytes) -> bytes | None:
    """What follows the last at sign, or None if there is no at sign."""
    _, at, domain = address.rpartition(b"@")
    return domain if at else None


def parameters(argument: bytes) -> list[bytes]:
    """The words of MAIL's argument that may be parameters (RFC 5321 section 4.1.2 Mail-parameters).

    qmail: all words behind the first octet count, those before the path too, as long as a `>`
    stands behind the fifth octet.
    """
    if argument.find(b">") <= _PARAMETERS_BEHIND:
        return []
    return argument[1:].split(b" ")


def number(text: bytes) -> int:
    """The number that the text starts with; 0 if it starts with no digit (qmail's scan_ulong)."""
    digits = text[: len(text) - len(text.lstrip(b"0123456789"))].lstrip(b"0")
    if len(digits) > len("18446744073709551615"):
        return 1 << 64  # larger than any limit, and no matter how much larger
    return int(digits or b"0")


def decode_auth_parameter(text: bytes) -> bytes:
    """The name in MAIL's AUTH= (RFC 4954 section 5), `unknown` for `<>`.

    qmail: of xtext (RFC 3461 section 4) it knows `+3D` and `+2B`; of other codes the plus sign is
    dropped.
    """
    if text.startswith(b"<>"):
        return b"unknown"
    first, *rest = text.split(b"+")
    return first + b"".join(_decode_xtext(part) for part in rest)


def _decode_xtext(text: bytes) -> bytes:
    """What follows a plus sign, with the code at its start decoded if it is one of the two."""
    character = {b"3D": b"=", b"2B": b"+"}.get(text[:2].upper())
    return text if character is None else character + text[2:]


def _without_route(path: bytes) -> bytes:
    """The path without its source route (RFC 5321 appendix C)."""
    return path.partition(b":")[2] if path.startswith(b"@") else path


def _unquote(path: bytes, end: bytes) -> bytes:
    """The path up to `end`, without quotes and escapes; a missing end is overlooked."""
    plain = path.partition(end)[0]
    if _QUOTE not in plain and _ESCAPE not in plain:
        return plain
    address = bytearray()
    quoted = escaped = False
    for octet in path:
        if escaped:
            address.append(octet)
            escaped = False
        elif octet == end[0] and not quoted:
            break
        elif octet == _ESCAPE:
            escaped = True
        elif octet == _QUOTE:
            quoted = not quoted
        else:
            address.append(octet)
    return bytes(address)
