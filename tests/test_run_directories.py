"""The service directories in run, as an administrator starts them, and their rules and logs.

The files are those that `make install` copies.  Only what belongs to the host is exchanged: users,
addresses, the places of qmail and of the rules.
"""

from __future__ import annotations

import os
import re
import smtplib
import ssl
import subprocess
import tempfile
from pathlib import Path

import pytest
from conformance.program import ROOT
from e2e.letter import PASSWORD, RECIPIENT, SENDER, USER
from e2e.maildir import delivery
from e2e.programs import lack, mail_user, need
from e2e.service import ADDRESS, NAME, Service

pytest_plugins = ["e2e.fixtures"]

RUN = ROOT / "run"
PORTS = {"smtp": 25, "submission": 587, "smtps": 465}
RULES = {"smtp": "tcp.smtp", "submission": "tcp.submission", "smtps": "tcp.submission"}
ELSEWHERE = "user@elsewhere.example"

each_service = pytest.mark.parametrize("name", PORTS)


def exchanged(text, exchanges):
    """The text with exchanges, each of which has to be of something that is there."""
    for old, new in exchanges.items():
        assert old in text, old
        text = text.replace(old, str(new))
    return text


class Supplied(Service):
    """A service by one of our run files, behind the rules that we supply for it."""

    def __init__(self, home, name):
        self._name = name
        super().__init__(home, rules=(RUN / RULES[name]).read_text())

    def run_file(self):
        return exchanged(
            (RUN / self._name / "run").read_text(),
            {
                "#!/bin/sh\n": f"#!/bin/sh\nexport QMAILHOME={self.home.path}\n",
                "/usr/local/qmail-smtpd-py/bin": self.home.programs,
                "/var/qmail": self.home.path,
                f"/etc/{RULES[self._name]}.cdb": self.rules,
                "qmaild)": f"{mail_user().pw_name})",
                "tcpserver -v": "tcpserver -1 -v",
                f" 0 {PORTS[self._name]} ": f" {ADDRESS} 0 ",
            },
        )


@pytest.fixture
def serve(home):
    """Start a service of ours; the caller ends it by `with`."""
    need("tcpserver", "softlimit", "tcprules")
    if os.getuid() != 0:
        lack("only root can give a service to another user")
    return lambda name: Supplied(home, name)


@pytest.fixture
def context(trusted):
    """What a client that verifies needs."""
    return ssl.create_default_context(cafile=str(trusted))


def connect(service):
    client = smtplib.SMTP(ADDRESS, service.port, timeout=60)
    client._host = NAME  # whose certificate it is
    return client


def send(client, to=RECIPIENT):
    return client.sendmail(SENDER, to, "Subject: hello\n\nbody\n")


def test_port_25_takes_mail_from_anybody_and_offers_no_auth(serve, home, context):
    with serve("smtp") as service:
        with connect(service) as client:
            client.starttls(context=context)
            client.ehlo()
            assert not client.has_extn("auth")
            send(client)
        assert delivery(home.maildir).recipients == [RECIPIENT]
        assert service.event("mail")["result"] == "accepted"


def test_port_25_relays_by_address(serve, home):
    """The rules that we supply let this host relay, and no other."""
    with serve("smtp") as service, connect(service) as client:
        send(client, ELSEWHERE)
    assert delivery(home.maildir).recipients == [ELSEWHERE]
    rules = [line for line in (RUN / "tcp.smtp").read_text().splitlines() if line[:1] != "#"]
    assert [line for line in rules if line] == ['127.:allow,RELAYCLIENT=""', ":allow"]


def test_port_587_takes_mail_from_users_over_tls_alone(serve, home, context):
    with serve("submission") as service:
        with connect(service) as client:
            client.ehlo()
            assert not client.has_extn("auth")
            with pytest.raises(smtplib.SMTPSenderRefused, match="530"):
                send(client)
            client.starttls(context=context)
            client.ehlo()
            assert client.esmtp_features["auth"].split() == ["LOGIN", "PLAIN"]
            with pytest.raises(smtplib.SMTPSenderRefused, match="530"):
                send(client)
            client.login(USER, PASSWORD)
            send(client, ELSEWHERE)
        with connect(service) as client:
            client.ehlo()
            assert client.docmd("AUTH PLAIN")[0] == 538
            with pytest.raises(smtplib.SMTPServerDisconnected):
                client.noop()
        assert delivery(home.maildir).recipients == [ELSEWHERE]


def test_port_465_takes_mail_from_users_and_begins_with_tls(serve, home, context):
    with serve("smtps") as service:
        context.check_hostname = False  # the client connects to an address
        with smtplib.SMTP_SSL(ADDRESS, service.port, timeout=60, context=context) as client:
            client.ehlo()
            assert not client.has_extn("starttls")
            with pytest.raises(smtplib.SMTPSenderRefused, match="530"):
                send(client)
            client.login(USER, PASSWORD)
            send(client, ELSEWHERE)
        assert delivery(home.maildir).recipients == [ELSEWHERE]


@each_service
def test_the_memory_limit_is_above_what_was_measured(name):
    """What the comment says is needed for TLS, and half as much again for other hosts."""
    text = (RUN / name / "run").read_text()
    (limit,) = re.findall(r"softlimit -m (\d+) ", text)
    (needed,) = re.findall(r"TLS needs (\d+) MB", (RUN / "smtp/run").read_text())
    assert int(limit) >= 1.5 * int(needed) * 10**6


@each_service
def test_a_service_without_its_user_does_not_run_as_root(name):
    text = (RUN / name / "run").read_text().replace("qmaild)", "no-such-user)")
    done = subprocess.run(["sh", "-c", text], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "no-such-user" in done.stderr


@each_service
def test_the_log_goes_to_multilog(name):
    need("multilog", "setuidgid")
    if os.getuid() != 0:
        lack("only root can give a log to another user")
    text = (RUN / name / "log/run").read_text()
    (place,) = re.findall(r"/var/log/qmail/\w+", text)
    assert place in (RUN / name / "run").read_text()
    user = mail_user()
    with tempfile.TemporaryDirectory() as logs:
        os.chown(logs, user.pw_uid, user.pw_gid)
        text = exchanged(text, {place: logs, "qmaill ": f"{user.pw_name} "})
        subprocess.run(["sh", "-c", text], input=b"qmail-smtpd[1]: connect\n", check=True)
        written = Path(logs, "current").read_text()
    assert re.fullmatch(r"@[0-9a-f]{24} qmail-smtpd\[1\]: connect\n", written)


@pytest.mark.parametrize("script", sorted(RUN.glob("**/run")), ids=lambda path: str(path.parent))
def test_run_files_are_programs(script):
    assert os.access(script, os.X_OK)
    subprocess.run(["sh", "-n", script], check=True)
