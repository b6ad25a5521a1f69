"""Address literals of our own: which are ours, and what is made of them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmail_smtpd_py.localip import localize

HOST = b"mx.example.org"


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
        (b"user@[IPv6:::1]", b"user@[IPv6:::1]"),
        (b"user@[]", b"user@[]"),
        (b"user@[\xb2.0.0.1]", b"user@[\xb2.0.0.1]"),
        (b"", b""),
    ],
)
def test_localize(address: bytes, localized: bytes) -> None:
    assert localize(address, HOST) == localized


@given(st.one_of(st.binary(max_size=30), st.binary(max_size=15).map(lambda text: b"u@[%s]" % text)))
def test_any_address_is_itself_or_at_our_host(address: bytes) -> None:
    assert localize(address, HOST) in (address, address.rpartition(b"@")[0] + b"@" + HOST)


def test_the_addresses_of_all_interfaces_that_are_up_are_ours() -> None:
    """As the kernel's routing table has them, which is another place to ask than ours."""
    table = Path("/proc/net/fib_trie").read_text("ascii")
    ours = re.findall(r"\|-- (\S+)\n\s+/32 host LOCAL", table)
    assert "127.0.0.1" in ours
    for ip in ours:
        assert localize(b"user@[%s]" % ip.encode(), HOST) == b"user@mx.example.org"
