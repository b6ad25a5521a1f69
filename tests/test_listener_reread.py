"""What is changed on disk is seen by the next connection, in a worker that has served others."""

from __future__ import annotations

from pathlib import Path

import pytest
from conformance.client import Client
from conformance.program import Program
from conformance.stage import Stage
from listener.listening import Helping, Listening
from listener.mail import quit_, send_message, start_tls
from listener.peers import compile_rules

pytest_plugins = ["listener.fixtures"]

DOMAINS = (b"example.org", b"example.net")


def test_changes_are_seen_by_the_next_connection_of_the_same_worker(mx: Stage) -> None:
    mx.control({"tlsserverciphers": "ECDHE-RSA-AES128-GCM-SHA256\n"})
    with Listening(mx, "-c", "1") as listener:
        first = listener.greeted()
        start_tls(first, max="1.2")
        assert first.cipher == "ECDHE-RSA-AES128-GCM-SHA256"
        (mx.home / "control" / "tlsserverciphers").unlink()
        mx.control({"me": "new.example.org\n", "rcpthosts": "example.net\n", "databytes": "100\n"})
        mx.control({"badmailfrom": "bad@example.com\n", "servercert.pem": "@server-ecdsa.pem"})
        send_message(first)  # nothing changes under a session
        quit_(first)
        second = listener.connect()
        assert second.reply() == "220 new.example.org ESMTP"
        assert second.command(b"STARTTLS") == "220 ready for tls"
        assert second.start_tls(max="1.2") == "ok"
        assert "ECDSA" in (second.cipher or "")
        assert "SIZE 100" in (second.command(b"EHLO x") or "")
        assert second.command(b"MAIL FROM:<bad@example.com>") == "250 ok"
        assert (second.command(b"RCPT TO:<u@example.net>") or "").startswith("553 ")
        second.command(b"MAIL FROM:<good@example.com>")
        assert second.command(b"RCPT TO:<u@example.net>") == "250 ok"
        assert (second.command(b"RCPT TO:<u@example.org>") or "").startswith("553 ")
        assert second.command(b"QUIT") == "221 new.example.org"
        (mx.home / "control" / "servercert.pem").unlink()
        (mx.home / "control" / "rcpthosts").unlink()
        third = listener.connect()
        assert third.reply() == "220 new.example.org ESMTP"
        assert "STARTTLS" not in (third.command(b"EHLO x") or "")
        third.command(b"MAIL FROM:<good@example.com>")
        assert third.command(b"RCPT TO:<u@example.org>") == "250 ok"
        assert third.command(b"QUIT") == "221 new.example.org"
        assert len({worker for worker, _ in listener.ends(3)}) == 1


@pytest.mark.tls
def test_changes_are_seen_by_the_next_session_that_is_handed_over(mx: Stage) -> None:
    path = mx.home / "helper"
    mx.environment({"TLSHELPER": str(path)})
    with Helping(mx, path, "-c", "1") as helper:
        for domain in (b"example.org", b"example.net", b"example.org"):
            mx.control({"rcpthosts": domain.decode() + "\n"})
            with Program(mx) as program:
                client = program.client
                assert client.reply() == "220 mx.example.org ESMTP"
                start_tls(client)
                client.command(b"MAIL FROM:<a@client.example.com>")
                said = [client.command(b"RCPT TO:<u@%s>" % name) or "" for name in DOMAINS]
                quit_(client)
            assert [reply[:3] == "250" for reply in said] == [name == domain for name in DOMAINS]
        assert len({worker for worker, _ in helper.ends(3)}) == 1


def may_relay(listener: Listening, certificate: str = "client-alice.pem") -> bool:
    """Whether a client with the certificate may send to anybody."""
    return may_send(listener.greeted(), certificate)


def may_send(client: Client, certificate: str) -> bool:
    start_tls(client, cert=certificate)
    assert client.command(b"MAIL FROM:<a@client.example.com>") == "250 ok"
    reply = client.command(b"RCPT TO:<u@elsewhere.example>") or ""
    quit_(client)
    return reply == "250 ok"


@pytest.mark.tls
def test_client_certificates_are_reread(mx: Stage) -> None:
    """Who may relay by them, whom we trust to make them, and which are revoked."""
    dave = "client-revoked.pem"
    with Listening(mx, "-c", "1") as listener:
        assert not may_relay(listener)
        both = "alice@clients.example\ndave@clients.example\n"
        mx.control({"clientca.pem": "@client-ca.pem", "tlsclients": both})
        assert may_relay(listener)
        assert may_relay(listener, dave)
        mx.control({"clientcrl.pem": "@client-crl.pem"})
        assert may_relay(listener)
        assert not may_relay(listener, dave)
        mx.control({"clientcrl.pem": "no list at all\n"})
        assert not may_relay(listener)
        (mx.home / "control" / "clientcrl.pem").unlink()
        mx.control({"tlsclients": "dave@clients.example\n"})
        assert not may_relay(listener)
        assert may_relay(listener, dave)
        mx.control({"clientca.pem": "@server-rsa.pem"})
        assert not may_relay(listener, dave)
        assert len({worker for worker, _ in listener.ends(9)}) == 1


@pytest.mark.tls
def test_who_is_revoked_may_relay_no_more_where_the_connection_was_there_before(mx: Stage) -> None:
    both = "alice@clients.example\ndave@clients.example\n"
    mx.control({"clientca.pem": "@client-ca.pem", "tlsclients": both})
    with Listening(mx, "-c", "2") as listener:
        dave, alice = listener.greeted(), listener.greeted()
        mx.control({"clientcrl.pem": "@client-crl.pem"})
        assert not may_send(dave, "client-revoked.pem")
        assert may_send(alice, "client-alice.pem")


@pytest.mark.parametrize("change", ["rename", "in place", "symbolic link"])
def test_however_a_file_is_changed(mx: Stage, tmp_path: Path, change: str) -> None:
    """Ten times, each time with as many octets as before."""
    me = mx.home / "control" / "me"
    with Listening(mx, "-c", "1") as listener:
        for number in range(10):
            text = f"mx{number}.example.org"
            path = me if change == "in place" else tmp_path / text
            path.write_text(text + "\n")
            if change == "rename":
                path.rename(me)
            elif change == "symbolic link":
                me.unlink()
                me.symlink_to(path)
            client = listener.connect()
            assert client.reply() == f"220 {text} ESMTP"
            client.close()
            listener.ends()


def test_rules_are_seen_by_the_next_connection(mx: Stage, tmp_path: Path) -> None:
    path = compile_rules(tmp_path / "rules.cdb", ":allow\n")
    with Listening(mx, "-c", "1", "-x", str(path)) as listener:
        for relays in (False, True, False):
            compile_rules(path, ':allow,RELAYCLIENT=""\n' if relays else ":allow\n")
            client = listener.greeted()
            client.command(b"MAIL FROM:<a@example.com>")
            reply = client.command(b"RCPT TO:<u@elsewhere.example>") or ""
            assert reply.startswith("250" if relays else "553")
            quit_(client)
        compile_rules(path, ":deny\n")
        assert listener.connect().read_to_end() == b""
