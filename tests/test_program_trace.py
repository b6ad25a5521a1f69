"""SMTPTRACE: a session is written down, inside of TLS too, and nothing about that disturbs it."""

from __future__ import annotations

import os
import re
import resource
from pathlib import Path

import pytest
from conformance import logs
from conformance.program import Program
from conformance.stage import Stage
from conformance.world import base64
from listener.listening import Helping, Listening

from qmail_smtpd_py import transcript
from qmail_smtpd_py.transcript import LIMIT, FileTranscript, LogTranscript

pytest_plugins = ["listener.fixtures"]

NOBODY = 65534
PASSWORD = b"Tell-Nobody"
AUTH = b"AUTH PLAIN " + base64(b"\0joe\0" + PASSWORD)


def traces(directory: Path) -> list[Path]:
    return sorted(directory.iterdir(), key=lambda path: path.name)


def lines_of(path: Path) -> list[str]:
    """The lines of a trace without their times, which have to be in order."""
    times, rest = [], []
    for line in path.read_text("ascii").splitlines():
        found = re.fullmatch(r"\+(\d+\.\d{3}) (.*)", line)
        assert found, line
        times.append(float(found[1]))
        rest.append(found[2])
    assert times == sorted(times)
    return rest


@pytest.fixture
def directory(host: Stage) -> Path:
    """Where the host's program writes traces."""
    path = host.home / "traces"
    path.mkdir()
    host.environment({"SMTPTRACE": str(path)})
    return path


# A file for each session


def test_a_session_in_clear(host: Stage, directory: Path) -> None:
    with Program(host) as program:
        client = program.client
        client.reply()
        client.send(b"NOOP\r\nXY\x1b[2J\\\xff x\r\nRCPT TO:<\x07\xe4\r+0.000 server: 250 ok\r\n")
        client.send(AUTH + b"\r\nQUIT\r\n")
        client.read_to_end()
        assert program.wait() == 0
    (path,) = traces(directory)
    assert re.fullmatch(rf"\d+\.\d{{6}}\.{program.pid}\.192\.0\.2\.25", path.name)
    assert path.stat().st_mode & 0o7777 == 0o600
    head, *lines = lines_of(path)
    assert re.fullmatch(r"note: \d{4}-\d\d-\d\d \d\d:\d\d:\d\d UTC, 192\.0\.2\.25", head)
    assert lines == [
        "server: 220 mx.example.org ESMTP",
        "client: NOOP",
        "server: 250 ok",
        "client: (10 octets)",
        "server: 502 unimplemented (#5.5.1)",
        "client: RCPT TO:<\\x07\\xe4\\x0d+0.000 server: 250 ok",
        "server: 503 MAIL first (#5.5.1)",
        "client: AUTH PLAIN (24 octets)",
        "server: 235 ok, go ahead (#2.0.0)",
        "client: QUIT",
        "server: 221 mx.example.org",
    ]


@pytest.mark.tls
@pytest.mark.parametrize("smtps", [False, True])
def test_inside_of_tls(host: Stage, directory: Path, smtps: bool) -> None:
    if smtps:
        host.environment({"SMTPS": "1"})
    with Program(host) as program:
        client = program.client
        if not smtps:
            client.reply()
            client.command(b"STARTTLS")
        assert client.start_tls() == "ok"
        if smtps:
            client.reply()
        assert client.command(b"EHLO client.example.com")
        assert (client.command(AUTH) or "").startswith("235 ")
        for command in (b"MAIL FROM:<a@client.example.com>", b"RCPT TO:<x@elsewhere.example>"):
            assert client.command(command) == "250 ok"
        assert client.command(b"DATA") == "354 go ahead"
        client.command(b"Subject: private\r\n\r\nprivate\r\n.")
        assert client.command(b"QUIT") == "221 mx.example.org"
        program.wait()
    (path,) = traces(directory)
    lines = lines_of(path)
    assert f"note: TLS: {client.cipher}" in lines
    inside = lines[lines.index(f"note: TLS: {client.cipher}") :]
    assert "client: EHLO client.example.com" in inside
    assert "client: AUTH PLAIN (24 octets)" in inside
    assert "client: RCPT TO:<x@elsewhere.example>" in inside
    assert "client: (a message, 26 octets)" in inside
    text = path.read_bytes()
    assert PASSWORD not in text
    assert base64(b"\0joe\0" + PASSWORD)[8:] not in text
    assert b"private" not in text


def test_each_session_has_its_own_file(host: Stage, directory: Path) -> None:
    for number in range(3):
        host.environment({"TCPREMOTEIP": ["192.0.2.1", "2001:db8::1", "../x/\n$"][number]})
        with Program(host) as program:
            program.client.send(b"HELO %d\r\nQUIT\r\n" % number)
            program.client.read_to_end()
    names = [path.name.split(".", 3)[3] for path in traces(directory)]
    assert names == ["192.0.2.1", "2001:db8::1", ".._____"]


def test_a_file_that_is_there_is_not_touched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transcript.time, "time", lambda: 1_700_000_000.5)
    mine = tmp_path / "mine"
    mine.write_text("mine")
    name = f"1700000000.500000.{os.getpid()}.192.0.2.7"
    (tmp_path / name).symlink_to(mine)
    told: list[tuple[str, dict]] = []
    made = FileTranscript(os.fsencode(tmp_path), b"192.0.2.7", lambda *line: told.append(line))
    made.write("client", b"NOOP")
    made.close()
    why = f"cannot write the trace {tmp_path}/{name}: File exists (uid {os.geteuid()})"
    assert told == [("error", {"why": why})]
    assert mine.read_text() == "mine"


def test_a_trace_has_an_end(tmp_path: Path) -> None:
    told: list[object] = []
    made = FileTranscript(os.fsencode(tmp_path), b"192.0.2.7", lambda *line: told.append(line))
    for _ in range(2 * LIMIT // 1000):
        made.write("client", b"\xff" * 5000)
    made.close()
    (path,) = traces(tmp_path)
    assert LIMIT <= path.stat().st_size < LIMIT + 6000
    *_, last, end = path.read_text().splitlines()
    assert last.endswith("\\xff...(5000 octets)")
    assert end.endswith(" note: the rest is left out")
    assert told == []


# What must not disturb


def converses(program: Program) -> list[str]:
    """Have a session with the program; the errors in its log."""
    client = program.client
    assert client.reply() == "220 mx.example.org ESMTP"
    assert client.command(b"HELO x") == "250 mx.example.org"
    assert [client.command(b"VRFY x") for _ in range(30)] == [
        "252 send some mail, i'll try my best"
    ] * 30
    assert client.command(b"QUIT") == "221 mx.example.org"
    assert program.wait() == 0
    return [line.fields["why"] for line in logs.read_all(program.log) if line.event == "error"]


@pytest.mark.parametrize(
    ("place", "why"),
    [("nowhere", "No such file or directory"), ("control/me", "Not a directory")],
)
def test_a_directory_that_is_none(host: Stage, place: str, why: str) -> None:
    host.environment({"SMTPTRACE": place})
    with Program(host) as program:
        (error,) = converses(program)
    assert error.startswith(f"cannot write the trace {place}/")
    assert error.endswith(f": {why} (uid {os.geteuid()})")


def test_a_full_disk(host: Stage, directory: Path) -> None:
    def small_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (300, 300))

    with Program(host, preexec_fn=small_files) as program:
        (error,) = converses(program)
    assert f"cannot write the trace {directory}/" in error
    assert "File too large" in error
    (path,) = traces(directory)
    assert path.stat().st_size == 300


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else")
def test_a_directory_of_somebody_else(tmp_path: Path) -> None:
    told: list[dict] = []
    os.seteuid(NOBODY)
    try:
        made = FileTranscript(os.fsencode(tmp_path), b"192.0.2.7", lambda _, why: told.append(why))
        made.write("client", b"NOOP")
    finally:
        os.seteuid(0)
    (error,) = told
    assert error["why"].endswith(f": Permission denied (uid {NOBODY})")


@pytest.mark.parametrize("value", [None, ""])
def test_it_is_off_unless_it_is_asked_for(host: Stage, value: str | None) -> None:
    if value is not None:
        host.environment({"SMTPTRACE": value})
    before = sorted(host.home.rglob("*"))
    with Program(host) as program:
        assert converses(program) == []
    assert sorted(host.home.rglob("*")) == before
    assert {line.event for line in logs.read_all(program.log)} == {"connect", "disconnect"}


# The log


def test_in_the_log(host: Stage) -> None:
    host.environment({"SMTPTRACE": "=log"})
    with Program(host) as program:
        program.client.reply()
        program.client.command(b'HELO "x" \\ \xff\x1b')
        program.client.command(AUTH)
        program.client.command(b"QUIT")
        program.wait()
    lines = [line.fields for line in logs.read_all(program.log) if line.event == "trace"]
    assert {line["ip"] for line in lines} == {"192.0.2.25"}
    assert [(line["who"], line["text"]) for line in lines] == [
        ("server", "220 mx.example.org ESMTP"),
        ("client", 'HELO "x" \\ \xff\x1b'),
        ("server", "250 mx.example.org"),
        ("client", "AUTH PLAIN (24 octets)"),
        ("server", "235 ok, go ahead (#2.0.0)"),
        ("client", "QUIT"),
        ("server", "221 mx.example.org"),
    ]
    assert PASSWORD not in program.log


def test_in_the_log_too_it_has_an_end() -> None:
    told: list[dict] = []
    made = LogTranscript(lambda _, fields: told.append(fields))
    for _ in range(2 * LIMIT // 1000):
        made.write("client", b"x" * 999)
    assert told.pop() == {"who": "note", "text": b"the rest is left out"}
    assert sum(len(line["text"]) + 1 for line in told) < LIMIT + 1000


# The listener


@pytest.mark.tls
def test_the_listener(mx: Stage) -> None:
    """For one address only, by its rules: by the variable that they set."""
    directory = mx.home / "traces"
    directory.mkdir()
    mx.environment({"SMTPTRACE": str(directory)})
    with Listening(mx) as listener:
        for _ in range(2):
            client = listener.greeted()
            client.command(b"STARTTLS")
            assert client.start_tls() == "ok"
            assert (client.command(AUTH) or "").startswith("235 ")
            client.command(b"QUIT")
            client.read_to_end()
        listener.ends(2)
    for path in traces(directory):
        lines = lines_of(path)
        assert "client: AUTH PLAIN (24 octets)" in lines
        assert lines[-1] == "server: 221 mx.example.org"
    assert len(traces(directory)) == 2


@pytest.mark.tls
def test_a_helper_writes_down_what_it_serves(mx: Stage) -> None:
    directory = mx.home / "traces"
    directory.mkdir()
    mx.environment({"SMTPTRACE": str(directory), "TCPREMOTEIP": "192.0.2.7"})
    path = mx.home / "helper"
    with Helping(mx, path) as helper:
        mx.environment({"TLSHELPER": str(path)})
        with Program(mx) as program:
            program.client.reply()
            program.client.command(b"STARTTLS")
            assert program.client.start_tls() == "ok"
            assert (program.client.command(AUTH) or "").startswith("235 ")
            program.client.command(b"QUIT")
            program.wait()
        ((worker, _),) = helper.ends(1)
    before, behind = traces(directory)
    assert f".{program.pid}." in before.name
    assert lines_of(before)[1:] == [
        *("server: 220 mx.example.org ESMTP", "client: STARTTLS", "server: 220 ready for tls")
    ]
    assert f".{worker}." in behind.name
    assert lines_of(behind)[2:] == [
        "client: AUTH PLAIN (24 octets)",
        "server: 235 ok, go ahead (#2.0.0)",
        "client: QUIT",
        "server: 221 mx.example.org",
    ]
