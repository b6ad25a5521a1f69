"""IPv6: the addresses that launchers tell, address literals, and the listener over ::1."""

from __future__ import annotations

from pathlib import Path

import pytest
from conformance import logs
from conformance.cdb_writer import make_cdb
from conformance.program import Program
from conformance.stage import Stage
from listener.listening import Listening
from listener.mail import quit_, send_message

pytest_plugins = ["listener.fixtures"]

TOLD = {
    "2001:db8::25": "2001:db8::25",
    "fe80::25%eth0": "fe80::25%eth0",
    "::ffff:192.0.2.25": "192.0.2.25",
    "::FFFF:192.0.2.25": "192.0.2.25",
}


@pytest.mark.parametrize("ip", TOLD)
def test_the_address_of_a_client(host: Stage, ip: str) -> None:
    """In the log and in Received; children have the environment as it was."""
    host.environment({"TCPREMOTEIP": ip, "TCP6REMOTEIP": ip, "PROTO": "TCP6"})
    with Program(host) as program:
        assert program.client.reply() == "220 mx.example.org ESMTP"
        send_message(program.client)
        quit_(program.client)
        assert program.wait() == 0
    (delivery,) = host.deliveries()
    assert f"from client.example.com ({TOLD[ip]})\n" in delivery.read[0].decode()
    assert delivery.environ["TCPREMOTEIP"] == ip
    assert {line.fields["ip"] for line in logs.read_all(program.log)} == {TOLD[ip]}


def test_the_address_in_the_line_of_a_session_that_can_not_begin(host: Stage) -> None:
    host.environment({"TCPREMOTEIP": "::ffff:192.0.2.25"})
    host.control({"databytes": "@directory"})
    with Program(host) as program:
        assert (program.client.reply() or "").startswith("421 ")
        assert program.wait() == 1
    assert [line.fields["ip"] for line in logs.read_all(program.log)] == ["192.0.2.25"]


LITERALS = {
    "[IPv6:::1]": "mx.example.org",
    "[ipv6:0:0:0:0:0:0:0:1]": "mx.example.org",
    "[IPv6:::ffff:127.0.0.1]": "mx.example.org",
    "[127.0.0.1]": "mx.example.org",
    "[IPv6:2001:db8::77]": None,
    "[::1]": None,
}


@pytest.mark.parametrize("literal", LITERALS)
def test_literals_of_ours(host: Stage, literal: str) -> None:
    """They are localiphost, before rcpthosts is asked."""
    host.control({"rcpthosts": "mx.example.org\n"})
    with Program(host) as program:
        client = program.client
        assert client.reply()
        assert client.command(b"MAIL FROM:<>") == "250 ok"
        answer = client.command(f"RCPT TO:<postmaster@{literal}>".encode()) or ""
        if LITERALS[literal] is None:
            assert answer.startswith("553 sorry, that domain isn't in my list")
            return
        assert answer == "250 ok"
        assert client.command(b"DATA") == "354 go ahead"
        assert (client.command(b".") or "").startswith("250 ok ")
    (delivery,) = host.deliveries()
    assert delivery.read[1] == b"F\0Tpostmaster@mx.example.org\0\0"


def test_localiphost_ends_at_a_nul(host: Stage) -> None:
    """In an envelope it would end the address."""
    host.control({"rcpthosts": "mx.example.org\n"})
    (host.home / "control" / "localiphost").write_bytes(b"mx.example.org\0.example\n")
    with Program(host) as program:
        client = program.client
        assert client.reply()
        assert client.command(b"MAIL FROM:<a@[127.0.0.1]>") == "250 ok"
        assert client.command(b"RCPT TO:<u@[127.0.0.1]>") == "250 ok"
        assert client.command(b"DATA") == "354 go ahead"
        assert (client.command(b".") or "").startswith("250 ok ")
    (delivery,) = host.deliveries()
    assert delivery.read[1] == b"Fa@mx.example.org\0Tu@mx.example.org\0\0"


RULES = {
    "the address": b"::1",
    "a prefix that ends with a colon": b":",
    "the rule for all": b"",
}


@pytest.mark.parametrize("key", RULES.values(), ids=RULES)
def test_rules_and_session_over_ipv6(mx: Stage, tmp_path: Path, key: bytes) -> None:
    """The keys are those that a tcprules with IPv6 writes; the usual one takes no such rules."""
    rules = tmp_path / "rules.cdb"
    others = {b"2001:db8:": b"D\0", b"127.": b"D\0"}
    rules.write_bytes(make_cdb({key: b"+RELAYCLIENT=\0", **others}))
    with Listening(mx, "-x", str(rules), host="::1") as listener:
        client = listener.greeted()
        assert client.command(b"MAIL FROM:<>") == "250 ok"
        assert client.command(b"RCPT TO:<u@elsewhere.example>") == "250 ok"
        assert client.command(b"RSET") == "250 flushed"
        send_message(client)
        quit_(client)
        listener.log.wait_for(r"qmail-smtpd\[\d+\]: disconnect ip=::1 why=quit")
    (delivery,) = mx.deliveries()
    assert b" (::1)\n" in delivery.read[0]
    assert delivery.environ["TCPLOCALIP"] == delivery.environ["TCPREMOTEIP"] == "::1"


def test_a_client_with_an_ipv4_address_on_a_socket_for_both(mx: Stage, tmp_path: Path) -> None:
    """Its rules are those for IPv4."""
    rules = tmp_path / "rules.cdb"
    rules.write_bytes(make_cdb({b"127.": b"+RELAYCLIENT=\0", b":": b"D\0"}))
    with Listening(mx, "-x", str(rules), host="::") as listener:
        listener.address = "127.0.0.1"
        client = listener.greeted()
        assert client.command(b"MAIL FROM:<>") == "250 ok"
        assert client.command(b"RCPT TO:<u@elsewhere.example>") == "250 ok"
        quit_(client)
        listener.log.wait_for(r"qmail-smtpd\[\d+\]: disconnect ip=127\.0\.0\.1 why=quit")
