"""The pool: how many workers there are, what happens to them, and what they leave behind."""

from __future__ import annotations

import os
import random
import signal
import socket
from pathlib import Path

import pytest
from conformance.client import Client
from conformance.stage import Stage
from listener.listening import (
    ADDRESS,
    PATIENCE,
    Listening,
    children,
    eventually,
    wait_for_death,
)
from listener.mail import authenticate, begin_message, end_message, quit_, send_message, start_tls
from listener.peers import compile_rules

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


# What is reread


def test_changes_are_seen_by_the_next_connection_of_the_same_worker(mx: Stage) -> None:
    mx.control({"tlsserverciphers": "ECDHE-RSA-AES128-GCM-SHA256\n"})
    with Listening(mx, "-c", "1") as listener:
        first = listener.greeted()
        start_tls(first, max="1.2")
        assert first.cipher == "ECDHE-RSA-AES128-GCM-SHA256"
        (mx.home / "control" / "tlsserverciphers").unlink()
        mx.control({"me": "new.example.org\n", "rcpthosts": "example.net\n", "databytes": "100\n"})
        mx.control({"badmailfrom": "bad@example.com\n", "servercert.pem": "@server-ecdsa.pem"})
        send_message(first)  # nothing changes under a session
        quit_(first)
        second = listener.connect()
        assert second.reply() == "220 new.example.org ESMTP"
        assert second.command(b"STARTTLS") == "220 ready for tls"
        assert second.start_tls(max="1.2") == "ok"
        assert "ECDSA" in (second.cipher or "")
        assert "SIZE 100" in (second.command(b"EHLO x") or "")
        assert second.command(b"MAIL FROM:<bad@example.com>") == "250 ok"
        assert (second.command(b"RCPT TO:<u@example.net>") or "").startswith("553 ")
        second.command(b"MAIL FROM:<good@example.com>")
        assert second.command(b"RCPT TO:<u@example.net>") == "250 ok"
        assert (second.command(b"RCPT TO:<u@example.org>") or "").startswith("553 ")
        assert second.command(b"QUIT") == "221 new.example.org"
        (mx.home / "control" / "servercert.pem").unlink()
        (mx.home / "control" / "rcpthosts").unlink()
        third = listener.connect()
        assert third.reply() == "220 new.example.org ESMTP"
        assert "STARTTLS" not in (third.command(b"EHLO x") or "")
        third.command(b"MAIL FROM:<good@example.com>")
        assert third.command(b"RCPT TO:<u@example.org>") == "250 ok"
        assert third.command(b"QUIT") == "221 new.example.org"
        assert len({worker for worker, _ in listener.ends(3)}) == 1


def may_relay(listener: Listening, certificate: str = "client-alice.pem") -> bool:
    """Whether a client with the certificate may send to anybody."""
    client = listener.greeted()
    start_tls(client, cert=certificate)
    assert client.command(b"MAIL FROM:<a@client.example.com>") == "250 ok"
    reply = client.command(b"RCPT TO:<u@elsewhere.example>") or ""
    quit_(client)
    return reply == "250 ok"


@pytest.mark.tls
def test_client_certificates_are_reread(mx: Stage) -> None:
    """Who may relay by them, whom we trust to make them, and which are revoked."""
    dave = "client-revoked.pem"
    with Listening(mx, "-c", "1") as listener:
        assert not may_relay(listener)
        both = "alice@clients.example\ndave@clients.example\n"
        mx.control({"clientca.pem": "@client-ca.pem", "tlsclients": both})
        assert may_relay(listener)
        assert may_relay(listener, dave)
        mx.control({"clientcrl.pem": "@client-crl.pem"})
        assert may_relay(listener)
        assert not may_relay(listener, dave)
        mx.control({"clientcrl.pem": "no list at all\n"})
        assert not may_relay(listener)
        (mx.home / "control" / "clientcrl.pem").unlink()
        mx.control({"tlsclients": "dave@clients.example\n"})
        assert not may_relay(listener)
        assert may_relay(listener, dave)
        mx.control({"clientca.pem": "@server-rsa.pem"})
        assert not may_relay(listener, dave)
        assert len({worker for worker, _ in listener.ends(9)}) == 1


@pytest.mark.parametrize("change", ["rename", "in place", "symbolic link"])
def test_however_a_file_is_changed(mx: Stage, tmp_path: Path, change: str) -> None:
    """Ten times, each time with as many octets as before."""
    me = mx.home / "control" / "me"
    with Listening(mx, "-c", "1") as listener:
        for number in range(10):
            text = f"mx{number}.example.org"
            path = me if change == "in place" else tmp_path / text
            path.write_text(text + "\n")
            if change == "rename":
                path.rename(me)
            elif change == "symbolic link":
                me.unlink()
                me.symlink_to(path)
            client = listener.connect()
            assert client.reply() == f"220 {text} ESMTP"
            client.close()
            listener.ends()


def test_rules_are_seen_by_the_next_connection(mx: Stage, tmp_path: Path) -> None:
    path = compile_rules(tmp_path / "rules.cdb", ":allow\n")
    with Listening(mx, "-c", "1", "-x", str(path)) as listener:
        for relays in (False, True, False):
            compile_rules(path, ':allow,RELAYCLIENT=""\n' if relays else ":allow\n")
            client = listener.greeted()
            client.command(b"MAIL FROM:<a@example.com>")
            reply = client.command(b"RCPT TO:<u@elsewhere.example>") or ""
            assert reply.startswith("250" if relays else "553")
            quit_(client)
        compile_rules(path, ":deny\n")
        assert listener.connect().read_to_end() == b""


# How long a worker lives


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
    with Listening(mx, "-c", "1", "--max-age=0.2") as listener:
        client = listener.greeted()
        worker = worker_of(listener, client)
        client.patience = 0.3
        assert client.reply() is None  # it does not end in the middle of a session
        client.patience = PATIENCE
        quit_(client)
        wait_for_death(worker)
        eventually(lambda: listener.workers - {worker}, "another takes its place")


# How many there are


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


def test_the_parent_is_killed(mx: Stage) -> None:
    """Its port is free at once, although a session goes on to its end."""
    with Listening(mx) as listener:
        client = listener.greeted()
        begin_message(client)
        busy = worker_of(listener, client)
        workers = listener.workers
        listener.signal(signal.SIGKILL)
        for pid in workers - {busy}:
            wait_for_death(pid)
        eventually(lambda: can_listen(listener.port), "the port is free")
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
