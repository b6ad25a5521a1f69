"""The pool: how many workers there are, what happens to them, and what they leave behind."""

from __future__ import annotations

import os
import random
import signal
import socket
import sys
import threading
import time
from pathlib import Path

import pytest
from conformance.client import Client
from conformance.program import ROOT
from conformance.stage import Stage
from listener.listening import (
    ADDRESS,
    PATIENCE,
    Listening,
    children,
    eventually,
    oom_score,
    wait_for_death,
)
from listener.mail import authenticate, begin_message, end_message, quit_, send_message, start_tls
from listener.peers import compile_rules
from listener.world import address

from qmail_smtpd_py import oomscore
from qmail_smtpd_py.board import Board, Place

pytest_plugins = ["listener.fixtures"]


def worker_of(listener: Listening, client: Client) -> int:
    """Who serves a client."""
    port = client.connection.local_port
    [line] = listener.log.wait_for(rf": ok (\d+) .*:{port}$")
    return int(line[1])


def served_by(listener: Listening) -> int:
    """A whole session; the worker that served it."""
    quit_(listener.greeted())
    [(worker, status)] = listener.ends()
    assert status == 0
    return worker


# How long a worker lives


@pytest.mark.parametrize("is_restarted", [False, True], ids=["at first", "after USR2"])
def test_where_memory_runs_out_it_is_a_worker_that_goes(mx: Stage, is_restarted: bool) -> None:
    """It is replaced; with the parent the service would end."""
    with Listening(mx) as listener:
        eventually(lambda: listener.workers, "there are workers")
        if is_restarted:
            listener.signal(signal.SIGUSR2)
            listener.log.wait_for(r": status: 0/40$", 2)
        quit_(listener.greeted())
        ours = oom_score(os.getpid())
        theirs = min(ours + 200, 1000)
        eventually(lambda: {*map(oom_score, listener.workers)} == {theirs}, "workers have more")
        assert oom_score(listener.pid) == ours


@pytest.mark.parametrize("own, raised", [(-1000, -800), (0, 200), (300, 500), (900, 1000)])
def test_a_worker_goes_no_later_than_its_parent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own: int, raised: int
) -> None:
    """And where that can not be had, there is a service all the same."""
    path = tmp_path / "oom_score_adj"
    path.write_text(f"{own}\n")
    monkeypatch.setattr(oomscore, "_FILE", str(path))
    written: list[int] = []

    def write(descriptor: int, score: bytes) -> None:
        written.append(int(score))
        raise PermissionError

    monkeypatch.setattr(oomscore, "write", write)
    score = oomscore.OomScore()
    score.raise_own()
    assert written == [raised]
    path.unlink()
    score.raise_own()
    oomscore.OomScore().raise_own()


def test_a_worker_ends_after_its_last_connection(mx: Stage) -> None:
    with Listening(mx, "-c", "1", "--max-use=3") as listener:
        workers = [served_by(listener) for _ in range(7)]
    assert [len(set(workers[at : at + 3])) for at in (0, 3, 6)] == [1, 1, 1]
    assert len(set(workers)) == 3


def test_a_process_for_each_connection(mx: Stage) -> None:
    with Listening(mx, "--max-use=1") as listener:
        workers = [served_by(listener) for _ in range(12)]
    assert len(set(workers)) == 12


def test_a_worker_ends_when_it_is_old(mx: Stage) -> None:
    with Listening(mx, "-c", "1", "--max-age=1") as listener:
        client = listener.greeted()
        worker = worker_of(listener, client)
        client.patience = 1.2
        assert client.reply() is None  # it does not end in the middle of a session
        client.patience = PATIENCE
        quit_(client)
        wait_for_death(worker)
        eventually(lambda: listener.workers - {worker}, "another takes its place")


# How many there are


def test_short_sessions_whose_clients_take_their_time(mx: Stage) -> None:
    """No worker is held up for long, and yet the processors have time for more of them."""
    stop = threading.Event()

    def come_again_and_again() -> None:
        while not stop.is_set():
            with listener.socket() as client:
                client.recv(100)
                time.sleep(0.02)

    with Listening(mx, "-c", "9", "--idle=1") as listener:
        clients = [threading.Thread(target=come_again_and_again) for _ in range(9)]
        for client in clients:
            client.start()
        try:
            eventually(lambda: len(listener.workers) == 9, "there is one for each client")
        finally:
            stop.set()
            for client in clients:
                client.join()


def test_more_than_the_limit_wait(mx: Stage) -> None:
    with Listening(mx, "-c", "6", "--idle=1") as listener:
        clients = [listener.greeted() for _ in range(6)]
        assert len({worker_of(listener, client) for client in clients}) == 6
        late = [listener.connect() for _ in range(2)]
        for client in late:
            client.patience = 0.3
            assert client.reply() is None
            client.patience = PATIENCE
        assert len(listener.workers) == 6
        for client in clients[:2]:
            quit_(client)
        assert [client.reply() for client in late] == ["220 mx.example.org ESMTP"] * 2
        for client in (*clients[2:], *late):
            quit_(client)
        listener.ends(8)
        assert "status: 6/6" in listener.log.text()
        assert "status: 7/6" not in listener.log.text()


def test_idle_workers_are_few_again_after_a_rush(mx: Stage) -> None:
    with Listening(mx, "-c", "20", "--idle=2") as listener:
        clients = [listener.greeted() for _ in range(16)]
        assert len(listener.workers) >= 16
        for client in clients:
            quit_(client)
        started = listener.workers
        eventually(lambda: len(listener.workers) <= 4, "those that are too many have ended")
        assert len(listener.workers) >= 2
        assert listener.workers <= started, "no others were started for those that ended"


# Death


def test_an_idle_worker_is_killed(mx: Stage) -> None:
    with Listening(mx, "--idle=2") as listener:
        eventually(lambda: len(listener.workers) == 2, "there are workers")
        for victim in listener.workers:
            os.kill(victim, signal.SIGKILL)
            listener.log.wait_for(rf"warning: worker {victim} was killed by signal 9$")
        for _ in range(3):
            served_by(listener)
    assert "no new ones" not in listener.log.text()


def test_another_comes_for_one_that_is_killed_though_enough_are_idle(mx: Stage) -> None:
    """It may have been woken for a connection, and only a new one would see that."""
    with Listening(mx, "--idle=1", "-c", "20") as listener:
        for client in [listener.greeted() for _ in range(6)]:
            quit_(client)
        listener.ends(6)
        there = listener.workers
        victim = min(there)
        os.kill(victim, signal.SIGKILL)
        listener.log.wait_for(rf"warning: worker {victim} was killed by signal 9$")
        eventually(lambda: listener.workers - there, "another has come")


@pytest.mark.parametrize(("limit", "is_told"), [(1, False), (2, True)])
def test_the_parent_is_told_only_if_it_could_fork(limit: int, is_told: bool) -> None:
    reader, writer = os.pipe()
    with open(reader, "rb", 0) as ear, open(writer, "wb", 0):
        os.set_blocking(reader, False)
        board = Board(limit)
        board.mark(0, b"\1")
        place = Place(
            board, 0, parent=os.getppid(), notify=writer, lifeline=-1, least_idle=1, most_idle=2
        )
        place.begin()
        assert ear.read() == (b"." if is_told else None)


def test_a_busy_worker_is_killed(mx: Stage) -> None:
    with Listening(mx) as listener:
        victim, other = listener.greeted(), listener.greeted()
        begin_message(victim)
        victim.send(b"Subject: half\r\n\r\nha")
        begin_message(other)
        eventually(lambda: len(mx.records(mx.tools / "qmail-queue")) == 2, "both queues are there")
        pid = worker_of(listener, victim)
        os.kill(pid, signal.SIGKILL)
        assert victim.read_to_end() == b""
        listener.log.wait_for(rf"warning: worker {pid} was killed by signal 9$")
        assert f": end {pid} status 9\nqmail-smtpd-listen: status: 1/40\n" in listener.log.text()
        end_message(other)
        quit_(other)
        served_by(listener)
        eventually(
            lambda: [1 in delivery.read for delivery in mx.deliveries()] == [True, True],
            "both have read all",
        )
    assert sorted(delivery.read[1][:1] for delivery in mx.deliveries()) == [b"", b"F"]


def test_busy_workers_that_are_killed_do_not_look_like_a_loop(mx: Stage) -> None:
    with Listening(mx) as listener:
        for _ in range(12):
            client = listener.greeted()
            os.kill(worker_of(listener, client), signal.SIGKILL)
            assert client.read_to_end() == b""
        quit_(listener.greeted())
    assert "no new ones" not in listener.log.text()


DEFECTIVE = """
import sys

sys.path.insert(0, sys.argv.pop(1))
from qmail_smtpd_py import listener, worker

sound = worker.serve


def serve(wire, environ, *others):
    if b"DEFECT" in environ:
        raise ZeroDivisionError("what nobody may see")
    return sound(wire, environ, *others)


worker.serve = serve
sys.exit(listener.main())
"""


def test_a_defect_ends_a_worker_and_nothing_else(mx: Stage, tmp_path: Path) -> None:
    """Its client is hung up on, and the log has the place of it, and no more."""
    bad = address()
    rules = compile_rules(tmp_path / "rules.cdb", f'{bad}:allow,DEFECT="1"\n:allow\n')
    script = tmp_path / "qmail-smtpd-listen"
    script.write_text(DEFECTIVE)
    command = (sys.executable, "-I", str(script), str(ROOT))
    with Listening(mx, "-x", str(rules), command=command) as listener:
        other = listener.greeted()
        begin_message(other)
        for count in range(1, 8):
            assert listener.connect(bad).read_to_end() == b""
            where = r"ZeroDivisionError at qmail-smtpd-listen line \d+"
            listener.log.wait_for(rf": fatal: {where}$", count)
            listener.log.wait_for(r": warning: worker \d+ ended with status 1$", count)
        end_message(other)
        quit_(other)
        quit_(listener.greeted())
    assert "nobody may see" not in listener.log.text()


def test_workers_that_die_at_birth_are_replaced_later_and_later(mx: Stage) -> None:
    with Listening(mx, "--idle=1", "-c", "3") as listener:
        deaths = 0
        while " no new ones for 0.5 s" not in listener.log.text():
            eventually(lambda: listener.workers, "there is a worker")
            for pid in listener.workers:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
                listener.log.wait_for(rf"warning: worker {pid} was killed")
                deaths += 1
            assert deaths < 50
        found = listener.log.wait_for(r"no new ones for (\S+) s$", 2)
        assert [match[1] for match in found] == ["0.25", "0.5"]
        served_by(listener)


@pytest.mark.parametrize("talks", [False, True], ids=["silent", "talking"])
def test_the_parent_is_killed(mx: Stage, talks: bool) -> None:
    """Its port is free soon, although a session goes on to its end."""
    with Listening(mx) as listener:
        client = listener.greeted()
        begin_message(client)
        busy = worker_of(listener, client)
        workers = listener.workers
        listener.signal(signal.SIGKILL)
        for pid in workers - {busy}:
            wait_for_death(pid)
        deadline = time.monotonic() + PATIENCE
        while not can_listen(listener.port):
            assert time.monotonic() < deadline, "the port is not free"
            if talks:
                client.send(b"a line, and another\r\n")
            time.sleep(0.1)
        with Listening(mx, port=listener.port) as successor:
            quit_(successor.greeted())
            end_message(client)
            quit_(client)
            wait_for_death(busy)
        assert listener.wait() == -signal.SIGKILL


def can_listen(port: int) -> bool:
    try:
        socket.create_server((ADDRESS, port)).close()
    except OSError:
        return False
    return True


# What is left behind


def kind_of_session(listener: Listening, chance: random.Random) -> None:
    """A session of any kind, as clients have them."""
    kind = chance.choice(["quit", "mail", "tls", "auth", "hung up", "cut", "denied", "handshake"])
    client = listener.greeted()
    if kind == "mail":
        send_message(client)
    elif kind == "tls":
        start_tls(client)
        send_message(client)
    elif kind == "auth":
        authenticate(client)
    elif kind == "cut":
        begin_message(client)
        client.send(b"half")
    elif kind == "handshake":
        assert client.command(b"STARTTLS") == "220 ready for tls"
        assert client.start_tls(instead="no handshake\r\n", close=True) == "fail"
    elif kind == "denied":
        client.command(b"MAIL FROM:<a@example.com>")
        client.command(b"RCPT TO:<u@elsewhere.example>")
    if kind in ("hung up", "cut", "handshake"):
        client.connection.close()
    else:
        quit_(client)
    listener.ends()


def descriptors(pid: int) -> dict[str, str]:
    found = {}
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        found[entry.name] = os.readlink(entry).partition(":")[0]
    return found


def resident(pid: int) -> int:
    """Octets of memory that a process has to itself, and that are in use."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return int(text.partition("Anonymous:")[2].split()[0]) * 1024


def test_hundreds_of_sessions_leave_nothing_behind(mx: Stage) -> None:
    mx.environment({"QMAILQUEUE": str(quick_queue(mx))})
    mx.arguments("@true", "@true")
    chance = random.Random(0)
    with Listening(mx, "-c", "1", "--max-use=100000") as listener:
        for _ in range(60):
            kind_of_session(listener, chance)
        [worker] = listener.workers
        before = [(descriptors(pid), resident(pid)) for pid in (listener.pid, worker)]
        for _ in range(500):
            kind_of_session(listener, chance)
        assert listener.workers == {worker}
        assert children(worker) == set(), "no zombies"
        after = [(descriptors(pid), resident(pid)) for pid in (listener.pid, worker)]
    for (open_before, used_before), (open_after, used_after) in zip(before, after):
        assert open_after == open_before
        assert used_after - used_before < 512 * 1024


def quick_queue(stage: Stage) -> Path:
    """A qmail-queue that reads what it is given, and takes no longer than it must."""
    path = stage.tools / "quick-queue"
    path.write_text("#!/bin/sh\nexec 3<&1 >/dev/null\ncat\ncat <&3\n")
    path.chmod(0o755)
    return path
