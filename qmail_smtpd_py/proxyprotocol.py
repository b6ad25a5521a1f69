"""The PROXY protocol, versions 1 and 2: who the client behind a load balancer is.

The header stands before the first octet of SMTP.  It is believed only of peers that the
administrator lists; a listed peer that sends none, or a broken one, is cut off.  (HAProxy's
proxy-protocol.txt, sections 2.1 and 2.2.)
"""

from __future__ import annotations

import ipaddress
import select
import socket
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from _socket import socket as Socket
    from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
    from typing import Union

    Address = Union[IPv4Address, IPv6Address]

_SIGNATURE = b"\r\n\r\n\0\r\nQUIT\n"
_MAPPED = 96  # bits before the IPv4 address
_START_V1 = b"PROXY "
_LONGEST_V1 = 107
_HEADER_V2 = 16
_TCP4, _TCP6 = 0x11, 0x21
_LOCAL, _PROXY = 0x20, 0x21


class ProxyError(Exception):
    """No header came that could be believed."""


class Addresses:
    """The two ends of a connection, as the header or the kernel tells them."""

    __slots__ = ("local_ip", "local_port", "remote_ip", "remote_port")

    def __init__(self, remote_ip: str, remote_port: int, local_ip: str, local_port: int) -> None:
        self.remote_ip = remote_ip
        self.remote_port = remote_port
        self.local_ip = local_ip
        self.local_port = local_port


class Peers:
    """The addresses and networks that headers are believed from: `192.0.2.1,2001:db8::/32`."""

    def __init__(self, text: str) -> None:
        """Raises ValueError where the text is no such list."""
        self._networks = [_network(word.strip()) for word in text.split(",")]

    def __contains__(self, ip: str) -> bool:
        address = ipaddress.ip_address(ip)
        return any(address in network for network in self._networks)


def _network(text: str) -> IPv4Network | IPv6Network:
    """The network; IPv4 in IPv6's clothes as IPv4, as peers have it (RFC 4291 section 2.5.5.2)."""
    network = ipaddress.ip_network(text)
    inner = getattr(network.network_address, "ipv4_mapped", None)
    if inner is None or network.prefixlen < _MAPPED:
        return network
    return ipaddress.ip_network((inner, network.prefixlen - _MAPPED))


def read_header(connection: Socket, seconds: float) -> Addresses | None:
    """Take the header off the connection: the addresses in it, or None where it tells none.

    Reads not an octet more than the header; raises ProxyError, also where it takes longer than
    `seconds`.
    """
    deadline = time.monotonic() + seconds
    start = _peek(connection, len(_START_V1), deadline)
    if start.startswith(_START_V1):
        return _read_v1(connection, deadline)
    if start.startswith(_SIGNATURE[: len(_START_V1)]):
        return _read_v2(connection, deadline)
    raise ProxyError("no PROXY header")


def _peek(connection: Socket, least: int, deadline: float) -> bytes:
    """The next octets, left where they are: at least that many; raises ProxyError."""
    poll = select.poll()
    poll.register(connection, select.POLLIN | select.POLLRDHUP)
    while True:
        left = deadline - time.monotonic()
        events = poll.poll(max(0, left) * 1000)
        if not events:
            raise ProxyError("no whole PROXY header in time")
        data = connection.recv(4096, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        if len(data) >= least:
            return data
        if events[0][1] & select.POLLRDHUP:
            raise ProxyError("hung up")
        if left <= 0:
            raise ProxyError("no whole PROXY header in time")
        time.sleep(0.005)  # poll would tell of the octets that are there at once


def _read_v1(connection: Socket, deadline: float) -> Addresses | None:
    data, seen = b"", 0
    while b"\r\n" not in data[:_LONGEST_V1]:
        if len(data) >= _LONGEST_V1:
            raise ProxyError("PROXY header too long")
        data = _peek(connection, seen + 1, deadline)
        seen = len(data)
    line = data[: data.index(b"\r\n")]
    connection.recv(len(line) + 2)
    words = line.decode("latin-1").split(" ")
    if words[1] == "UNKNOWN":
        return None
    try:
        if b"%" in line:  # a zone (RFC 4007 section 11), which has no meaning to another host
            raise ValueError
        family, source, destination, *ports = words[1:]
        source_port, destination_port = [_port(word) for word in ports]
        ends = ipaddress.ip_address(source), ipaddress.ip_address(destination)
        if any(family != f"TCP{end.version}" for end in ends):
            raise ValueError
        return _addresses(*ends, source_port, destination_port)
    except ValueError:
        raise ProxyError("broken PROXY header") from None


def _read_v2(connection: Socket, deadline: float) -> Addresses | None:
    start = _peek(connection, _HEADER_V2, deadline)
    if not start.startswith(_SIGNATURE):
        raise ProxyError("no PROXY header")
    command, family = start[12], start[13]
    length = int.from_bytes(start[14:16], "big")
    if command not in (_LOCAL, _PROXY) or length > 2048:
        raise ProxyError("broken PROXY header")
    _peek(connection, _HEADER_V2 + length, deadline)
    body = connection.recv(_HEADER_V2 + length)[_HEADER_V2:]
    if command == _LOCAL or family not in (_TCP4, _TCP6):
        return None
    size = 4 if family == _TCP4 else 16
    if length < 2 * size + 4:
        raise ProxyError("broken PROXY header")
    ports = body[2 * size : 2 * size + 4]
    return _addresses(
        ipaddress.ip_address(body[:size]),
        ipaddress.ip_address(body[size : 2 * size]),
        int.from_bytes(ports[:2], "big"),
        int.from_bytes(ports[2:], "big"),
    )


def _port(text: str) -> int:
    if not (text.isascii() and text.isdigit()) or int(text) > 65535:
        raise ValueError
    return int(text)


def _addresses(
    source: Address, destination: Address, source_port: int, destination_port: int
) -> Addresses:
    """The addresses, as rules have them: an IPv4 address in IPv6's clothes as what it is."""
    remote, local = (getattr(end, "ipv4_mapped", None) or end for end in (source, destination))
    return Addresses(str(remote), source_port, str(local), destination_port)
