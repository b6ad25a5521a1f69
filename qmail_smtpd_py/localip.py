"""Address literals of our own: `user@[192.0.2.1]` is `user@localiphost` where the IP is ours.

Ours are the IPv4 addresses of the interfaces that are up, and 0.0.0.0, as in qmail's ipme.c, and in
`[IPv6:2001:db8::1]` (RFC 5321 section 4.1.3) the IPv6 addresses, and `::`.  They are looked up when
an address has a literal, as most sessions have none.
"""

from __future__ import annotations

from array import array

_SIOCGIFCONF = 0x8912  # netdevice(7); all of Linux has these numbers
_SIOCGIFFLAGS = 0x8913
_IFF_UP = 1
_NAME_SIZE = 16
_MAPPED = bytes(10) + b"\xff\xff"


def localize(address: bytes, host: bytes) -> bytes:
    """The address with `host` for its domain, if that is a literal with an IP address of ours."""
    local_part, at, domain = address.rpartition(b"@")
    if not at or not domain.startswith(b"[") or not domain.endswith(b"]"):
        return address
    return local_part + at + host if _is_ours(domain[1:-1]) else address


def _is_ours(literal: bytes) -> bool:
    """Whether what stands in the brackets is an address of this host."""
    is_ipv6 = literal[:5].upper() == b"IPV6:"
    ip = _parse_ipv6(literal[5:]) if is_ipv6 else _parse(literal)
    if ip is None:
        return False
    ours = _our_addresses if len(ip) == 4 else _our_ipv6_addresses
    return not any(ip) or ip in ours()


def _parse(text: bytes) -> bytes | None:
    """The four octets of a dotted quad, or None."""
    parts = text.split(b".")
    if len(parts) != 4 or not all(part.isdigit() and len(part) <= 3 for part in parts):
        return None
    octets = [int(part) for part in parts]
    return bytes(octets) if max(octets) < 256 else None


def _parse_ipv6(text: bytes) -> bytes | None:
    """The sixteen octets of an IPv6 address, the four of an IPv4 address that is mapped into one
    (RFC 4291 section 2.5.5.2), or None.
    """
    import socket

    try:
        ip = socket.inet_pton(socket.AF_INET6, text.decode("ascii"))
    except (OSError, ValueError):
        return None
    return ip[12:] if ip.startswith(_MAPPED) else ip


def _our_ipv6_addresses() -> set[bytes]:
    """The IPv6 addresses of the interfaces, as the kernel lists them; none if it has none."""
    try:
        with open("/proc/net/if_inet6", encoding="ascii") as table:
            return {bytes.fromhex(line[:32]) for line in table}
    except (OSError, ValueError):
        return set()


def _our_addresses() -> set[bytes]:
    """The IPv4 addresses of the interfaces that are up (netdevice(7)); none if nobody tells."""
    import socket
    from fcntl import ioctl
    from sys import byteorder

    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            found = set()
            for request in _interfaces(sock.fileno()):
                flags = ioctl(sock, _SIOCGIFFLAGS, request)[_NAME_SIZE : _NAME_SIZE + 2]
                if int.from_bytes(flags, byteorder) & _IFF_UP:
                    found.add(request[20:24])
            return found
    except OSError:
        return set()


def _interfaces(descriptor: int) -> list[bytes]:
    """A `struct ifreq` for each address: the interface's name, and the address in it."""
    from fcntl import ioctl
    from struct import calcsize, pack, unpack

    size = _NAME_SIZE + (24 if calcsize("P") == 8 else 16)
    room = 128 * size
    while True:
        buffer = array("B", bytes(room))
        answer = ioctl(descriptor, _SIOCGIFCONF, pack("iP", room, buffer.buffer_info()[0]))
        used: int = unpack("iP", answer)[0]
        if used < room:
            text = buffer.tobytes()[:used]
            return [text[at : at + size] for at in range(0, used, size)]
        room *= 2
