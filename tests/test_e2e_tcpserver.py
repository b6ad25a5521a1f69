"""What the run file promises: tcprules, rights and limits, also with many clients at once."""

from __future__ import annotations

import re

import pytest
from e2e.clients import curl, netcat, smtp_source, swaks
from e2e.letter import HELO, RECIPIENT, SENDER
from e2e.maildir import deliveries, delivery
from e2e.programs import mail_user
from e2e.service import DENIED, MEMORY, MUST_AUTHENTICATE, NO_AUTH, RELAY

pytest_plugins = ["e2e.fixtures"]

STRANGER = "someone@elsewhere.example"


def test_rcpthosts_and_relayclient_by_address(start):
    service = start()
    refused = swaks(service, "--to", STRANGER)
    assert "<** 553 sorry, that domain isn't in my list of allowed rcpthosts" in refused.output
    relayed = swaks(service, "--to", STRANGER, "--local-interface", RELAY)
    assert relayed.status == 0, relayed.output
    found = delivery(service.home.maildir)
    assert found.recipients == [STRANGER]
    assert f"({RELAY})" in found.received
    assert [mail["ip"] for mail in service.events("mail", sessions=2)] == ["127.0.0.1", RELAY]


def test_denied_address(start, letter):
    service = start()
    ended = curl(service, letter, "--interface", DENIED)
    assert ended.status != 0
    assert "< 220" not in ended.output
    service.log.wait_for(rf"tcpserver: deny \d+ .*:{DENIED}:")
    assert service.events() == []


def test_smtpauth_by_address(start, check):
    service = start(environ={"SMTPAUTH": "", "FORCETLS": "0"}, check=check)
    assert "<-  250-AUTH LOGIN PLAIN" in swaks(service, "--quit-after", "EHLO").output
    without = swaks(service, "--quit-after", "EHLO", "--local-interface", NO_AUTH)
    assert "250-8BITMIME" in without.output
    assert "AUTH" not in without.output
    refused = swaks(service, "--local-interface", MUST_AUTHENTICATE)
    assert " -> MAIL FROM:<sender@example.net>\n<** 530 Authorization required" in refused.output


def test_rights_and_memory_limit(start):
    """Seen in /proc while the session is open."""
    service = start()
    with netcat(service) as client:
        client.reply()
        pid = service.log.wait_for(r"tcpserver: ok (\d+)")[0][1]
        with open(f"/proc/{pid}/status") as status, open(f"/proc/{pid}/limits") as limits:
            facts, limit = status.read(), limits.read()
        client.say("QUIT")
    user = mail_user()
    assert re.search(r"^Uid:\t(.*)$", facts, re.MULTILINE)[1].split() == [str(user.pw_uid)] * 4
    assert re.search(r"^Gid:\t(.*)$", facts, re.MULTILINE)[1].split() == [str(user.pw_gid)] * 4
    assert re.search(r"^Max address space +(\d+)", limit, re.MULTILINE)[1] == str(MEMORY)


def test_queue_has_the_rights_of_the_mail_user(start):
    service = start()
    assert swaks(service).status == 0
    assert delivery(service.home.maildir).uid == mail_user().pw_uid


def test_concurrency_limit(start):
    """The third client is let in when one of two has gone, and not before."""
    service = start(concurrency=2)
    with netcat(service) as first, netcat(service) as second:
        assert first.reply() == second.reply() == "220 mail.example.org ESMTP"
        service.log.wait_for("tcpserver: status: 2/2")
        with netcat(service) as third:
            first.say("QUIT")
            assert third.reply() == "220 mail.example.org ESMTP"
            third.say("QUIT")
        second.say("QUIT")
    service.events(sessions=3)
    story = re.findall(r"^tcpserver: status: (\d)/2|: (connect) ", service.log.text(), re.MULTILINE)
    assert max(int(status) for status, _ in story if status) == 2
    running = re.findall(r": (connect|disconnect) ", service.log.text())
    assert running[:4] == ["connect", "connect", "disconnect", "connect"]


def numbered(count):
    """What smtp-source calls so many recipients: older versions and newer ones."""
    local_part, _, domain = RECIPIENT.partition("@")
    older = (f"{number}{RECIPIENT}" for number in range(1, count + 1))
    newer = (f"{local_part}{number}@{domain}" for number in range(count))
    return sorted(older), sorted(newer)


def test_many_at_once_are_each_queued_once(start):
    """Postfix's smtp-source: 300 messages, 20 sessions at a time, where 8 may run."""
    service = start(concurrency=8)
    ended = smtp_source(service, "-s", 20, "-m", 300, "-l", 2000, "-N")
    assert (ended.status, ended.output) == (0, "")
    found = deliveries(service.home.maildir)
    assert sorted(message.recipients[0] for message in found) in numbered(300)
    assert {message.sender for message in found} == {SENDER}
    mails = service.events("mail", sessions=300)
    assert {mail["result"] for mail in mails} == {"accepted"}
    queued = sorted((mail["qp"], mail["to"]) for mail in mails)
    assert queued == sorted((str(message.qp), message.recipients[0]) for message in found)
    busy = service.log.wait_for(r"tcpserver: status: (\d+)/8", count=300)
    assert max(int(status[1]) for status in busy) == 8


def test_many_messages_in_one_session(start):
    """smtp-source again, which now keeps its two sessions for 40 messages."""
    service = start()
    ended = smtp_source(service, "-d", "-s", 2, "-m", 40, "-N")
    assert (ended.status, ended.output) == (0, "")
    found = sorted(message.recipients[0] for message in deliveries(service.home.maildir))
    assert found in numbered(40)
    assert len(service.events("connect", sessions=2)) == 2


@pytest.mark.parametrize("options", [[], ["--tls"]], ids=["clear", "tls"])
def test_swaks_pipelining(start, options):
    service = start()
    ended = swaks(service, "--pipeline", "--to", f"{RECIPIENT},other@example.org", *options)
    assert ended.status == 0, ended.output
    arrow = "~" if options else "-"
    answers = "\n".join([f"<{arrow}  250 ok"] * 3 + [f"<{arrow}  354 go ahead"])
    assert f" {arrow}> DATA\n{answers}" in ended.output
    assert delivery(service.home.maildir).recipients == [RECIPIENT, "other@example.org"]


def test_a_whole_session_in_one_write(start):
    """Nothing that came behind a message or a refusal is lost, and each has its reply, in order."""
    service = start()
    transaction = f"MAIL FROM:<{SENDER}>\nRCPT TO:<{STRANGER}>\nRCPT TO:<{RECIPIENT}>\nDATA\n"
    with netcat(service) as client:
        client.reply()
        client.type(f"EHLO {HELO}\n" + 2 * f"{transaction}Subject: x\n\nx\n.\n" + "QUIT")
        client.end()
    replies = re.findall(rb"^(\d{3}) ", client.printed, re.MULTILINE)
    assert replies == [b"220", b"250", *2 * [b"250", b"553", b"250", b"354", b"250"], b"221"]
    assert [found.data for found in deliveries(service.home.maildir)] == 2 * [b"Subject: x\n\nx\n"]
