"""What an administrator tells a running listener by signals, while sessions are open."""

from __future__ import annotations

import contextlib
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conformance import logs
from conformance.client import Client
from conformance.stage import Stage
from conformance.transport import SocketConnection
from listener.listening import (
    ADDRESS,
    PATIENCE,
    Listening,
    eventually,
    octet_environment,
    program,
    wait_for_death,
)
from listener.mail import begin_message, end_message, quit_, send_message, start_tls

pytest_plugins = ["listener.fixtures"]


def is_refused(listener: Listening) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex((listener.address, listener.port)) != 0


def workers(listener: Listening, at_least: int = 1) -> set[int]:
    """Its workers, once there are so many."""
    eventually(lambda: len(listener.workers) >= at_least, f"{at_least} workers")
    return listener.workers


# The end


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGQUIT])
def test_the_end_of_an_idle_listener(mx: Stage, number: int) -> None:
    with Listening(mx) as listener:
        quit_(listener.greeted())
        listener.ends()
        began = time.monotonic()
        listener.signal(number)
        assert listener.wait() == 0
        assert time.monotonic() - began < 3
        assert is_refused(listener)
        listener.log.wait_for(r"^qmail-smtpd-listen: stopping: 0 connections left$")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_sessions_go_on_to_their_end(mx: Stage, number: int) -> None:
    with Listening(mx) as listener:
        writing, waiting, secure = (listener.greeted() for _ in range(3))
        begin_message(writing)
        writing.send(b"Subject: begun\r\n\r\n")
        start_tls(secure)
        listener.signal(number)
        listener.log.wait_for(r"stopping: 3 connections left$")
        assert is_refused(listener)
        end_message(writing, b"and ended\r\n")
        send_message(secure)
        quit_(secure)
        send_message(waiting)
        assert listener.is_running
        quit_(waiting)
        assert [status for _, status in listener.ends(2)] == [0, 0]
        assert listener.is_running
        quit_(writing)
        assert listener.wait() == 0
    assert len(mx.deliveries()) == 3
    assert all(delivery.read[1].endswith(b"\0") for delivery in mx.deliveries())
    assert b"Subject: begun\n\nand ended\n" in mx.deliveries()[0].read[0]


def cut(listener: Listening, mx: Stage, client: Client) -> None:
    """See that the session was cut, and that of its message nothing can be queued."""
    assert listener.wait() == 0
    assert client.read_to_end() == b""
    [delivery] = mx.deliveries()
    assert delivery.read[1] == b""


def in_message(listener: Listening) -> Client:
    """A client inside of a message."""
    client = listener.greeted()
    begin_message(client)
    client.send(b"Subject: never to be ended\r\n\r\n" + b"text\r\n" * 20000)
    return client


def test_sessions_are_cut_when_they_take_too_long(mx: Stage) -> None:
    with Listening(mx, "--drain=1.5") as listener:
        client = in_message(listener)
        began = time.monotonic()
        listener.signal(signal.SIGTERM)
        listener.log.wait_for(r": stopping: 1 connection left$")
        cut(listener, mx, client)
        assert 1.4 < time.monotonic() - began < 5
        [begin] = listener.log.wait_for(r": pid (\d+) from ")
        listener.log.wait_for(rf": end {begin[1]} status {int(signal.SIGTERM)}$")


@pytest.mark.parametrize(
    "signals",
    [
        [signal.SIGTERM, signal.SIGTERM],
        [signal.SIGINT, signal.SIGTERM],
        [signal.SIGTERM, signal.SIGQUIT],
        [signal.SIGQUIT],
    ],
    ids=lambda signals: " ".join(signal.Signals(number).name for number in signals),
)
def test_sessions_are_cut_at_once(mx: Stage, signals: list[int]) -> None:
    with Listening(mx) as listener:
        client = in_message(listener)
        for number in signals:
            listener.signal(number)
            listener.log.wait_for(r"stopping: 1 connection")
        cut(listener, mx, client)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGQUIT])
def test_the_end_where_a_worker_is_stopped(mx: Stage, number: int) -> None:
    with Listening(mx, "--drain=0.5") as listener:
        client = listener.greeted()
        for worker in listener.workers:
            os.kill(worker, signal.SIGSTOP)
        listener.signal(number)
        assert listener.wait() == 0
        assert client.read_to_end() == b""


@contextlib.contextmanager
def unheard(mx: Stage, *options: str) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """A listener whose log nobody reads, and its port."""
    command = [*program(), "-1", "-v", "-R", "-H", *options, ADDRESS, "0"]
    with logs.nobody_reads() as log:
        started = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=log, env=octet_environment(mx)
        )
        with started:
            assert started.stdout
            yield started, int(started.stdout.readline())


def greeted_at(port: int) -> Client:
    client = Client(SocketConnection(socket.create_connection((ADDRESS, port))))
    assert client.reply() == "220 mx.example.org ESMTP"
    return client


def test_the_end_where_nobody_reads_the_log(mx: Stage) -> None:
    with unheard(mx) as (started, port):
        client = greeted_at(port)
        started.terminate()
        quit_(client)
        assert started.wait(PATIENCE) == 0


def test_a_log_that_nobody_reads_is_waited_for_once(mx: Stage) -> None:
    """Not in each session: those that wait behind it would wait for long."""
    with unheard(mx, "-c", "1") as (started, port):
        begin = time.monotonic()
        for _ in range(10):
            quit_(greeted_at(port))
        lasted = time.monotonic() - begin
        started.terminate()
        assert started.wait(PATIENCE) == 0
    assert lasted < 8  # each has lines of its own


def test_signals_that_come_too_late_change_nothing(mx: Stage) -> None:
    with Listening(mx) as listener:
        client = listener.greeted()
        listener.signal(signal.SIGTERM)
        listener.log.wait_for(r"stopping: 1 connection")
        before = listener.workers
        for number in (signal.SIGHUP, signal.SIGUSR2, signal.SIGALRM):
            listener.signal(number)
        listener.log.wait_for(r"status: 1/40$", 2)
        assert is_refused(listener)
        assert listener.workers <= before
        send_message(client)
        quit_(client)
        assert listener.wait() == 0
        assert "restarting" not in listener.log.text()


# What goes on


def test_status(mx: Stage) -> None:
    with Listening(mx, "-c", "7", usual=("-1", "-R", "-H", "-l", "mx.example.org")) as listener:
        listener.signal(signal.SIGALRM)
        listener.log.wait_for(r"^qmail-smtpd-listen: status: 0/7$")
        clients = [listener.greeted() for _ in range(3)]
        listener.signal(signal.SIGALRM)
        listener.log.wait_for(r"^qmail-smtpd-listen: status: 3/7$")
        for client in clients:
            quit_(client)


def test_workers_are_replaced_each_after_its_session(mx: Stage) -> None:
    with Listening(mx, "--idle=2") as listener:
        before = workers(listener, 2)
        client = listener.greeted()
        [accepted] = listener.log.wait_for(r": pid (\d+) from ")
        busy = int(accepted[1])
        listener.signal(signal.SIGHUP)
        for pid in before - {busy}:
            wait_for_death(pid)
        assert busy in listener.workers
        send_message(client)
        quit_(client)
        wait_for_death(busy)
        assert listener.ends() == [(busy, 0)]
        eventually(lambda: not before & listener.workers, "others are in their place")
        quit_(listener.greeted())
    assert "warning" not in listener.log.text()


def test_no_descriptors_to_replace_workers_with(mx: Stage) -> None:
    with Listening(mx, "--idle=1") as listener:
        before = workers(listener)
        limits = resource.prlimit(listener.pid, resource.RLIMIT_NOFILE)
        resource.prlimit(listener.pid, resource.RLIMIT_NOFILE, (4, limits[1]))
        listener.signal(signal.SIGHUP)
        why = "Too many open files"
        listener.log.wait_for(rf"^qmail-smtpd-listen: warning: cannot replace workers: {why}$")
        assert listener.workers == before
        resource.prlimit(listener.pid, resource.RLIMIT_NOFILE, limits)
        listener.signal(signal.SIGHUP)
        eventually(lambda: not before & listener.workers, "others are in their place")
        quit_(listener.greeted())


def test_another_home_of_the_same_name(mx: Stage, tmp_path: Path) -> None:
    """A link that leads elsewhere now is seen after HUP."""
    link, second = tmp_path / "link", tmp_path / "second"
    shutil.copytree(mx.home, second)
    (second / "control" / "me").write_text("second.example.org\n")
    link.symlink_to(mx.home)
    mx.environment({"QMAILHOME": str(link)})
    with Listening(mx, "--idle=1") as listener:
        assert listener.connect().reply() == "220 mx.example.org ESMTP"
        link.unlink()
        link.symlink_to(second)
        listener.signal(signal.SIGHUP)
        eventually(
            lambda: listener.connect().reply() == "220 second.example.org ESMTP",
            "it has seen that",
        )
    assert "warning" not in listener.log.text()


def anonymous_memory(pid: int) -> int:
    """Memory of a process that is no file's, in KiB."""
    rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return next(int(line.split()[1]) for line in rollup.splitlines() if "Anonymous:" in line)


@pytest.mark.tls
def test_what_is_made_anew_does_not_stay_beside_what_was_there(mx: Stage) -> None:
    """TLS contexts, and what was rehearsed with them: by HUP here, by age while it runs."""
    mx.control({"servercert.pem": "@server-rsa.pem"})
    with Listening(mx, "--idle=1") as listener:
        sizes = []
        for _ in range(10):
            old = workers(listener)
            listener.signal(signal.SIGHUP)
            for pid in old:
                wait_for_death(pid)
            workers(listener)
            sizes.append(anonymous_memory(listener.pid))
    assert sizes[-1] - sizes[1] < 1024


def test_workers_that_are_replaced_before_they_have_begun(mx: Stage) -> None:
    """Each HUP comes when those that it replaces have hardly been forked."""
    with Listening(mx) as listener:
        replaced = workers(listener)
        for _ in range(40):
            listener.signal(signal.SIGHUP)
            replaced |= listener.workers
        quit_(listener.greeted())
        last = workers(listener)
        listener.signal(signal.SIGHUP)
        for pid in replaced | last:
            wait_for_death(pid)
        quit_(listener.greeted())
    assert "warning" not in listener.log.text()


# A restart


def test_a_restart_keeps_process_id_port_and_sessions(mx: Stage) -> None:
    with Listening(mx) as listener:
        old = listener.greeted()
        begin_message(old)
        before = workers(listener)
        for count in (1, 2):
            listener.signal(signal.SIGUSR2)
            listener.log.wait_for(r"^qmail-smtpd-listen: restarting$", count)
            listener.log.wait_for(r": status: 0/40$", count + 1)
        new = listener.greeted()
        send_message(new)
        end_message(old)
        quit_(old)
        quit_(new)
        for pid in before:
            wait_for_death(pid)
        quit_(listener.greeted())
        eventually(lambda: not before & listener.workers, "others are in their place")
        listener.signal(signal.SIGTERM)
        assert listener.wait() == 0
    assert len(mx.deliveries()) == 2


def test_a_restart_changes_nothing_that_programs_see(mx: Stage) -> None:
    mx.environment({"KEPT": "as it is, \xe9 too"})
    with Listening(mx) as listener:
        for _ in range(3):
            client = listener.greeted()
            send_message(client)
            quit_(client)
            [(worker, _)] = listener.ends()
            listener.signal(signal.SIGUSR2)
            wait_for_death(worker)
    first, *others = mx.deliveries()
    for other in others:
        assert other.environ.keys() == first.environ.keys()
        changed = {name for name in first.environ if first.environ[name] != other.environ[name]}
        assert changed <= {"TCPREMOTEPORT"}
        assert other.descriptors.keys() == first.descriptors.keys()


def test_a_restart_is_to_the_program_that_is_there_now(mx: Stage, tmp_path: Path) -> None:
    """Found by its relative name, from where the listener was started."""
    *words, path = program()
    launcher = tmp_path / "launcher"
    text = Path(path).read_text()
    if "__file__" in text:
        text = text.replace("__file__", repr(path))
    launcher.write_text(text)
    launcher.chmod(0o755)
    command = (*words, f"./{launcher.name}")
    with Listening(mx, command=command, cwd=tmp_path) as listener:
        quit_(listener.greeted())
        launcher.write_text("import os\nos.write(2, b'the new one\\n')\n" + text)
        listener.signal(signal.SIGUSR2)
        listener.log.wait_for(r"^the new one$")
        quit_(listener.greeted())


TROUBLE = """
import builtins, os

to_come = [{number}]

def come(when):
    if when == {when!r} and to_come:
        os.kill(os.getpid(), to_come.pop())

def opened(path, *rest, real=open):
    if path == "/proc/self/cmdline":
        come("early")
    return real(path, *rest)

def execve(path, *rest, real=os.execve):
    come("late")
    real(path if {works} else "/nonexistent", *rest)

builtins.open, os.execve = opened, execve
"""


def troubled(directory: Path, works: bool, number: int = 0, when: str = "") -> tuple[str, ...]:
    """What starts a listener whose restart works, or finds no program; a signal comes as soon as it
    has begun, or when the program is about to be executed.
    """
    *words, path = program()
    first, _, rest = Path(path).read_text().replace("__file__", repr(path)).partition("\n")
    launcher = directory / "launcher"
    trouble = TROUBLE.format(number=int(number), when=when, works=works)
    launcher.write_text(f"{first}\n{trouble}{rest}")
    launcher.chmod(0o755)
    return (*words, str(launcher))


def test_a_restart_that_fails_is_told_and_changes_nothing(mx: Stage, tmp_path: Path) -> None:
    with Listening(mx, command=troubled(tmp_path, works=False)) as listener:
        old = listener.greeted()
        for count in (1, 2):
            listener.signal(signal.SIGUSR2)
            why = "cannot restart: .*No such file or directory"
            listener.log.wait_for(rf"^qmail-smtpd-listen: warning: {why}", count)
            new = listener.greeted()
            send_message(new)
            quit_(new)
        send_message(old)
        quit_(old)
        listener.signal(signal.SIGTERM)
        assert listener.wait() == 0
    *later, before = mx.deliveries()
    assert [delivery.descriptors.keys() for delivery in later] == [before.descriptors.keys()] * 2


def test_a_restart_without_a_program_or_a_directory(mx: Stage, tmp_path: Path) -> None:
    """The interpreter would find no program; and the qmail home may have no name any more."""
    *words, path = program()
    script = tmp_path / "launcher"
    script.write_text(Path(path).read_text().replace("__file__", repr(path)))
    script.chmod(0o755)
    with Listening(mx, command=(*words, str(script))) as listener:
        quit_(listener.greeted())
        mx.home.rename(tmp_path / "renamed")
        listener.signal(signal.SIGUSR2)
        listener.log.wait_for(rf": warning: cannot restart: {mx.home}: No such file")
        (tmp_path / "renamed").rename(mx.home)
        script.unlink()
        listener.signal(signal.SIGUSR2)
        listener.log.wait_for(r": warning: cannot restart: \S+launcher: No such file")
        quit_(listener.greeted())


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "it is another program"),
        ("print('usage: other')", "it is another program"),
        ("half a program", "it does not start: SyntaxError: invalid syntax.*"),
        ("import nothing", "it does not start: ModuleNotFoundError: No module named 'nothing'"),
        ("raise SystemExit(3)", "it does not start: exit status 3"),
    ],
)
def test_a_restart_with_a_program_that_does_not_start(
    mx: Stage, tmp_path: Path, text: str, why: str
) -> None:
    path = program()[-1]
    script = tmp_path / "launcher"
    script.write_text(Path(path).read_text().replace("__file__", repr(path)))
    with Listening(mx, command=(sys.executable, "-I", str(script))) as listener:
        script.write_text(text)
        listener.signal(signal.SIGUSR2)
        what = rf"{re.escape(str(script))}: {why} \(uid \d+\)$"
        listener.log.wait_for(rf": warning: cannot restart: {what}")
        client = listener.greeted()
        send_message(client)
        quit_(client)
        script.write_text(Path(path).read_text().replace("__file__", repr(path)))
        listener.signal(signal.SIGUSR2)
        listener.log.wait_for(r": status: 0/40$", 3)
        quit_(listener.greeted())


def test_a_start_where_the_directory_is_gone(mx: Stage, tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    before = ("sh", "-c", 'cd "$0" && rmdir "$0" && exec "$@"', str(gone))
    with Listening(mx, before=before) as listener:
        quit_(listener.greeted())
        listener.signal(signal.SIGUSR2)
        listener.log.wait_for(r": status: 0/40$", 3)
        quit_(listener.greeted())


@pytest.mark.parametrize("works", [True, False], ids=["works", "fails"])
@pytest.mark.parametrize("when", ["early", "late"])
def test_a_signal_in_the_middle_of_a_restart_is_heeded(
    mx: Stage, tmp_path: Path, when: str, works: bool
) -> None:
    """Once: a second TERM would cut the session."""
    with Listening(mx, command=troubled(tmp_path, works, signal.SIGTERM, when)) as listener:
        client = listener.greeted()
        listener.signal(signal.SIGUSR2)
        listener.log.wait_for(r": stopping: ")
        assert is_refused(listener)
        send_message(client)
        quit_(client)
        assert listener.wait() == 0


def test_the_limit_holds_through_a_restart(mx: Stage) -> None:
    with Listening(mx, "-c", "2") as listener:
        old = [listener.greeted() for _ in range(2)]
        listener.signal(signal.SIGUSR2)
        listener.log.wait_for(r": status: 0/2$", 2)
        waiting = listener.connect()
        waiting.patience = 0.5
        assert waiting.reply() is None
        quit_(old[0])
        waiting.patience = PATIENCE
        assert waiting.reply() == "220 mx.example.org ESMTP"
        quit_(old[1])
        quit_(waiting)


def test_connections_from_before_a_restart_count(mx: Stage) -> None:
    """Until they are over, be it that their worker is killed."""
    with Listening(mx) as listener:
        old = [listener.greeted() for _ in range(3)]
        accepted = listener.log.wait_for(r": pid (\d+) from ", 3)

        def tells(count: int) -> None:
            def told() -> bool:
                listener.signal(signal.SIGALRM)
                return f"status: {count}/40" in listener.log.text()[mark:]

            mark = len(listener.log.text())
            eventually(told, f"status: {count}/40")

        listener.signal(signal.SIGUSR2)
        listener.log.wait_for(r": status: 0/40$", 2)
        tells(3)
        victim = int(accepted[0][1])
        os.kill(victim, signal.SIGKILL)
        assert old[0].read_to_end() == b""
        listener.log.wait_for(rf"warning: worker {victim} was killed by signal 9$")
        tells(2)
        for client in old[1:]:
            quit_(client)
        tells(0)


@pytest.mark.parametrize("drain", [60, 1])
def test_the_end_after_a_restart_is_that_of_all_sessions(mx: Stage, drain: int) -> None:
    with Listening(mx, f"--drain={drain}") as listener:
        client = listener.greeted()
        begin_message(client)
        listener.signal(signal.SIGUSR2)
        listener.log.wait_for(r": status: 0/40$", 2)
        listener.signal(signal.SIGTERM)
        listener.log.wait_for(r": stopping: ")
        if drain == 60:
            end_message(client)
            assert listener.is_running
            quit_(client)
            assert listener.wait() == 0
        else:
            cut(listener, mx, client)


class Caller(threading.Thread):
    """Connects again and again, until it is told to stop; `errors` are what went wrong."""

    def __init__(self, listener: Listening) -> None:
        super().__init__(daemon=True)
        self._address = listener.address, listener.port
        self.stop = threading.Event()
        self.served = 0
        self.errors: list[Exception] = []

    def run(self) -> None:
        while not self.stop.is_set():
            try:
                client = Client(SocketConnection(socket.create_connection(self._address, PATIENCE)))
                assert client.reply() == "220 mx.example.org ESMTP"
                quit_(client)
            except Exception as error:
                self.errors.append(error)
                return
            self.served += 1


def test_nobody_is_refused_while_it_restarts(mx: Stage) -> None:
    with Listening(mx, "-c", "8") as listener:
        callers = [Caller(listener) for _ in range(3)]
        for caller in callers:
            caller.start()
        for count in range(4):
            served = sum(caller.served for caller in callers)
            listener.signal(signal.SIGUSR2 if count < 3 else signal.SIGHUP)
            if count < 3:
                listener.log.wait_for(r": restarting$", count + 1)
            eventually(
                lambda served=served: sum(caller.served for caller in callers) > served + 40,
                "connections are served",
            )
        for caller in callers:
            caller.stop.set()
        for caller in callers:
            caller.join(PATIENCE)
        assert [caller.errors for caller in callers] == [[], [], []]
