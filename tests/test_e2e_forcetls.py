"""A server that forces TLS: nobody is tempted to send a password in clear, and nobody gets anywhere
who does.
"""

from __future__ import annotations

import pytest
from e2e.clients import netcat, swaks, swaks_auth
from e2e.letter import HELO, PASSWORD, USER
from e2e.maildir import deliveries, delivery
from e2e.transcript import Transcript

pytest_plugins = ["e2e.fixtures"]

REFUSAL = "538 auth not available without TLS (#5.3.3)"


@pytest.fixture
def checked(home, check):
    """A check program that leaves a trace of each run before it becomes the embedded one."""
    traces = home.writable("traces")
    program = home.program("check", f': >"{traces}/$$"\nexec {check} "$@"')
    return program, traces


@pytest.fixture
def forced(start, checked):
    """A server that forces TLS, and how often its check program was run."""
    program, traces = checked

    def start_forced(**environ):
        service = start(environ={"SMTPAUTH": "!", **environ}, check=program)
        return service, lambda: len(list(traces.iterdir()))

    return start_forced


@pytest.mark.parametrize("name", ["forcetls-telnet", "forcetls-telnet-mail", "forcetls-rude-plain"])
def test_transcript_in_clear(forced, home, name):
    service, checks = forced()
    transcript = Transcript(name)
    assert transcript.replay(service) == transcript.printed()
    service.events()
    assert checks() == 0
    assert deliveries(home.maildir) == []


def test_transcript_of_swaks(forced, home):
    """No AUTH is offered, and so no password is sent."""
    service, checks = forced()
    transcript = Transcript("forcetls-swaks")
    printed = transcript.replay(service)
    assert printed == transcript.printed()
    assert "*** Host did not advertise authentication" in printed
    assert [event.name for event in service.events()] == ["connect", "disconnect"]
    assert checks() == 0


def test_transcript_of_swaks_with_tls(forced, home):
    """And with TLS it works, so the transcripts before it are of a server that could."""
    service, checks = forced()
    transcript = Transcript("forcetls-swaks-tls")
    assert transcript.replay(service) == transcript.printed()
    assert service.event("auth")["user"] == USER
    assert checks() == 1
    found = delivery(home.maildir)
    assert (found.recipients, found.data) == (["friend@example.net"], b"Subject: hello\n\nHello.\n")


@pytest.mark.parametrize("value", [None, "", "1", "yes"])
def test_only_0_turns_it_off(forced, value):
    """It is in force with any other value, and where it is unset."""
    service, checks = forced(**({} if value is None else {"FORCETLS": value}))
    with netcat(service) as client:
        client.reply()
        assert "AUTH" not in client.say(f"EHLO {HELO}")
        assert client.say("AUTH PLAIN") == REFUSAL
        assert client.end() == b""
    assert service.event("auth")["why"] == "AUTH without TLS"
    assert checks() == 0


def test_0_turns_it_off(forced):
    service, checks = forced(FORCETLS="0")
    ended = swaks(service, *swaks_auth("PLAIN", USER, PASSWORD))
    assert ended.status == 0, ended.output
    assert "<-  250-AUTH LOGIN PLAIN" in ended.output
    assert service.event("auth")["tls"] == "no"
    assert checks() == 1


@pytest.mark.parametrize("mechanism", ["LOGIN", "PLAIN", "CRAM-MD5", "GSSAPI"])
def test_a_rude_client_that_does_not_wait(forced, home, mechanism):
    """It sends the password behind AUTH in the same write: it gets one reply and no more."""
    service, checks = forced(SMTPAUTH="!+cram")
    with netcat(service) as client:
        client.reply()
        client.say(f"EHLO {HELO}")
        client.type(f"AUTH {mechanism}\nYWxpY2U=\nc2VzYW1l\nMAIL FROM:<{USER}>\nQUIT")
        assert client.end() == f"{REFUSAL}\r\n".encode()
    disconnect = service.event("disconnect")
    assert disconnect["why"] == "closed"
    service.log.wait_for(r"tcpserver: end \d+ status 256")
    assert checks() == 0
