"""The log: what each session leaves there, what no client can put there, and what never is there.

That every line of ours obeys the grammar is checked wherever a test looks at events.
"""

from __future__ import annotations

import hmac
import re
from base64 import b64decode, b64encode

import pytest
from e2e.clients import netcat, s_client, swaks, swaks_auth
from e2e.letter import HELO, PASSWORD, RECIPIENT, SENDER, USER
from e2e.maildir import deliveries, delivery
from e2e.programs import CHECKOUT
from e2e.service import NAME, RELAY

pytest_plugins = ["e2e.fixtures"]

IN_CLEAR = {"SMTPAUTH": "", "FORCETLS": "0"}


def documented(event):
    """The fields of an event in docs/log.md."""
    text = (CHECKOUT / "docs" / "log.md").read_text()
    (section,) = re.findall(rf"^### {event}\n(.*?)^##", text, re.MULTILINE | re.DOTALL)
    rows = re.findall(r"^\| (`.*?`) \|", section, re.MULTILINE)
    return {"ip", *re.findall(r"`(\w+)`", " ".join(rows)), *re.findall(r" (\w+)=", section)}


def base64(octets):
    return b64encode(octets).decode()


# What is there


def test_story_of_a_session(start, check):
    """Each event once, in order, with the address of the client and the process tcpserver names."""
    service = start(environ={"SMTPAUTH": "!"}, check=check)
    options = ["--tls", "--local-interface", RELAY, *swaks_auth("LOGIN", USER, PASSWORD)]
    assert swaks(service, *options).status == 0
    events = service.events()
    assert [event.name for event in events] == ["connect", "tls", "auth", "mail", "disconnect"]
    pid = service.log.wait_for(r"^tcpserver: ok (\d+) ")[0][1]
    assert {(event.pid, event["ip"]) for event in events} == {(int(pid), RELAY)}
    assert all(set(event.fields) <= documented(event.name) for event in events)
    connect, tls, auth, mail, disconnect = (event.fields for event in events)
    wanted = {"ip": RELAY, "host": "unknown", "local": NAME}
    assert wanted.items() <= connect.items()
    assert (tls["result"], tls["version"], tls["cert"]) == ("ok", "TLSv1.3", "none")
    assert int(tls["bits"]) >= 128
    assert (auth["result"], auth["mechanism"], auth["user"]) == ("ok", "LOGIN", USER)
    wanted = {"result": "accepted", "user": USER, "from": SENDER, "to": RECIPIENT}
    assert wanted.items() <= mail.items()
    assert mail["qp"] == str(delivery(service.home.maildir).qp)
    assert disconnect["why"] == "quit"


@pytest.mark.parametrize(
    ("lines", "event", "why"),
    [
        (["MAIL FROM:<{0}>", "RCPT TO:<x@elsewhere.example>"], "mail", "sorry, that domain isn't"),
        (["MAIL FROM:<bad@example.net>", "RCPT TO:<{1}>"], "mail", "sorry, your envelope sender"),
        (["MAIL FROM:<{0}> SIZE=10000000"], "mail", "sorry, that message size exceeds"),
        (["AUTH PLAIN !!!!"], "auth", "malformed auth input (#5.5.4)"),
    ],
)
def test_refusals(start, home, check, lines, event, why):
    home.control("badmailfrom", "bad@example.net")
    service = start(environ={"DATABYTES": "1000", **IN_CLEAR}, check=check)
    with netcat(service) as client:
        client.reply()
        for line in lines:
            answer = client.say(line.format(SENDER, RECIPIENT))
        client.say("QUIT")
    logged = service.event(event)
    assert logged["code"] == answer[:3]
    assert logged["why"].startswith(why)
    assert set(logged.fields) <= documented(event)


def test_a_client_that_goes_away_in_the_middle_of_a_message(start):
    service = start()
    with netcat(service) as client:
        client.reply()
        client.say(f"MAIL FROM:<{SENDER}>")
        client.say(f"RCPT TO:<{RECIPIENT}>")
        client.say("DATA")
        client.type("Subject: half a message\n\n")
    mail, disconnect = service.events()[1:]
    assert (mail["result"], mail["from"], mail["to"]) == ("cut-off", SENDER, RECIPIENT)
    assert "code" not in mail.fields
    assert disconnect["why"] == "hung up"
    assert deliveries(service.home.maildir) == []


def test_a_client_that_says_nothing(start, home):
    home.control("timeoutsmtpd", "1")
    service = start()
    with netcat(service) as client:
        assert client.reply() == f"220 {NAME} ESMTP"
        assert client.reply() == "451 timeout (#4.4.2)"
    assert service.event("disconnect")["why"] == "timeout"
    service.log.wait_for(r"tcpserver: end \d+ status 256")


# What a client can not put there


FORGERIES = [
    b'x" result=ok user="root',
    b"x\x1b]0;title\x07\x1b[2J",
    b"\xff\xfe\x80 caf\xe9",
    b"back\\slash \\x22",
    b"qmail-smtpd[1]: auth ip=10.9.8.7 result=ok user=root",
    b"x" * 3000,
]


@pytest.mark.parametrize("forgery", FORGERIES)
def test_forged_envelope(start, forgery):
    """HELO, MAIL and RCPT: nothing of it ends a value, and what is not printable is escaped."""
    service = start(environ={"RELAYCLIENT": ""})
    with netcat(service) as client:
        client.reply()
        client.type(b"EHLO " + forgery)
        client.reply()
        for command in (b"MAIL FROM:<%s>", b"RCPT TO:<%s>"):
            client.type(command % forgery)
            client.reply()
        client.say("QUIT")
    check_unforged(service)


@pytest.mark.parametrize("forgery", [*FORGERIES, b"x\nqmail-smtpd[1]: auth ip=10.9.8.7 result=ok"])
def test_forged_user(start, home, forgery):
    """The user of a failed AUTH; here it may have a line feed, which base64 carries."""
    program = home.program("trouble", "exit 111")
    service = start(environ=IN_CLEAR, check=program)
    with netcat(service) as client:
        client.reply()
        client.type("AUTH PLAIN " + base64(b"\0" + forgery + b"\0secret"))
        assert client.reply().startswith("454 oops")
        client.say("QUIT")
    check_unforged(service)
    user = service.event("auth")["user"]
    text = forgery.decode("latin-1")
    assert user == text or user == f"{text[:1200]}...({len(text)} octets)"


def check_unforged(service):
    """All events are of the one session and the one address, and all lines are printable."""
    events = service.events()
    assert {(event.pid, event["ip"]) for event in events} == {(events[0].pid, "127.0.0.1")}
    assert events[0].name, events[-1].name == ("connect", "disconnect")
    assert re.fullmatch(r"[ -~\n]*", service.log.text())
    assert all(len(line) < 4096 for line in service.log.lines())


# What never is there


@pytest.fixture
def recorded(home, programs):
    """The embedded programs, with a record in front of them of what each was started with."""
    records = home.writable("records")

    def recording(name, command):
        lines = [f"cat /proc/$$/{what} >{records}/{name}.{what}" for what in ("environ", "cmdline")]
        return home.program(f"recorded-{name}", "\n".join([*lines, f'exec {command} "$@"']))

    home.use_queue(recording("queue", programs / "qmail-queue-maildir"))
    return recording("check", programs / "checkpassword-users"), records


def say_plain(client):
    """AUTH PLAIN; what of it was secret."""
    response = base64(f"\0{USER}\0{PASSWORD}".encode())
    assert client.say(f"AUTH PLAIN {response}") == "235 ok, go ahead (#2.0.0)"
    return [response]


def say_login(client):
    """AUTH LOGIN."""
    response = base64(PASSWORD.encode())
    client.say(f"AUTH LOGIN {base64(USER.encode())}")
    assert client.say(response) == "235 ok, go ahead (#2.0.0)"
    return [response]


def say_cram_md5(client):
    """AUTH CRAM-MD5 (RFC 2195)."""
    challenge = b64decode(client.say("AUTH CRAM-MD5")[4:])
    digest = hmac.new(PASSWORD.encode(), challenge, "md5").hexdigest()
    response = base64(f"{USER} {digest}".encode())
    assert client.say(response) == "235 ok, go ahead (#2.0.0)"
    return [response, digest, challenge.decode()]


@pytest.mark.parametrize("authenticate", [say_plain, say_login, say_cram_md5])
def test_secrets_are_nowhere(start, recorded, home, authenticate):
    """Not in the log, nor in what /proc shows of any process, nor in the message."""
    program, records = recorded
    service = start(environ={"SMTPAUTH": "!+cram"}, check=program)
    with s_client(service, "-quiet") as client:
        client.reply()
        client.say(f"EHLO {HELO}")
        secrets = [PASSWORD, base64(PASSWORD.encode()), *authenticate(client)]
        process = f"/proc/{service.log.wait_for(r'tcpserver: ok ([0-9]+)')[0][1]}"
        places = {name: read(f"{process}/{name}") for name in ("environ", "cmdline", "comm")}
        client.say(f"MAIL FROM:<{USER}>")
        client.say("RCPT TO:<friend@elsewhere.example>")
        client.say("DATA")
        assert client.say(".").startswith("250 ok ")
        client.say("QUIT")
    places.update((file.name, read(file)) for file in records.iterdir())
    places["message"] = read(*home.maildir.glob("new/*"))
    places["log"] = "\n".join([service.log.text(), *map(str, service.events())])
    assert f"QMAILHOME={home.path}\0" in places["environ"]
    assert "TCPREMOTEIP=127.0.0.1\0" in places["check.environ"]
    assert f"TCPREMOTEINFO={USER}\0" in places["queue.environ"]
    assert f"{program}" in places["check.cmdline"]
    assert [(name, secret) for name in places for secret in secrets if secret in places[name]] == []


def read(path):
    with open(path, "rb") as file:
        return file.read().decode("latin-1")
