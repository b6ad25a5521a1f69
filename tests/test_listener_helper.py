"""The warm helper: programs under tcpserver hand their connections over at STARTTLS."""

from __future__ import annotations

import array
import contextlib
import os
import random
import shutil
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conformance import cases, logs
from conformance.cases import Case
from conformance.client import Client
from conformance.play import compare_records, play
from conformance.program import Program, under_test
from conformance.stage import Record, Stage
from conformance.words import Words
from listener.listening import PATIENCE, Helping, Tcp, children, eventually, refusal
from listener.mail import authenticate, begin_message, quit_, send_message, start_tls
from listener.peers import Tcpserver
from listener.world import need_root

from qmail_smtpd_py import handover, sockets
from qmail_smtpd_py.options import Options

pytestmark = pytest.mark.tls
pytest_plugins = ["listener.fixtures"]

CASES = [pytest.param(case, id=case.name) for case in cases.ALL if case.uses_tls]


@pytest.fixture
def helper(mx: Stage) -> Iterator[Helping]:
    """A helper that the programs of the host know of."""
    with helping(mx) as running:
        yield running


def helping(mx: Stage, *options: str) -> Helping:
    path = mx.home / "helper"
    mx.environment({"TLSHELPER": str(path)})
    return Helping(mx, path, *options)


def greeted(program: Program) -> Client:
    assert program.client.reply() == "220 mx.example.org ESMTP"
    return program.client


def served(helper: Helping, count: int = 1) -> int:
    """Wait until the helper has served so many more sessions; the last one's worker."""
    return helper.ends(count)[-1][0]


# What a client sees


@pytest.fixture(scope="module")
def helper_of_cases(
    recorder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Helping]:
    """A helper with one worker, in an environment that has nothing of a case's."""
    directory = tmp_path_factory.mktemp("helper")
    stage = Stage(directory, recorder)
    stage.control({"me": "helper.example\n"})
    del stage.env["QMAILQUEUE"]
    with Helping(stage, directory / "socket", "-c", "1", "--max-use=100000") as running:
        yield running


@pytest.mark.parametrize("case", CASES)
def test_dialogue(case: Case, helper_of_cases: Helping, tmp_path: Path, recorder: Path) -> None:
    stage = Stage.of(case, tmp_path, recorder)
    words = Words(stage.env, time.time(), stage.queued_by)
    stage.environment({"TLSHELPER": str(helper_of_cases.path)})
    with Program(stage) as program:
        play(case, program.client, words)
        assert program.wait() == case.status
    cipher = program.client.cipher
    compare_records(case, stage.deliveries(), stage.checks(), stage.programs, words, cipher)
    handshakes = [line.pid for line in logs.read_all(program.log) if line.event == "tls"]
    assert program.pid not in handshakes


# What the programs behind it see


def outcome(mx: Stage, smtps: bool = False) -> tuple[list[Record], bytes]:
    """A whole session under TLS: what the stand-ins were given, and the log."""
    with Program(mx) as program:
        if smtps:
            assert program.client.start_tls() == "ok"
        client = greeted(program)
        if not smtps:
            start_tls(client)
        authenticate(client)
        send_message(client)
        assert client.command(b"QUIT") == "221 mx.example.org"
        assert program.wait() == 0
    return [*mx.checks()[-1:], *mx.deliveries()[-1:]], program.log


@pytest.mark.parametrize("smtps", [False, True], ids=["STARTTLS", "SMTPS"])
def test_environment_and_arguments_arrive_as_they_are(mx: Stage, smtps: bool) -> None:
    mx.environment(
        {
            "ODD": "a=b\nc=\x01\xff\xe9 \\ '\"",
            "EMPTY": "",
            "LONG": "x" * 100_000,
            "TCPREMOTEIP": "192.0.2.7",
            "TCPREMOTEINFO": "ident",
        }
    )
    if smtps:
        mx.environment({"SMTPS": "1"})
    mx.arguments("@checkpassword", "@true", "", "two words", "\udcff\n")
    without, _ = outcome(mx, smtps)
    with helping(mx) as helper:
        with_helper, _ = outcome(mx, smtps)
        served(helper)
    for ours, theirs in zip(with_helper, without):
        assert ours.argv == theirs.argv
        assert ours.environ == {**theirs.environ, "TLSHELPER": str(helper.path)}
        assert ours.descriptors.keys() == theirs.descriptors.keys()
        assert ours.read.keys() == theirs.read.keys()


def test_the_log_is_the_program_s(mx: Stage, helper: Helping) -> None:
    _, log = outcome(mx)
    worker = served(helper)
    lines = log.decode().splitlines()
    events = [line.split()[1] for line in lines if line.startswith(f"qmail-smtpd[{worker}]: ")]
    assert events == ["tls", "auth", "mail", "disconnect"]
    assert [line.split()[1] for line in lines if not line.startswith(f"qmail-smtpd[{worker}]")] == [
        "connect"
    ]
    assert "qmail-smtpd[" not in helper.log.text()


def test_sessions_one_after_the_other(mx: Stage) -> None:
    """Of different programs, in the same worker: each has its own log, and nothing is left open."""
    with helping(mx, "-c", "1") as helper:
        outcome(mx)
        worker = served(helper)
        before = os.listdir(f"/proc/{worker}/fd")
        for _ in range(20):
            _, log = outcome(mx)
            assert log.count(b": connect ") == log.count(b": mail ") == 1
        assert served(helper, 20) == worker
        assert os.listdir(f"/proc/{worker}/fd") == before
        assert children(worker) == set()


def test_a_relative_home_is_that_of_the_program(mx: Stage, tmp_path: Path) -> None:
    (tmp_path / "helper's").symlink_to(mx.home)
    with helping(mx):
        second = tmp_path / "second"
        shutil.copytree(mx.home, second, ignore=shutil.ignore_patterns("helper"))
        (second / "control/me").write_text("second.example.org\n")
        for home, cwd in ((".", second), ("second", tmp_path)):
            mx.environment({"QMAILHOME": home})
            with Program(mx, cwd=cwd) as program:
                assert program.client.reply() == "220 second.example.org ESMTP"
                start_tls(program.client)
                assert "second.example.org" in (program.client.command(b"EHLO x") or "")


def test_a_second_helper_leaves_the_first_its_socket(mx: Stage, helper: Helping) -> None:
    status, text = refusal(mx, f"--helper={helper.path}")
    assert status == 111
    assert text == (
        f"qmail-smtpd-listen: fatal: cannot listen on {helper.path}: Address already in use\n"
    )
    outcome(mx)
    served(helper)


def test_a_helper_that_accepts_nobody_now_keeps_its_socket(mx: Stage) -> None:
    """And its queue is full, where connect(2) would wait; what it leaves behind is in no way."""
    path = mx.home / "helper"
    with socket.socket(socket.AF_UNIX) as busy, contextlib.ExitStack() as clients:
        busy.bind(str(path))
        busy.listen(0)
        while True:
            client = clients.enter_context(socket.socket(socket.AF_UNIX))
            client.setblocking(False)
            if client.connect_ex(str(path)):
                break
        status, text = refusal(mx, f"--helper={path}")
    assert (status, text.rpartition(": ")[2]) == (111, "Address already in use\n")
    with helping(mx):
        outcome(mx)


def test_a_link_in_the_place_of_the_socket_is_not_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever may write to the directory might put one there, before the socket gets its owner."""
    need_root()
    path, victim = tmp_path / "helper", tmp_path / "victim"
    victim.touch()
    chown = os.chown

    def too_late(name: str, *owner: int, **how: bool) -> None:
        path.unlink()
        path.symlink_to(victim)
        chown(name, *owner, **how)

    monkeypatch.setattr("os.chown", too_late)
    sockets.bind(Options(["-u", "1", "-g", "1", f"--helper={path}"])).close()
    assert victim.stat().st_uid == victim.stat().st_gid == 0
    assert path.lstat().st_uid == 1


def test_under_tcpserver_the_limit_holds(mx: Stage, helper: Helping) -> None:
    with Tcpserver(mx.env, [*under_test(), *mx.args], "-c", "1") as server:
        first = Client(Tcp(server.socket()))
        assert first.reply() == "220 mx.example.org ESMTP"
        start_tls(first)
        second = Client(Tcp(server.socket()))
        second.patience = 0.5
        assert second.reply() is None
        send_message(first)
        quit_(first)
        second.patience = PATIENCE
        assert second.reply() == "220 mx.example.org ESMTP"
        start_tls(second)
        quit_(second)
        served(helper, 2)
        ends = server.log.wait_for(r": end \d+ status (\d+)$", 2)
        assert [end[1] for end in ends] == ["0", "0"]


# Where there is no help


def still_works(mx: Stage, why: str) -> None:
    """See that the program does TLS itself, and says why."""
    with Program(mx) as program:
        client = greeted(program)
        start_tls(client)
        send_message(client)
        assert client.command(b"QUIT") == "221 mx.example.org"
        assert program.wait() == 0
    where = mx.env["TLSHELPER"]
    assert f'why="no help from {where}: {why}; doing TLS ourselves"' in program.log.decode()


def test_no_helper(mx: Stage, tmp_path: Path) -> None:
    mx.environment({"TLSHELPER": str(tmp_path / "nowhere")})
    still_works(mx, "No such file or directory")
    (tmp_path / "nowhere").touch()
    still_works(mx, "Connection refused")
    with helping(mx):
        pass
    still_works(mx, "Connection refused")
    mx.environment({"TLSHELPER": "/" + "x" * 200})
    still_works(mx, "AF_UNIX path too long")


@pytest.mark.parametrize("answers", [b"", b"-", b"!"])
def test_a_helper_that_says_no(mx: Stage, tmp_path: Path, answers: bytes) -> None:
    path = tmp_path / "helper"
    mx.environment({"TLSHELPER": str(path)})
    with socket.socket(socket.AF_UNIX) as server, Program(mx) as program:
        server.bind(str(path))
        server.listen()
        client = greeted(program)
        client.send(b"STARTTLS\r\n")
        connection, _ = server.accept()
        connection.sendall(answers)
        connection.close()
        assert client.reply() == "220 ready for tls"
        assert client.start_tls() == "ok"
        quit_(client)
        assert program.wait() == 0
    assert b"doing TLS ourselves" in program.log


def test_a_helper_that_does_not_answer(mx: Stage, tmp_path: Path) -> None:
    path = tmp_path / "helper"
    mx.environment({"TLSHELPER": str(path)})
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        server.listen()
        with Program(mx) as program:
            client = greeted(program)
            began = time.monotonic()
            start_tls(client)
            assert 1.5 < time.monotonic() - began < 10
            quit_(client)
            assert program.wait() == 0
    assert b": timed out; doing TLS ourselves" in program.log


def test_the_largest_environment_that_a_program_can_have_arrives() -> None:
    """2 MiB, in all (execve(2))."""
    environ = {b"LONG%d" % number: b"x" * 100_000 for number in range(20)}
    ours, theirs = socket.socketpair()
    with ours, theirs:
        program = threading.Thread(target=ours.sendall, args=[handover.pack([], environ)])
        program.start()
        try:
            assert handover.take(theirs) == ([], environ)
        finally:
            theirs.shutdown(socket.SHUT_RDWR)
            program.join()


def test_the_program_has_time_to_tell_its_client() -> None:
    """However much of the time was left for what it handed over."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.settimeout(0.001)
        go = [handover.GO], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [0, 1, 2]))]
        program = threading.Timer(0.2, ours.sendmsg, go)
        program.start()
        descriptors = handover.begin(theirs)
        program.join()
        assert len(descriptors) == 3
        for descriptor in descriptors:
            os.close(descriptor)
        assert ours.recv(2) == handover.READY


def test_the_program_waits_for_as_long_as_the_session_takes() -> None:
    """However little of the time was left for the helper to be ready."""
    ours, theirs = socket.socketpair()
    with theirs:
        ours.settimeout(0.001)
        session = threading.Timer(0.2, theirs.sendall, [b"\7"])
        session.start()
        assert handover.Offer(ours).complete((0, 1, 2)) == 7
        session.join()


def test_a_helper_that_ends_before_it_is_told_to_begin() -> None:
    ours, theirs = socket.socketpair()
    theirs.close()
    assert handover.Offer(ours).complete((0, 1, 2)) == 1


def test_an_offer_that_nobody_takes_holds_nothing(mx: Stage) -> None:
    """The client sees the end of its connection, and what comes of the offer later is not told."""
    with helping(mx, "-c", "1") as helper:
        with Program(mx) as program:
            busy = greeted(program)
            start_tls(busy)
            with Program(mx) as other:
                client = greeted(other)
                start_tls(client)
                quit_(client)
                assert client.read_to_end() == b""
                assert other.wait() == 0
            assert b": timed out; doing TLS ourselves" in other.log
            quit_(busy)
            assert program.wait() == 0
        served(helper, 2)
        assert "qmail-smtpd[" not in helper.log.text()
        assert other.log.count(b"disconnect") == 1


# When something breaks


def test_the_helper_is_killed_in_the_middle(mx: Stage) -> None:
    with helping(mx) as helper:
        eventually(lambda: helper.workers, "there are workers")
        with Program(mx) as program:
            client = greeted(program)
            start_tls(client)
            begin_message(client)
            client.send(b"Subject: half\r\n\r\nha")
            client.settle()
            for pid in (helper.pid, *helper.workers):
                os.kill(pid, signal.SIGKILL)
            assert client.read_to_end() == b""
            assert program.wait() == 1
        assert [delivery.read[1] for delivery in mx.deliveries()] == [b""]
        still_works(mx, "Connection refused")


def test_the_program_is_killed_in_the_middle(mx: Stage) -> None:
    """The session goes on to its end, and the worker is then there for others."""
    with helping(mx, "-c", "1") as helper:
        with Program(mx) as program:
            client = greeted(program)
            start_tls(client)
            begin_message(client)
            program.signal(signal.SIGKILL)
            client.send(b"Subject: x\r\n\r\n.\r\n")
            assert (client.reply() or "").startswith("250 ")
            assert client.command(b"QUIT") == "221 mx.example.org"
        outcome(mx)
        served(helper, 2)


def test_a_restart(mx: Stage) -> None:
    with helping(mx) as helper, Program(mx) as program:
        client = greeted(program)
        start_tls(client)
        helper.signal(signal.SIGUSR2)
        helper.log.wait_for(r": status: 0/40$", 2)
        _, log = outcome(mx)
        assert b"no help from" not in log
        send_message(client)
        quit_(client)
        assert program.wait() == 0


def test_the_end(mx: Stage) -> None:
    with helping(mx) as helper, Program(mx) as program:
        client = greeted(program)
        start_tls(client)
        helper.signal(signal.SIGTERM)
        helper.log.wait_for(r": stopping: 1 connection")
        still_works(mx, "Connection refused")
        send_message(client)
        quit_(client)
        assert program.wait() == 0
        assert helper.wait() == 0


# What is no program of ours


def offered(path: Path, text: bytes, go: bytes | None = None, descriptors: int = 3) -> None:
    """Send this to a helper, and `go` with so many descriptors where it says that it is ready, and
    see that it hangs up.
    """
    ends = [os.open(os.devnull, os.O_RDWR) for _ in range(descriptors)]
    with socket.socket(socket.AF_UNIX) as program:
        program.settimeout(PATIENCE)
        program.connect(str(path))
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", ends))] if ends else []
        try:
            program.sendall(text)
            if go is not None:
                assert program.recv(1) == handover.READY
                program.sendmsg([go], rights)
            program.recv(1)
        except ConnectionError:
            pass  # it has hung up before it was told all
    for end in ends:
        os.close(end)


def test_it_is_the_user_that_counts_and_not_the_group() -> None:
    need_root()
    os.setegid(65534)
    try:
        ours, theirs = socket.socketpair()
    finally:
        os.setegid(0)
    with ours, theirs:
        handover.check_peer(theirs)


def test_messages_that_are_none(mx: Stage) -> None:
    chance = random.Random(0)
    whole = b"3\0/bin/true\0x\0y\0HOME=/\0"
    length = len(whole).to_bytes(4, "little")
    texts = [
        *[length + b"\xff" * len(whole), b"\xff\xff\xff\xff", b"\x01\0\0\0\0", b"\0\0\0\0"],
        *[b"\x02\0\0\0x\0", b"\x03\0\0\0-1\0"],
        *[chance.randbytes(5000) for _ in range(20)],
    ]
    with helping(mx, "-c", "1") as helper:
        outcome(mx)
        worker = served(helper)
        before = os.listdir(f"/proc/{worker}/fd")
        for text in texts:
            offered(helper.path, text)
        helper.ends(len(texts))
        home = b"QMAILHOME=%s\0" % os.fsencode(mx.home)
        whole = handover.pack([], dict([home[:-1].split(b"=")]))
        for go, descriptors in ((b"!", 2), (b"!", 0), (b"!", 4), (b"-", 3)):
            offered(helper.path, whole, go, descriptors)
        helper.ends(4)
        outcome(mx)
        assert served(helper) == worker
        assert os.listdir(f"/proc/{worker}/fd") == before


def test_a_message_that_does_not_end(mx: Stage) -> None:
    with helping(mx, "-c", "1") as helper:
        began = time.monotonic()
        offered(helper.path, b"\xff\0\0\0half")
        assert time.monotonic() - began < 10
        outcome(mx)
        served(helper, 2)
