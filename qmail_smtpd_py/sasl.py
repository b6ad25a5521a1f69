"""AUTH: the mechanisms PLAIN, LOGIN and CRAM-MD5 (RFC 4954).

A mechanism is a generator: it yields a challenge, is sent the client's response as it stands in its
line, and returns Credentials; it raises Malformed for a response that is.  It knows nothing of
lines and replies, and it never decides who somebody is: that is the check program's part.

Secrets live in Credentials and nowhere else.  Neither it nor an error of this module shows one.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    Exchange = Generator[bytes, bytes, "Credentials"]
    Mechanism = Callable[["bytes | None", "Callable[[], bytes]"], Exchange]

LINE_LIMIT = 12288
"""Octets in a line of an exchange (RFC 4954 section 4), without its CR LF."""

_ALPHABET = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"


class Credentials:
    """What the check program is given: the user, the password or CRAM-MD5 digest, the challenge."""

    __slots__ = ("challenge", "secret", "user")

    def __init__(self, user: bytes, secret: bytes, challenge: bytes = b"") -> None:
        if not user or not secret:
            raise Malformed
        self.user = user
        self.secret = secret
        self.challenge = challenge


class Malformed(Exception):
    """A response is not what the mechanism asks for; the message says nothing of what it was."""


def encode(challenge: bytes) -> bytes:
    """A challenge as it stands behind `334 ` (RFC 4954 section 4)."""
    from binascii import b2a_base64  # a library of its own, and most sessions have no AUTH

    return b2a_base64(challenge, newline=False)


def plain(initial: bytes | None, new_challenge: Callable[[], bytes]) -> Exchange:
    """PLAIN (RFC 4616): authorization identity, user and password, parted by NUL.

    qmail: the authorization identity is not looked at, nor what follows a NUL behind the password.
    """
    response = _decode((yield b"") if initial is None else initial)
    _, _, rest = response.partition(b"\0")
    user, _, rest = rest.partition(b"\0")
    return Credentials(user, rest.partition(b"\0")[0])


def login(initial: bytes | None, new_challenge: Callable[[], bytes]) -> Exchange:
    """LOGIN (draft-murchison-sasl-login): the user, as initial response too, and the password."""
    user = _decode_field((yield b"Username:") if initial is None else initial)
    password = _decode_field((yield b"Password:"))
    return Credentials(user, password)


def cram_md5(initial: bytes | None, new_challenge: Callable[[], bytes]) -> Exchange:
    """CRAM-MD5 (RFC 2195): user and digest, parted by the last blank.

    qmail: an initial response is not looked at.
    """
    challenge = new_challenge()
    user, _, digest = _decode_field((yield challenge)).rpartition(b" ")
    return Credentials(user, digest, challenge)


def _decode(text: bytes) -> bytes:
    """The octets of a response; raises Malformed unless it is base64 (RFC 4648 section 4)."""
    digits = text.rstrip(b"=")
    if len(text) % 4 or len(text) - len(digits) > 2 or digits.translate(None, _ALPHABET):
        raise Malformed
    from binascii import a2b_base64

    return a2b_base64(text)


def _decode_field(text: bytes) -> bytes:
    """The same of a response that has no NUL: on descriptor 3 that would part fields."""
    response = _decode(text)
    if not response or b"\0" in response:
        raise Malformed
    return response


MECHANISMS: dict[bytes, Mechanism] = {b"LOGIN": login, b"PLAIN": plain, b"CRAM-MD5": cram_md5}
