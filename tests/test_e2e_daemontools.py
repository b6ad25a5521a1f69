"""The service directories of run/ under daemontools, with what only a real host has changed."""

from __future__ import annotations

import re

import pytest
from e2e.clients import netcat, swaks, swaks_auth
from e2e.letter import PASSWORD, RECIPIENT, SENDER, USER
from e2e.log import parse
from e2e.maildir import deliveries, delivery
from e2e.service import NAME, ShippedService

pytest_plugins = ["e2e.fixtures"]

STRANGER = "someone@elsewhere.example"
AUTH = ["--to", STRANGER, *swaks_auth("PLAIN", USER, PASSWORD)]


@pytest.fixture
def smtp(home):
    with ShippedService(home, "smtp") as service:
        yield service


@pytest.mark.parametrize(
    ("name", "options", "recipient"),
    [
        ("smtp", ["--tls"], RECIPIENT),
        ("submission", ["--tls", *AUTH], STRANGER),
        ("smtps", ["--tls-on-connect", *AUTH], STRANGER),
    ],
)
def test_message_and_log(home, name, options, recipient):
    """What multilog has in its directory afterwards is the story of the session."""
    with ShippedService(home, name) as service:
        ended = swaks(service, *options)
        assert ended.status == 0, ended.output
        service.log.wait_for(r"tcpserver: end \d+ status 0$")
    stamped = (service.logged / "current").read_text().splitlines()
    assert all(re.match(r"@[0-9a-f]{24} ", line) for line in stamped)
    events = [event for event in (parse(line[26:]) for line in stamped) if event]
    auth = [] if name == "smtp" else ["auth"]
    assert [event.name for event in events] == ["connect", "tls", *auth, "mail", "disconnect"]
    found = delivery(home.maildir)
    assert (events[-2]["qp"], events[-2]["to"]) == (str(found.qp), recipient)


@pytest.mark.parametrize("name", ["submission", "smtps"])
def test_nobody_sends_without_authentication(home, name):
    """Not even from this host, and not to this host either."""
    with ShippedService(home, name) as service:
        ended = swaks(service, "--tls" if name == "submission" else "--tls-on-connect")
        assert "530 Authorization required" in ended.output
    assert deliveries(home.maildir) == []


def test_restart_leaves_sessions_alone(smtp, home):
    """`svc -t` ends tcpserver; who is in the middle of a message goes on."""
    with netcat(smtp) as client:
        client.reply()
        client.say(f"MAIL FROM:<{SENDER}>")
        client.say(f"RCPT TO:<{RECIPIENT}>")
        client.say("DATA")
        smtp.restart()
        client.type("Subject: before\n")
        assert client.say(".").startswith("250 ok ")
        assert client.say("QUIT") == f"221 {NAME}"
    assert swaks(smtp, "--data", "Subject: after\\n\\n").status == 0
    subjects = [found.data.split(b"\n")[0] for found in deliveries(home.maildir)]
    assert subjects == [b"Subject: before", b"Subject: after"]
