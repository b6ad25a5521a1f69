"""Filters in the place of qmail-queue: what they learn of the client, and what it learns of them.

The filter here is a shell script in the way of simscan: it reads the message from descriptor 0,
looks at it, and either writes its words and exits 82, or hands all of it to the queue program
behind it.
"""

from __future__ import annotations

import os

import pytest
from conformance import logs
from conformance.client import Client
from conformance.program import Program
from conformance.stage import Stage
from listener.listening import Listening

AUTH = b"AUTH PLAIN AGpvZQBzZWNyZXQ="  # joe
NAMES = ("SMTPAUTHUSER", "SMTP_AUTH_USER", "SMTPAUTHMETHOD")

SIMSCAN = """\
#!/bin/sh
work=$(mktemp -d {directory}/work.XXXXXX) || exit 71
trap 'rm -rf "$work"' EXIT
cat >"$work/message" || exit 54
if grep -q VIRUS "$work/message"; then
    name=$(sed -n 's/^X-Name: //p' "$work/message")
    printf 'DYour email was rejected because it contains the %s virus\\n' "$name" >&{descriptor}
    exit 82
fi
if grep -q BUSY "$work/message"; then
    printf 'Zclamd does not answer (#4.3.0)' >&{descriptor}
    exit 88
fi
{queue} <"$work/message" 4>&- 6>&-
"""


@pytest.fixture
def filtering(host: Stage) -> Stage:
    """A host whose QMAILQUEUE is a simscan, with the stand-in for qmail-queue behind it."""
    put_filter(host, "simscan")
    return host


def put_filter(host: Stage, name: str, descriptor: int = 4) -> None:
    path = host.tools / name
    queue = host.tools / "qmail-queue"
    path.write_text(SIMSCAN.format(directory=host.tools, queue=queue, descriptor=descriptor))
    path.chmod(0o755)
    host.env["QMAILQUEUE"] = str(path)


def hello(program: Program) -> Client:
    assert program.client.reply() == "220 mx.example.org ESMTP"
    return program.client


def deliver(client: Client, text: bytes, sender: bytes = b"a@client.example.com") -> str:
    """The reply to a message."""
    assert client.command(b"MAIL FROM:<" + sender + b">") == "250 ok"
    assert client.command(b"RCPT TO:<user@example.org>") == "250 ok"
    assert client.command(b"DATA") == "354 go ahead"
    return client.command(text + b"\r\n.") or ""


VIRUS = b"X-Name: Eicar-Test\r\n\r\nVIRUS"
REFUSED = "554 Your email was rejected because it contains the Eicar-Test virus"


def test_a_filter_has_words_of_its_own(filtering: Stage) -> None:
    with Program(filtering) as program:
        client = hello(program)
        assert deliver(client, VIRUS) == REFUSED
        assert deliver(client, b"\r\nBUSY") == "451 clamd does not answer (#4.3.0)"
        assert deliver(client, b"\r\nhello").startswith("250 ok ")
        assert client.command(b"QUIT") == "221 mx.example.org"
        assert program.wait() == 0
    (delivery,) = filtering.deliveries()
    assert delivery.read[0].endswith(b"\n\nhello\n")
    assert delivery.read[1] == b"Fa@client.example.com\0Tuser@example.org\0\0"
    mails = [line.fields for line in logs.read_all(program.log) if line.event == "mail"]
    assert [(mail["result"], mail["code"]) for mail in mails] == [
        ("refused", "554"),
        ("refused", "451"),
        ("accepted", "250"),
    ]
    assert mails[0]["why"] == REFUSED[4:]
    assert not list(filtering.tools.glob("work.*")), "the filter was cut off"


def test_what_a_sender_puts_into_a_filters_words_is_one_line_of_text(filtering: Stage) -> None:
    """The name of the virus is the sender's choice."""
    with Program(filtering) as program:
        client = hello(program)
        forged = b"X-Name: x\r250 ok 1 qp 1\x1b[0m\xff\r\nX-Name: 221 bye\r\n\r\nVIRUS"
        said = deliver(client, forged)
        assert said.startswith(
            "554 Your email was rejected because it contains the x 250 ok 1 qp 1?[0m?"
        )
        assert said.endswith("221 bye virus")
        assert client.command(b"NOOP") == "250 ok"


def test_a_filter_behind_the_listener(filtering: Stage) -> None:
    """One worker, many messages: each text is of its own message, and no pipe is left."""
    descriptors = set()
    with Listening(filtering, "-c", "1") as listener:
        for number in range(10):
            client = listener.greeted()
            name = b"X-Name: number-%d\r\n\r\n" % number
            assert f" number-{number} virus" in deliver(client, name + b"VIRUS")
            assert deliver(client, b"\r\nhello").startswith("250 ok ")
            (worker,) = listener.workers
            descriptors.add(len(os.listdir(f"/proc/{worker}/fd")))
            assert client.command(b"QUIT") == "221 mx.example.org"
            listener.ends()
    assert len(descriptors) == 1
    assert len(filtering.deliveries()) == 10


CHOICES = {
    ("simscan", None): True,
    ("simscan", ""): True,
    ("simscan", "1"): True,
    ("simscan", "0"): False,
    ("qmail-scanner-queue.pl", None): True,
    ("qmail-qfilter", None): True,
    ("my-filter", None): False,
    ("my-filter", "0"): False,
    ("my-filter", "1"): True,
}


@pytest.mark.parametrize(("name", "variable"), CHOICES)
def test_who_is_asked_for_words(host: Stage, name: str, variable: str | None) -> None:
    """Without the pipe, what it writes goes nowhere, and the exit status is what it is."""
    put_filter(host, name, descriptor=6)
    if variable is not None:
        host.environment({"QMAILQUEUE_CUSTOM_ERROR": variable})
    with Program(host) as program:
        answer = deliver(hello(program), VIRUS)
    refused = "451 qq temporary problem (#4.3.0)"
    assert answer == (REFUSED if CHOICES[name, variable] else refused)


@pytest.mark.tls
def test_a_filter_learns_who_has_authenticated(filtering: Stage) -> None:
    """And only of those who have: what the program was started with is nobody's word for it."""
    filtering.environment(dict.fromkeys(NAMES, "mallory"))
    with Program(filtering) as program:
        client = hello(program)
        assert deliver(client, b"\r\nstranger").startswith("250 ok ")
        assert client.command(AUTH) == "235 ok, go ahead (#2.0.0)"
        assert deliver(client, b"\r\njoe").startswith("250 ok ")
        assert client.command(b"STARTTLS") == "220 ready for tls"
        assert client.start_tls() == "ok"
        assert deliver(client, b"\r\nstranger").startswith("250 ok ")
        client.send(b"AUTH LOGIN am9l\r\nc2VjcmV0\r\n")
        assert (client.reply(), client.reply()) == (
            "334 UGFzc3dvcmQ6",
            "235 ok, go ahead (#2.0.0)",
        )
        assert deliver(client, b"\r\njoe").startswith("250 ok ")
    learnt = [[delivery.environ.get(name) for name in NAMES] for delivery in filtering.deliveries()]
    nobody = [None, None, None]
    assert learnt == [nobody, ["joe", "joe", "plain"], nobody, ["joe", "joe", "login"]]
    for check in filtering.checks():
        assert not set(NAMES) & check.environ.keys()
    for record in (*filtering.checks(), *filtering.deliveries()):
        assert "secret" not in " ".join(record.environ.values())


def test_a_user_sends_as_nobody_else(host: Stage) -> None:
    host.environment({"FORCEAUTHMAILFROM": "1"})
    with Program(host) as program:
        client = hello(program)
        assert deliver(client, b"\r\nstranger", b"ann@example.com").startswith("250 ok ")
        assert client.command(AUTH) == "235 ok, go ahead (#2.0.0)"
        for sender in (b"ann@example.com", b"joe@example.com", b""):
            refused = "503 from and auth not the same (#5.5.1)"
            assert client.command(b"MAIL FROM:<" + sender + b">") == refused
            assert client.command(b"RCPT TO:<user@example.org>") == "503 MAIL first (#5.5.1)"
        assert deliver(client, b"\r\nhello", b"Joe").startswith("250 ok ")


HOSTS = {"": "client.example.com (HELO laptop) (joe@192.0.2.25)", "1": "unknown (joe@unknown)"}


@pytest.mark.parametrize("hide_host", HOSTS)
def test_where_a_user_is_can_be_hidden(host: Stage, hide_host: str) -> None:
    """From whom the message goes to, and not from the log."""
    host.environment({"HIDE_HOST": hide_host})
    with Program(host) as program:
        client = hello(program)
        assert client.command(b"HELO laptop") == "250 mx.example.org"
        assert client.command(AUTH) == "235 ok, go ahead (#2.0.0)"
        assert deliver(client, b"\r\nhello").startswith("250 ok ")
    (delivery,) = host.deliveries()
    field = delivery.read[0].partition(b"\n\n")[0].decode()
    assert field.startswith(f"Received: from {HOSTS[hide_host]}\n  by mx.example.org with ESMTPA; ")
    assert all(line.fields["ip"] == "192.0.2.25" for line in logs.read_all(program.log))
