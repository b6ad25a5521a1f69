"""A connection's TLS in memory: nothing that has come waits for more to come, and nothing that is
to be sent is left behind, however it is cut into pieces.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from conformance.stage import FIXTURES
from e2e.certificates import Certificate
from e2e.records import APPLICATION_DATA, HANDSHAKE, Secrets
from OpenSSL import SSL

from qmail_smtpd_py import tls
from qmail_smtpd_py.channel import Channel, ClientChannel, reason

pytestmark = pytest.mark.tls

LARGE = os.urandom(100_000) * 3

KEY_UPDATE = b"\x18\0\0\x01\0"  # RFC 8446 section 4.6.3

VERSIONS = {"1.2": SSL.TLS1_2_VERSION, "1.3": SSL.TLS1_3_VERSION}


def prepare(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Go to a qmail home with a certificate."""
    (directory / "control").mkdir()
    shutil.copy(FIXTURES / "server-rsa.pem", directory / "control" / "servercert.pem")
    monkeypatch.chdir(directory)


@pytest.fixture(params=VERSIONS)
def ends(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[Channel, ClientChannel]:
    """The server's end and the client's, with nothing said so far."""
    prepare(tmp_path, monkeypatch)
    context = SSL.Context(SSL.TLS_CLIENT_METHOD)
    context.set_max_proto_version(VERSIONS[request.param])
    return tls.Context(tls.Policy(resumable=True)).channel(), ClientChannel(context)


def connect(server: Channel, client: Channel) -> None:
    """Make the handshake, and take in all of it at both ends."""
    are_up = False
    while not are_up:
        client_is_up = client.handshake()
        pass_on(client, server)
        are_up = server.handshake() and client_is_up
        pass_on(server, client)
    assert client.read() == b""


def pass_on(sender: Channel, receiver: Channel) -> None:
    octets = sender.pending()
    if octets:
        receiver.feed(octets)


def test_what_is_said_in_the_middle_of_a_key_update(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """OpenSSL writes nothing before it has the rest of a message that has begun."""
    prepare(tmp_path, monkeypatch)
    context = SSL.Context(SSL.TLS_CLIENT_METHOD)
    secrets = Secrets(context)
    server, client = tls.Context(tls.Policy()).channel(), ClientChannel(context)
    connect(server, client)
    records = secrets.records(client.cipher())
    server.feed(records.seal(APPLICATION_DATA, b"DATA\r\n"))
    server.feed(records.seal(HANDSHAKE, KEY_UPDATE[:4]))
    assert server.read() == b"DATA\r\n"
    assert server.write(b"250 ok\r\n") + server.write(LARGE) == b""
    assert server.read() == server.pending() == b""
    server.feed(records.seal(HANDSHAKE, KEY_UPDATE[4:]))
    server.feed(records.updated().seal(APPLICATION_DATA, b"QUIT\r\n"))
    assert server.read() == b"QUIT\r\n"
    client.feed(server.write(b"221\r\n"))
    assert client.read() == b"250 ok\r\n" + LARGE + b"221\r\n"
    assert server.ended == ""


@pytest.mark.parametrize("number", [780, 860])
def test_authorities_that_are_too_many_to_be_named(
    ends: tuple[Channel, ClientChannel], number: int
) -> None:
    """Or no handshake would succeed, with or without a certificate."""
    _, client = ends
    authority = Certificate("x" * 60, authority=True)
    pem = b"".join(
        Certificate(f"{at:064}", issuer=authority, authority=True).pem
        for at in range(number)
    )
    Path("control/clientca.pem").write_bytes(pem)
    context = tls.Context(tls.Policy(ask_client=True))
    assert len(context.warnings) == (number == 860)
    connect(context.channel(), client)


def test_reasons() -> None:
    assert reason(SSL.SysCallError(-1, "Unexpected EOF")) == "Unexpected EOF"
    assert reason(SSL.Error([("", "", "x"), ("", "", "y")])) == "x; y"
    assert reason(SSL.Error()) == "connection ended"


def test_a_server_has_nothing_to_say_before_the_client(ends: tuple[Channel, ClientChannel]) -> None:
    server, _ = ends
    assert not server.handshake()
    assert server.pending() == b""
    assert server.read() == b""


def test_what_comes_in_one_piece_with_the_end_of_the_handshake(
    ends: tuple[Channel, ClientChannel],
) -> None:
    server, client = ends
    for _ in range(3):
        if client.handshake():
            break
        server.feed(client.pending())
        server.handshake()
        client.feed(server.pending())
    server.feed(client.pending() + client.write(b"EHLO client\r\n"))
    assert server.handshake()
    assert server.read() == b"EHLO client\r\n"
    assert server.read() == b""


def test_an_octet_at_a_time(ends: tuple[Channel, ClientChannel]) -> None:
    server, client = ends
    connect(server, client)
    heard = b""
    for octet in client.write(b"NOOP\r\n") + client.write(b"QUIT\r\n"):
        server.feed(bytes([octet]))
        heard += server.read()
    assert heard == b"NOOP\r\nQUIT\r\n"


def test_more_than_a_piece_both_ways(ends: tuple[Channel, ClientChannel]) -> None:
    server, client = ends
    connect(server, client)
    server.feed(client.write(LARGE))
    assert server.read() == LARGE
    client.feed(server.write(LARGE))
    assert client.read() == LARGE
    assert server.pending() == client.pending() == b""


def test_the_end(ends: tuple[Channel, ClientChannel]) -> None:
    server, client = ends
    connect(server, client)
    farewell = server.write(b"221\r\n") + server.close()
    client.feed(farewell)
    assert client.read() == b"221\r\n"
    assert client.ended == "hung up"
    assert client.read() == b""
    assert server.close() == b""


def test_an_alert_for_what_breaks_it(ends: tuple[Channel, ClientChannel]) -> None:
    server, client = ends
    connect(server, client)
    server.feed(b"\x17\x03\x03\0\x20" + bytes(32))
    assert server.read() == b""
    assert server.ended.startswith("TLS: ")
    client.feed(server.pending())
    assert client.read() == b""
    assert "alert" in client.ended
