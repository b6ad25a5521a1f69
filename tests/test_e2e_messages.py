"""Large messages, octet for octet, and what the limits on their size make of them."""

from __future__ import annotations

import hashlib
import os

import pytest
from e2e.clients import curl, smtplib
from e2e.letter import write_letter
from e2e.maildir import deliveries, delivery

pytest_plugins = ["e2e.fixtures"]

LARGE = 50_000_000
LINE = 990


@pytest.fixture(scope="module")
def large_letter(tmp_path_factory):
    """50 MB of lines of random octets; among so many some begin with a dot."""
    octets = os.urandom(LARGE).translate(None, b"\r\n")
    lines = (octets[at : at + LINE] for at in range(0, len(octets), LINE))
    path = tmp_path_factory.mktemp("large") / "letter"
    yield write_letter(path, b"Subject: large\r\n\r\n" + b"\r\n".join(lines) + b"\r\n")
    path.unlink()


def digest(octets):
    return hashlib.sha256(octets).hexdigest()


@pytest.mark.parametrize("security", ["clear", "TLSv1.2", "TLSv1.3"])
def test_50_megabytes(start, large_letter, trusted, security):
    """Under the memory limit of the run file, which is not much more than twice that."""
    service = start()
    versions = ["--cacert", trusted, f"--{security.lower()}", "--tls-max", security[-3:]]
    ended = curl(service, large_letter, *([] if security == "clear" else ["--ssl-reqd", *versions]))
    assert ended.status == 0, ended.output[-2000:]
    found = delivery(service.home.maildir)
    assert digest(found.data) == digest(large_letter.delivered)
    assert service.event("mail")["size"] == str(len(large_letter.delivered))
    versions = [tls["version"] for tls in service.events("tls")]
    assert versions == ([] if security == "clear" else [security])


def test_size_is_refused_before_the_message_is_sent(start, large_letter):
    """smtplib says how large the message is (RFC 1870) and is told at MAIL."""
    service = start(environ={"DATABYTES": "1000000"})
    assert smtplib(service, large_letter) == {"error": "SMTPSenderRefused", "code": 552}
    assert deliveries(service.home.maildir) == []


def test_a_message_beyond_databytes_is_refused_at_its_end(start, tmp_path):
    """curl says nothing of the size when it reads from a pipe, and is told at the end."""
    service = start(environ={"DATABYTES": "1000"})
    letter = write_letter(tmp_path / "letter", b"Subject: x\r\n\r\n" + 200 * b"0123456\r\n")
    with open(letter.path, "rb") as message:
        ended = curl(service, letter._replace(path="-"), stdin=message)
    assert "< 552 sorry, that message size exceeds my databytes limit (#5.3.4)" in ended.output
    assert deliveries(service.home.maildir) == []
    assert service.event("mail")["code"] == "552"
