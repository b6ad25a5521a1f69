"""Access rules as tcprules(1) compiles them: who is turned away, and what is set for the others.

A rule's data is a list of instructions, each ended by NUL: `D` denies, `+NAME=value` sets a
variable.  The first address that has a rule decides, from the most special to the empty one.
"""

from __future__ import annotations

import os

from .cdb import CdbError, find
from .control import signature
from .log import words_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .control import Signature


class RulesError(Exception):
    """The rules can not be read; the text names the file, the user id and why."""


def addresses(ip: bytes, host: bytes | None, info: bytes | None) -> list[bytes]:
    """The addresses that are looked up for a client, in tcprules(1)'s order."""
    special = []
    if info is not None:
        special.append(info + b"@" + ip)
        if host is not None:
            special.append(info + b"@=" + host)
    special.append(ip)
    if host is not None:
        special.append(b"=" + host)
    separator = b":" if b":" in ip else b"."
    prefixes = [ip[: at + 1] for at in range(len(ip) - 1, -1, -1) if ip[at : at + 1] == separator]
    suffixes = []
    if host is not None:
        dots = (at for at in range(1, len(host)) if host[at : at + 1] == b".")
        suffixes = [*(b"=" + host[at:] for at in dots), b"="]
    return [*special, *prefixes, *suffixes, b""]


class Rules:
    """The rules of one cdb file, opened again when it changes.

    With `optional`, a file that is not there allows everybody (tcpserver's -X).
    """

    def __init__(self, path: str, optional: bool = False) -> None:
        self._path = path
        self._optional = optional
        self._descriptor: int | None = None
        self._signature: Signature | None = None

    def find(self, ip: bytes, host: bytes | None, info: bytes | None) -> dict[bytes, bytes] | None:
        """The variables to set for a client, or None if it is turned away; raises RulesError."""
        self._refresh()
        if self._descriptor is None:
            return {}
        try:
            for address in addresses(ip, host, info):
                data = find(self._descriptor, address)
                if data is not None:
                    return instructions(data)
        except (OSError, CdbError) as error:
            raise RulesError(f"cannot use {self._path}: {words_of(error)}") from None
        return {}

    def _refresh(self) -> None:
        """Open the file where it is not the one that is open."""
        seen = signature(self._path)
        if seen is not None and seen == self._signature:
            return
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = self._signature = None
        try:
            self._descriptor = os.open(self._path, os.O_RDONLY | os.O_NONBLOCK)
            self._signature = seen
        except OSError as error:
            if self._optional and isinstance(error, FileNotFoundError):
                return
            why = f"cannot read {self._path}: {error.strerror} (uid {os.geteuid()})"
            raise RulesError(why) from None


def instructions(data: bytes) -> dict[bytes, bytes] | None:
    """What the data of a rule say: the variables to set, or None to deny.

    A variable without a name is left out: no process can be started with it.
    """
    variables = {}
    for instruction in data.split(b"\0"):
        if instruction.startswith(b"D"):
            return None
        name, equals, value = instruction[1:].partition(b"=")
        if instruction.startswith(b"+") and name and equals:
            variables[name] = value
    return variables
