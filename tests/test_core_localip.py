"""Address literals of our own: which are ours, and what is made of them."""

from __future__ import annotations

import ipaddress
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmail_smtpd_py.localip import localize

HOST = b"mx.example.org"
RTF_LOCAL = 0x80000000  # of linux/ipv6_route.h


@pytest.mark.parametrize(
    ("address", "localized"),
    [
        (b"user@[127.0.0.1]", b"user@mx.example.org"),
        (b"user@[0.0.0.0]", b"user@mx.example.org"),
        (b"user@[127.000.000.001]", b"user@mx.example.org"),
        (b"@[127.0.0.1]", b"@mx.example.org"),
        (b"a@b@[127.0.0.1]", b"a@b@mx.example.org"),
        (b"user@[192.0.2.77]", b"user@[192.0.2.77]"),
        (b"user@127.0.0.1", b"user@127.0.0.1"),
        (b"[127.0.0.1]", b"[127.0.0.1]"),
        (b"user@[127.0.0.1", b"user@[127.0.0.1"),
        (b"user@127.0.0.1]", b"user@127.0.0.1]"),
        (b"user@[127.1]", b"user@[127.1]"),
        (b"user@[127.0.0.1.]", b"user@[127.0.0.1.]"),
        (b"user@[127.0.0.256]", b"user@[127.0.0.256]"),
        (b"user@[127.0.0.0001]", b"user@[127.0.0.0001]"),
        (b"user@[127.0.0.-1]", b"user@[127.0.0.-1]"),
        (b"user@[IPv6:::1]", b"user@mx.example.org"),
        (b"user@[ipV6:0:0:0:0:0:0:0:1]", b"user@mx.example.org"),
        (b"user@[IPv6:0000:0000:0000:0000:0000:0000:0000:0001]", b"user@mx.example.org"),
        (b"user@[IPv6:::]", b"user@mx.example.org"),
        (b"user@[IPv6:::ffff:127.0.0.1]", b"user@mx.example.org"),
        (b"user@[IPv6:::FFFF:7f00:1]", b"user@mx.example.org"),
        (b"user@[IPv6:::ffff:192.0.2.77]", b"user@[IPv6:::ffff:192.0.2.77]"),
        (b"user@[IPv6:::127.0.0.1]", b"user@[IPv6:::127.0.0.1]"),
        (b"user@[IPv6:2001:db8::77]", b"user@[IPv6:2001:db8::77]"),
        (b"user@[::1]", b"user@[::1]"),
        (b"user@[IPv6::1]", b"user@[IPv6::1]"),
        (b"user@[IPv6:::1%lo]", b"user@[IPv6:::1%lo]"),
        (b"user@[IPv6: ::1]", b"user@[IPv6: ::1]"),
        (b"user@[IPv6:::1\0]", b"user@[IPv6:::1\0]"),
        (b"user@[IPv6:::\xb9]", b"user@[IPv6:::\xb9]"),
        (b"user@[IPv6:127.0.0.1]", b"user@[IPv6:127.0.0.1]"),
        (b"user@[IPv6:]", b"user@[IPv6:]"),
        (b"user@[IPv4:127.0.0.1]", b"user@[IPv4:127.0.0.1]"),
        (b"user@[]", b"user@[]"),
        (b"user@[\xb2.0.0.1]", b"user@[\xb2.0.0.1]"),
        (b"", b""),
    ],
)
def test_localize(address: bytes, localized: bytes) -> None:
    assert localize(address, HOST) == localized


LITERALS = st.sampled_from([b"u@[%s]", b"u@[IPv6:%s]"])


@given(
    st.one_of(
        st.binary(max_size=30),
        st.tuples(LITERALS, st.binary(max_size=15)).map(lambda pair: pair[0] % pair[1]),
    )
)
def test_any_address_is_itself_or_at_our_host(address: bytes) -> None:
    assert localize(address, HOST) in (address, address.rpartition(b"@")[0] + b"@" + HOST)


def test_the_addresses_of_all_interfaces_that_are_up_are_ours() -> None:
    """As the kernel's routing table has them, which is another place to ask than ours."""
    table = Path("/proc/net/fib_trie").read_text("ascii")
    ours = re.findall(r"\|-- (\S+)\n\s+/32 host LOCAL", table)
    assert "127.0.0.1" in ours
    for ip in ours:
        assert localize(b"user@[%s]" % ip.encode(), HOST) == b"user@mx.example.org"


def test_the_ipv6_addresses_of_all_interfaces_are_ours() -> None:
    """As the routing table has them: a route of its own for each address of this host."""
    routes = [line.split() for line in Path("/proc/net/ipv6_route").read_text("ascii").splitlines()]
    ours = [
        ipaddress.IPv6Address(int(route[0], 16))
        for route in routes
        if route[1] == "80" and int(route[8], 16) & RTF_LOCAL
    ]
    assert ipaddress.IPv6Address("::1") in ours
    for ip in ours:
        for text in (str(ip), ip.exploded.upper()):
            assert localize(b"user@[IPv6:%s]" % text.encode(), HOST) == b"user@mx.example.org"


def test_a_kernel_without_ipv6_has_no_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_such_file(*_: object, **__: object) -> None:
        raise FileNotFoundError

    monkeypatch.setattr("builtins.open", no_such_file)
    assert localize(b"user@[IPv6:::1]", HOST) == b"user@[IPv6:::1]"
