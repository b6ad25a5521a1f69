"""UCSPI-TLS: TLS by the program that started us, such as sslserver -n (ucspi-tls(2)).

The connection is in clear on descriptors 0 and 1, and the environment names three more:

    SSLCTLFD      at STARTTLS we write Y to it; whoever started us makes the handshake, and when
                  that is complete answers with variables, each NAME=value and a NUL, and one
                  more NUL at the end
    SSLREADFD     from there on what the client says
    SSLWRITEFD    and what it is told

Only who starts the program can set these variables, and could as well start another program.
"""

from __future__ import annotations

import os
import select
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

_LONGEST = 1 << 20  # octets of variables; they may have certificates in them
_PIECE = 65536


class UcspiError(Exception):
    """There is no TLS to be had that way; the text says why."""


def descriptors(environ: Mapping[bytes, bytes]) -> list[int]:
    """The three descriptors, in the order of above; no child gets them.  Raises UcspiError."""
    named = {
        "SSLCTLFD": environ.get(b"SSLCTLFD", b""),
        "SSLREADFD": environ.get(b"SSLREADFD", b""),
        "SSLWRITEFD": environ.get(b"SSLWRITEFD", b""),
    }
    found: list[int] = []
    for name, value in named.items():
        try:
            if not value.isdigit() or int(value) < 3 or int(value) in found[:1]:
                raise UcspiError(f"{name} is not the number of a descriptor of its own")
            os.set_inheritable(int(value), False)
        except (OSError, OverflowError, ValueError):
            raise UcspiError(f"{name} is not the number of an open descriptor") from None
        found.append(int(value))
    return found


def start(control: int, seconds: float) -> dict[bytes, bytes]:
    """Have the handshake made, within so many seconds; what is told of it.  Raises UcspiError."""
    deadline = time.monotonic() + seconds
    try:
        os.write(control, b"Y")
        text = b""
        while not text.endswith(b"\0\0") and text != b"\0":
            text += _read(control, deadline)
            if len(text) > _LONGEST:
                raise UcspiError("no end of variables on SSLCTLFD")
    except OSError as error:
        raise UcspiError(f"SSLCTLFD: {error.strerror}") from None
    words = (word.partition(b"=") for word in text.split(b"\0"))
    return {name: value for name, _, value in words if name.startswith(b"SSL_")}


def _read(control: int, deadline: float) -> bytes:
    readable = select.poll()
    readable.register(control, select.POLLIN)
    if not readable.poll(max(0, deadline - time.monotonic()) * 1000):
        raise UcspiError("timeout")
    data = os.read(control, _PIECE)
    if not data:
        raise UcspiError("refused by who started us, whose log may say why")
    return data
