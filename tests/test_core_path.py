"""Paths and parameters, against a model that goes octet by octet as qmail does."""

from __future__ import annotations

from itertools import product

import pytest
from examples import examples
from hypothesis import example, given
from hypothesis import strategies as st

from qmail_smtpd_py import path

CONTROLS = [*range(32), 127]


def model(argument: bytes) -> bytes:
    """The address in an argument: bracket or colon, route, then quotes and escapes."""
    at = argument.find(b"<")
    end = b">"
    if at < 0:
        end = b" "
        at = argument.find(b":")
        at = len(argument) if at < 0 else at
        while argument[at + 1 : at + 2] == b" ":
            at += 1
    rest = argument[at + 1 :]
    if rest.startswith(b"@"):
        colon = rest.find(b":")
        rest = rest[colon + 1 :] if colon >= 0 else b""
    address, quoted, escaped = b"", False, False
    for octet in (rest[at : at + 1] for at in range(len(rest))):
        if escaped:
            address, escaped = address + octet, False
        elif octet == end and not quoted:
            break
        elif octet == b"\\":
            escaped = True
        elif octet == b'"':
            quoted = not quoted
        else:
            address += octet
    return address


def agree(argument: bytes) -> None:
    wanted = model(argument)
    if any(octet in CONTROLS for octet in wanted):
        with pytest.raises(path.PathError):
            path.parse_path(argument)
    else:
        assert path.parse_path(argument) == wanted


pieces = st.sampled_from(
    [
        b"<",
        b">",
        b"@",
        b":",
        b" ",
        b'"',
        b"\\",
        b",",
        b"a",
        b"user",
        b"example.org",
        b"FROM:",
        b"\t",
        b"\xe9",
    ]
)


@given(st.one_of(st.lists(pieces, max_size=14).map(b"".join), st.binary(max_size=20)))
@examples(3000)
@example(b"FROM:<@a,@b:user@example.org>")
def test_an_address_is_what_the_model_takes(argument: bytes) -> None:
    agree(argument)


@pytest.mark.parametrize("length", range(7))
def test_all_short_arguments(length: int) -> None:
    for argument in map(
        b"".join, product((b"<", b">", b":", b"@", b" ", b'"', b"\\"), repeat=length)
    ):
        agree(argument)


addresses = st.binary(max_size=80).map(lambda octets: octets.translate(None, bytes(CONTROLS)))


@given(addresses)
def test_whatever_is_quoted_comes_out_as_it_was(address: bytes) -> None:
    escaped = b"".join(b"\\%c" % octet for octet in address)
    assert path.parse_path(b"FROM:<%s>" % escaped) == address
    assert path.parse_path(b"FROM:<%s> SIZE=1" % escaped) == address


@pytest.mark.parametrize("octet", CONTROLS)
@pytest.mark.parametrize(
    "form", [b"TO:<us%cer@example.org>", b'TO:<"us%cer"@example.org>', b"TO:us\\%cer@h"]
)
def test_no_control_octet_in_an_address(octet: int, form: bytes) -> None:
    with pytest.raises(path.PathError):
        path.parse_path(form % octet)


def test_length_limit() -> None:
    longest = b"x" * path.LIMIT
    assert path.check_length(longest) == longest
    with pytest.raises(path.PathError):
        path.check_length(longest + b"x")


@given(st.binary(max_size=30))
@example(b"18446744073709551615")
@example(b"18446744073709551616")
@example(b"000000000000000000000000000000000000000012")
@example(b"12\xb2")
def test_a_number_is_what_the_text_starts_with(text: bytes) -> None:
    digits = b""
    while text[len(digits) : len(digits) + 1] in [b"%d" % digit for digit in range(10)]:
        digits += text[len(digits) : len(digits) + 1]
    value = int(digits or b"0")
    assert path.number(text) == value or min(path.number(text), value) >= 1 << 64


@given(st.integers(0, (1 << 64) - 1), st.sampled_from([b"", b" ", b"x", b"-1", b".5"]))
def test_numbers_up_to_64_bits_are_exact(value: int, after: bytes) -> None:
    assert path.number(b"%d%s" % (value, after)) == value


def test_a_very_long_number_costs_nothing() -> None:
    """Python refuses to convert thousands of digits, and would take long over fewer."""
    assert path.number(b"9" * 16000) >= 1 << 64
    assert path.number(b"0" * 16000 + b"7") == 7


@given(st.text("abc+=@.3BD2", max_size=20).map(str.encode))
def test_xtext_of_a_name_gives_the_name(name: bytes) -> None:
    xtext = name.replace(b"+", b"+2B").replace(b"=", b"+3D")
    assert path.decode_auth_parameter(xtext) == name


@pytest.mark.parametrize(
    ("xtext", "name"),
    [
        (b"<>", b"unknown"),
        (b"<>x", b"unknown"),
        (b"", b""),
        (b"e+3dmc2@example.org", b"e=mc2@example.org"),
        (b"a+2bb", b"a+b"),
        (b"a+41", b"a41"),
        (b"a+", b"a"),
        (b"++3D", b"="),
        (b"+2", b"2"),
    ],
)
def test_xtext(xtext: bytes, name: bytes) -> None:
    assert path.decode_auth_parameter(xtext) == name


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        (b"FROM:<a@b> SIZE=1 BODY=8BITMIME", [b"ROM:<a@b>", b"SIZE=1", b"BODY=8BITMIME"]),
        (b"FROM:a@b SIZE=1", []),
        (b"<a> SIZE=1", []),
        (b"<ab> SIZE=1", []),
        (b"<abc> SIZE=1", []),
        (b"<abcd> SIZE=1", [b"abcd>", b"SIZE=1"]),
        (b"", []),
    ],
)
def test_parameters_count_behind_a_bracket_only(argument: bytes, words: list[bytes]) -> None:
    assert path.parameters(argument) == words


@pytest.mark.parametrize(
    ("address", "domain"),
    [(b"a@b", b"b"), (b"a@b@c", b"c"), (b"a@", b""), (b"a", None), (b"", None)],
)
def test_domain(address: bytes, domain: bytes | None) -> None:
    assert path.domain_of(address) == domain
