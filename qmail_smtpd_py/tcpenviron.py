"""The environment that tcpserver gives its programs (tcp-environ(5)), and the look-ups behind it.

What DNS and ident (RFC 1413) answer comes from strangers: a name counts only if it is printable
ASCII without blanks, and of a user what is not is replaced.
"""

from __future__ import annotations

import select
import socket
import time

from .connection import plain_ip

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

    from .proxyprotocol import Addresses

_IDENT_PORT = 113
_LONGEST_ANSWER = 1000
_LONGEST_USER = 257  # as in tcpserver


class LookUps:
    """What is asked about a client: its host name (-h), whether that name has its address too (-p),
    and its ident answer (-r) within so many seconds (-t); `local_host` is tcpserver's -l.
    """

    __slots__ = ("_local_names", "host", "ident", "ident_seconds", "local_host", "paranoid")

    def __init__(self) -> None:
        self.host = True
        self.paranoid = False
        self.ident = True
        self.ident_seconds = 26.0
        self.local_host: bytes | None = None
        self._local_names: dict[str, bytes] = {}

    def remote_host(self, ip: str) -> bytes | None:
        """The client's name in DNS, or None."""
        name = _name_of(ip) if self.host else None
        if name and self.paranoid and not _has_address(name, ip):
            return None
        return name

    def local_name(self, ip: str) -> bytes | None:
        """The server's own name: that of -l, or what DNS says, asked until it has one for the
        address: none may mean that DNS is out of order for a moment.
        """
        if self.local_host is not None:
            return self.local_host
        name = self._local_names.get(ip) or _name_of(ip)
        if name is not None:
            self._local_names[ip] = name
        return name

    def remote_info(self, ends: Addresses) -> bytes | None:
        """The client's ident answer, or None."""
        return ident(ends, self.ident_seconds) if self.ident else None


def environment(
    base: Mapping[bytes, bytes],
    ends: Addresses,
    local_host: bytes | None,
    remote_host: bytes | None,
    remote_info: bytes | None,
) -> dict[bytes, bytes]:
    """The environment for a connection: the base, and the variables of tcp-environ(5)."""
    environ = dict(base)
    environ[b"PROTO"] = b"TCP6" if ":" in ends.local_ip else b"TCP"
    environ[b"TCPLOCALIP"] = ends.local_ip.encode()
    environ[b"TCPLOCALPORT"] = b"%d" % ends.local_port
    environ[b"TCPREMOTEIP"] = ends.remote_ip.encode()
    environ[b"TCPREMOTEPORT"] = b"%d" % ends.remote_port
    names = {
        b"TCPLOCALHOST": local_host,
        b"TCPREMOTEHOST": remote_host,
        b"TCPREMOTEINFO": remote_info,
    }
    for name, value in names.items():
        environ.pop(name, None)
        if value is not None:
            environ[name] = value
    return environ


def bare_ip(ip: str) -> str:
    """An address as variables have it: without a zone, and IPv4 in IPv6's clothes as IPv4."""
    if ":" not in ip:
        return ip
    return plain_ip(ip.partition("%")[0].encode()).decode()


def _name_of(ip: str) -> bytes | None:
    try:
        name, _ = socket.getnameinfo((ip, 0), socket.NI_NAMEREQD | socket.NI_NUMERICSERV)
    except (OSError, UnicodeError):
        return None
    octets = name.encode("ascii", "replace").lower()  # rules have names in lower case
    return octets if all(33 <= octet <= 126 for octet in octets) else None


def _has_address(name: bytes, ip: str) -> bool:
    family = socket.AF_INET6 if ":" in ip else socket.AF_INET  # lest the other is waited for
    try:
        found = socket.getaddrinfo(name, None, family, socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return False
    return any(bare_ip(str(address[0])) == ip for *_, address in found)


def ident(ends: Addresses, seconds: float) -> bytes | None:
    """Ask the client's host who has the connection (RFC 1413); None if it does not say in time."""
    deadline = time.monotonic() + seconds
    family = socket.AF_INET6 if ":" in ends.remote_ip else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_STREAM) as asked:
            asked.settimeout(seconds)
            asked.bind((ends.local_ip, 0))
            asked.connect((ends.remote_ip, _IDENT_PORT))
            asked.sendall(b"%d , %d\r\n" % (ends.remote_port, ends.local_port))
            return _parse_ident(_read_answer(asked, deadline))
    except OSError:
        return None


def _read_answer(asked: socket.socket, deadline: float) -> bytes:
    poll = select.poll()
    poll.register(asked, select.POLLIN)
    answer = b""
    while b"\n" not in answer and len(answer) < _LONGEST_ANSWER:
        left = deadline - time.monotonic()
        if left <= 0 or not poll.poll(left * 1000):
            return b""
        piece = asked.recv(_LONGEST_ANSWER)
        if not piece:
            break
        answer += piece
    return answer


def _parse_ident(answer: bytes) -> bytes | None:
    """The user in `port , port : USERID : system : user`, read as tcpserver reads it: what stands
    behind the third colon, without blanks; empty for an error.
    """
    line, end, _ = answer.partition(b"\n")
    if not end:
        return None
    user = b":".join(line.split(b":")[3:]).translate(None, b" \t\r").partition(b"\0")[0]
    user = user[:_LONGEST_USER]
    return bytes(octet if 33 <= octet <= 126 else ord("?") for octet in user)
