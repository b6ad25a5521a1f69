"""Log lines: one line an event, and no octet of a value can make a line or a field of its own."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conformance import logs
from conformance.program import ROOT
from e2e.programs import lack
from hypothesis import example, given
from hypothesis import strategies as st

from qmail_smtpd_py import log

F_SETPIPE_SZ = 1031  # fcntl has it from Python 3.10 on

FORGERIES = [
    b"x\nqmail-smtpd[1]: auth result=ok user=root",
    b'x" result="ok',
    b"x result=ok",
    b"x\\x0aauth",
    b"",
    b'"',
    b"\\",
    b"\x00\x1b[2J\x7f\x80\xff",
]

octets = st.one_of(st.binary(max_size=300), st.sampled_from(FORGERIES))


@given(st.dictionaries(st.sampled_from(["why", "user", "helo", "size", "host"]), octets))
def test_fields_read_back(fields: dict[str, bytes]) -> None:
    line = log.format_line("mail", fields)
    read = logs.read(line)
    assert (read.pid, read.event) == (os.getpid(), "mail")
    assert read.fields == {key: value.decode("latin-1") for key, value in fields.items()}


@given(st.lists(octets, min_size=2, max_size=5))
@example([b"a" * 5000, b"b" * 5000, b"\n" * 5000, b'" ' * 2000])
def test_a_line_is_one_line_of_printable_ascii_that_a_pipe_takes_whole(values: list[bytes]) -> None:
    line = log.format_line("mail", {f"field{number}": value for number, value in enumerate(values)})
    assert all(32 <= octet < 127 for octet in line)
    assert len(line) < 4096


def test_a_value_that_is_too_long_is_cut_off_and_says_so() -> None:
    line = log.format_line("mail", {"why": b"x" * 5000, "code": 250})
    assert line.endswith(b'x...(5000 octets)" code=250')
    assert logs.read(line).fields["code"] == "250"


@pytest.mark.parametrize(
    ("value", "written"),
    [
        (b"user@example.org", b"user@example.org"),
        (250, b"250"),
        ("plain", b"plain"),
        (b"two words", b'"two words"'),
        (b"", b'""'),
        (b'say "x"', b'"say \\x22x\\x22"'),
        (b"back\\slash", b'"back\\x5cslash"'),
        (b"\xc3\xa9", b'"\\xc3\\xa9"'),
        ("\N{LATIN SMALL LETTER E WITH ACUTE}", b'"\\xc3\\xa9"'),
        ("\udcff", b'"\\x5cudcff"'),
    ],
)
def test_value(value: object, written: bytes) -> None:
    assert log.format_line("mail", {"to": value}).endswith(b" to=" + written)


def test_a_field_that_is_none_is_left_out() -> None:
    assert logs.read(log.format_line("auth", {"user": None, "code": 535})).fields == {"code": "535"}


def test_a_log_that_takes_nothing_stops_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    full = os.open("/dev/full", os.O_WRONLY)
    monkeypatch.setattr(log, "DESCRIPTOR", full)
    log.write("connect", {})
    os.close(full)
    log.write("connect", {})


def refuse(monkeypatch: pytest.MonkeyPatch, number: int) -> list[object]:
    """Have the write that does not wait fail with this error; what it was asked is kept."""
    asked: list[object] = []

    def fail(*arguments: object) -> int:
        asked.append(arguments)
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(log.os, "pwritev", fail)
    return asked


@pytest.mark.parametrize("length", range(1180, 1201))
def test_a_line_is_not_cut_in_the_middle_of_an_octet(length: int) -> None:
    values = {"a": b"\xff" * length, "b": b"x"}
    shown = log.format_line("mail", values).decode()
    assert shown.endswith('..."')
    start = shown.removesuffix('..."')
    assert re.fullmatch(r'.*a="(\\xff)*', start)


def test_a_line_that_is_written_in_part_is_written_to_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write_in_part(descriptor: int, buffers: tuple[bytes], *_: int) -> int:
        return os.write(descriptor, buffers[0][:30])

    monkeypatch.setattr(log.os, "pwritev", write_in_part)
    with (tmp_path / "log").open("wb") as file:
        monkeypatch.setattr(log, "DESCRIPTOR", file.fileno())
        assert log.write("connect", {"ip": b"192.0.2.1", "host": b"mail.example.org"})
    (line,) = logs.read_all((tmp_path / "log").read_bytes())
    assert line.fields == {"ip": "192.0.2.1", "host": "mail.example.org"}


def test_a_file_that_promises_not_to_wait_and_does_not_keep_it_gets_the_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As XFS, where it would have to note the time of the change."""
    refuse(monkeypatch, errno.EAGAIN)
    with (tmp_path / "log").open("wb") as file:
        monkeypatch.setattr(log, "DESCRIPTOR", file.fileno())
        assert log.write("connect", {})
    assert logs.read_all((tmp_path / "log").read_bytes())[0].event == "connect"


def test_a_descriptor_that_can_not_promise_it_is_asked_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As most file systems, and pipes before Linux 6.4."""
    asked = refuse(monkeypatch, errno.EOPNOTSUPP)
    with (tmp_path / "log").open("wb") as file:
        monkeypatch.setattr(log, "DESCRIPTOR", file.fileno())
        lines = log.Log()
        assert lines.write("connect", {})
        assert lines.write("disconnect", {})
    read = logs.read_all((tmp_path / "log").read_bytes())
    assert [line.event for line in read] == ["connect", "disconnect"]
    assert len(asked) == 1


def test_a_pipe_that_can_not_promise_it_is_asked_whether_it_has_room(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    refuse(monkeypatch, errno.EOPNOTSUPP)
    monkeypatch.setattr(log, "_PATIENCE", 0.01)
    with logs.nobody_reads() as full:
        monkeypatch.setattr(log, "DESCRIPTOR", full)
        takes_more = select.poll()
        takes_more.register(full, select.POLLOUT)
        monkeypatch.setattr(log, "_takes_more", takes_more)
        lines = log.Log()
        assert not lines.write("connect", {})
        assert not lines.write("disconnect", {})


def test_a_trouble_that_passes_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = refuse(monkeypatch, errno.ENOMEM)
    reader, writer = os.pipe()
    with open(reader, "rb"), open(writer, "wb"):
        monkeypatch.setattr(log, "DESCRIPTOR", writer)
        lines = log.Log()
        assert lines.write("connect", {})
        assert lines.write("disconnect", {})
    assert len(asked) == 2


MOVED = """
import os, sys
sys.path += sys.argv[1:]
from qmail_smtpd_py import log
from qmail_smtpd_py.worker import logging_to
lines = log.Log()
with open(os.devnull, "wb") as sink, open("file", "wb") as file:
    for other in (sink, file):
        with logging_to(other.fileno(), lines):
            assert lines.write("connect", {})
        assert not lines.write("connect", {})
"""


def test_what_is_known_of_a_descriptor_is_not_taken_for_another(tmp_path: Path) -> None:
    """Of a file it is known that nobody has to wait for it."""
    with logs.nobody_reads() as full:
        command = [sys.executable, "-c", MOVED, str(ROOT)]
        done = subprocess.run(command, stderr=full, cwd=tmp_path, timeout=30, check=False)
    assert done.returncode == 0
    assert len(logs.read_all((tmp_path / "file").read_bytes())) == 1


TAKEN = """
import sys
sys.path += sys.argv[1:2]
from qmail_smtpd_py import log
from qmail_smtpd_py.worker import logging_to
lines = log.Log()
assert lines.write("connect", {})
with logging_to(int(sys.argv[2]), lines):
    assert not lines.write("connect", {})
assert lines.write("disconnect", {})
"""


def test_nor_is_what_is_known_of_our_own(tmp_path: Path) -> None:
    with logs.nobody_reads() as full, (tmp_path / "file").open("wb") as file:
        command = [sys.executable, "-c", TAKEN, str(ROOT), str(full)]
        subprocess.run(command, stderr=file, pass_fds=[full], timeout=30, check=True)
    read = logs.read_all((tmp_path / "file").read_bytes())
    assert [line.event for line in read] == ["connect", "disconnect"]


HERD = """
import sys, time
sys.path.insert(0, sys.argv[1])
from qmail_smtpd_py import log
end = time.monotonic() + 1.5
while time.monotonic() < end:
    log.write("mail", {"why": b"\\xff" * 1200})  # a line that fills a page
"""


def test_of_many_that_find_room_in_a_pipe_none_waits_for_ever() -> None:
    """The reader takes a little now and then, so that all are told of it, and then nothing."""
    reader, writer = os.pipe()
    fcntl.fcntl(writer, F_SETPIPE_SZ, 4096)
    try:
        os.pwritev(writer, [b"x"], -1, os.RWF_NOWAIT)
    except OSError as error:
        assert error.errno == errno.EOPNOTSUPP
        lack("a kernel that writes to pipes without a wait (Linux 6.4)")
    command = [sys.executable, "-I", "-S", "-c", HERD, str(ROOT)]
    herd = [subprocess.Popen(command, stderr=writer) for _ in range(16)]
    os.close(writer)
    until = time.monotonic() + 1.2
    while time.monotonic() < until:
        os.read(reader, 4096)
        time.sleep(0.001)
    try:
        for process in herd:
            assert process.wait(10) == 0
    finally:
        for process in herd:
            process.kill()
            process.wait()
        os.close(reader)
