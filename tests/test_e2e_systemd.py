"""The units for systemd that starts a program for each connection (Accept=yes)."""

from __future__ import annotations

import os
import re
import smtplib
import ssl
import subprocess
from pathlib import Path

import pytest
from e2e.letter import PASSWORD, RECIPIENT, SENDER, USER
from e2e.maildir import delivery
from e2e.programs import lack, need
from e2e.service import ADDRESS
from e2e.systemd import PORTS, PROGRAMS, UNITS, Activated, Manager, values

pytest_plugins = ["e2e.fixtures"]

ELSEWHERE = "user@elsewhere.example"
CLIENT = {"REMOTE_ADDR": "192.0.2.25", "REMOTE_PORT": "4711"}
"""What systemd says of a client."""


@pytest.fixture
def context(trusted):
    """What a client that verifies needs, which knows the server by an address."""
    context = ssl.create_default_context(cafile=str(trusted))
    context.check_hostname = False
    return context


def connect(port, address=ADDRESS):
    return smtplib.SMTP(address, port, timeout=60)


def send(client, to=RECIPIENT):
    return client.sendmail(SENDER, to, "Subject: hello\n\nbody\n")


# systemd-socket-activate


def test_port_25(home):
    with Activated(home, "smtpd", CLIENT) as service, connect(service.port) as client:
        client.ehlo("client.example.net")
        assert not client.has_extn("auth")
        assert client.has_extn("starttls")
        send(client)
        with pytest.raises(smtplib.SMTPRecipientsRefused, match="553"):
            send(client, ELSEWHERE)
        client.quit()
        begin, *_ = events = service.events()
    assert (begin["ip"], begin["local"]) == ("192.0.2.25", "mx.example.org")
    assert begin["port"] == str(service.port)
    assert {event["ip"] for event in events} == {"192.0.2.25"}
    assert events[-1]["why"] == "quit"
    found = delivery(home.maildir)
    assert found.recipients == [RECIPIENT]
    assert "from unknown (HELO client.example.net) (192.0.2.25) by mx.example.org" in found.received


def test_port_587(home, context):
    with Activated(home, "submission", CLIENT) as service, connect(service.port) as client:
        client.ehlo()
        assert not client.has_extn("auth")
        client.starttls(context=context)
        with pytest.raises(smtplib.SMTPSenderRefused, match="530"):
            send(client)
        client.login(USER, PASSWORD)
        send(client, ELSEWHERE)
        client.quit()
        assert [event["ip"] for event in service.events("auth")] == ["192.0.2.25"]
    assert delivery(home.maildir).recipients == [ELSEWHERE]


def test_port_465(home, context):
    with Activated(home, "smtps", CLIENT) as service:
        with smtplib.SMTP_SSL(ADDRESS, service.port, timeout=60, context=context) as client:
            with pytest.raises(smtplib.SMTPSenderRefused, match="530"):
                send(client)
            client.login(USER, PASSWORD)
            send(client, ELSEWHERE)
        assert service.event("tls")["result"] == "ok"
    assert delivery(home.maildir).recipients == [ELSEWHERE]


def test_over_ipv6(home):
    with Activated(home, "smtpd", {"REMOTE_ADDR": "2001:db8::25"}, address="::1") as service:
        with connect(service.port, "::1") as client:
            send(client)
        assert service.event("connect")["ip"] == "2001:db8::25"
    assert "(2001:db8::25)" in delivery(home.maildir).received


# What qmail-queue and filters are told, and who tells it

TOLD = (
    ("PROTO", "TCPREMOTEIP", "TCPREMOTEPORT", "TCPREMOTEHOST", "TCPREMOTEINFO"),
    ("TCPLOCALIP", "TCPLOCALPORT"),
)


@pytest.mark.parametrize(
    ("environ", "remote"),
    [
        (CLIENT, ["TCP", "192.0.2.25", "4711", None, None]),
        ({"REMOTE_ADDR": "2001:db8::25"}, ["TCP6", "2001:db8::25", None, None, None]),
        ({**CLIENT, "TCPREMOTEIP": "192.0.2.26"}, [None, "192.0.2.26", None, None, None]),
        ({"REMOTE_ADDR": ""}, [None] * 5),
        ({}, [None] * 5),
    ],
    ids=["IPv4", "IPv6", "a launcher has told", "empty", "gone already"],
)
def test_the_variables_of_tcpserver(home, environ, remote):
    """A launcher that tells the client's address is believed, and REMOTE_ADDR not beside it."""
    tell = home.writable("told") / "environ"
    home.use_queue(home.program("tell", f"env -0 >{tell}; cat <&0 >/dev/null; cat <&1 >/dev/null"))
    with Activated(home, "smtpd", environ) as service, connect(service.port) as client:
        send(client)
    told = dict(line.split("=", 1) for line in tell.read_text().split("\0") if line)
    assert [told.get(name) for name in TOLD[0]] == remote
    is_ours = remote[0] is not None
    local = [ADDRESS, str(service.port)] if is_ours else [None, None]
    assert [told.get(name) for name in TOLD[1]] == local


# A real systemd


@pytest.fixture
def manager(home):
    if os.getuid() != 0:
        lack("only root can have a /run of its own")
    with Manager(home) as running:
        yield running


def facts(pid):
    """What the kernel says of a process."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return dict(line.split(":\t", 1) for line in lines)


def test_under_a_real_systemd(manager, home, context):
    """All three ports; the client's address is systemd's word; a session that ended is gone."""
    with connect(manager.ports["smtpd"]) as client:
        send(client, ELSEWHERE)  # as the environment file says
        (first, *_) = manager.log("smtpd")
        (pid,) = re.findall(r"qmail-smtpd\[(\d+)\]: connect ", first)
        assert facts(pid)["NoNewPrivs"] == "0", "a set-user-id qmail-queue would not be one"
        assert facts(pid)["Uid"].split()[0] != "0"
        limits = Path(f"/proc/{pid}/limits").read_text()
        assert re.search(r"^Max address space +67108864 ", limits, re.M)
        assert "qmail-smtpd@" in manager.control("list-units", "--all", "--plain", "qmail-*")
    with connect(manager.ports["submission"]) as client:
        client.starttls(context=context)
        client.login(USER, PASSWORD)
        assert client.mail(SENDER)[0] == 250
        client.close()  # without a word
    with smtplib.SMTP_SSL(ADDRESS, manager.ports["smtps"], timeout=60, context=context) as client:
        client.login(USER, PASSWORD)
    for name, why in {"smtpd": "quit", "submission": "hung up", "smtps": "quit"}.items():
        events = manager.wait_for_disconnect(name)
        assert {event["ip"] for event in events} == {ADDRESS}
        assert events[-1]["why"] == why
    found = delivery(home.maildir)
    assert found.recipients == [ELSEWHERE]
    assert f"({ADDRESS}) by mx.example.org with" in found.received
    manager.wait_until_gone("qmail-*@*.service")


# The units


def ours():
    return sorted(path for path in UNITS.iterdir() if "listen" not in path.name)


def test_each_port_has_its_units():
    expected = {f"qmail-{name}{end}" for name in PORTS for end in (".socket", "@.service")}
    assert {path.name for path in ours()} == expected
    for name, port in PORTS.items():
        text = (UNITS / f"qmail-{name}.socket").read_text()
        assert values(text, "ListenStream") == [[str(port)]]
        assert values(text, "Accept") == [["yes"]]


def test_the_units_of_all_ports_are_hardened_in_the_same_way():
    texts = [path.read_text() for path in ours() if path.suffix == ".service"]
    tails = {text.partition("StandardInput=")[2] for text in texts}
    assert len(tails) == 1
    (tail,) = tails
    settings = [line for line in tail.splitlines() if line and not line.startswith("#")]
    assert "NoNewPrivileges=yes" not in settings


def test_systemd_understands_the_units(home, tmp_path):
    """With paths, and a user, that this host has."""
    (analyze,) = need("systemd-analyze")
    for path in UNITS.iterdir():
        text = path.read_text().replace(PROGRAMS, str(home.programs)).replace("=qmaild", "=root")
        (tmp_path / path.name).write_text(text.replace("=nofiles", "=root"))
    units = [
        tmp_path / path.name.replace("@.", "@25." if "listen" in path.name else "@x.")
        for path in UNITS.iterdir()
    ]
    done = subprocess.run(
        [analyze, "verify", "--man=no", *units], capture_output=True, text=True, check=False
    )
    complaints = [line for line in done.stderr.splitlines() if "qmail" in line]
    assert complaints == []
