"""What workers share by the fork, and what they must not share."""

from __future__ import annotations

import errno
import gc
import os
import re
import select
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from listener.listening import PATIENCE, children, listening_on

from qmail_smtpd_py import rehearsal
from qmail_smtpd_py.control import ControlFiles
from qmail_smtpd_py.service import Service
from qmail_smtpd_py.smtpd import Resources
from qmail_smtpd_py.tcpenviron import LookUps

NUMBERS = """
import os, sys
from qmail_smtpd_py import afterfork
afterfork.leave_out()
import random, threading
from OpenSSL import SSL
for _ in range(3):
    hear, tell = os.pipe()
    pid = os.fork()
    if not pid:
        thread = threading.Thread(target=lambda: os.write(tell, %s))
        thread.start()
        thread.join()
        os._exit(0)
    os.close(tell)
    print(os.read(hear, 100).hex())
    os.waitpid(pid, 0)
"""


@pytest.mark.parametrize(
    "draw",
    [
        "str(random.random()).encode()",
        "str(random.getrandbits(64)).encode()",
        "str(random.Random().random()).encode()",
    ],
)
def test_no_two_workers_have_random_numbers_in_common(draw: str) -> None:
    found = subprocess.run(
        [sys.executable, "-c", NUMBERS % draw], stdout=subprocess.PIPE, check=True, text=True
    )
    numbers = found.stdout.split()
    assert len(numbers) == len(set(numbers)) == 3


def test_what_forks_anew_costs_no_hook() -> None:
    program = """
import os
registered = []
os.register_at_fork = lambda **hooks: registered.append(hooks)
from qmail_smtpd_py import afterfork
afterfork.leave_out()
from OpenSSL import SSL
print(registered)
"""
    found = subprocess.run(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, check=True, text=True
    )
    assert found.stdout == "[]\n"


def a_service(environ: dict[bytes, bytes]) -> Service:
    """A service without AUTH, rules or proxies."""
    return Service(
        environ,
        [],
        Resources(ControlFiles()),
        LookUps(),
        rules=None,
        proxies=None,
        banner=b"",
        keep_ip_options=False,
        limit=1,
        is_verbose=False,
        complain=print,
    )


@pytest.mark.parametrize("what", ["os.fork", "_stage"], ids=["no process", "no session"])
def test_of_a_rehearsal_that_fails_nothing_is_left(
    monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    def fails(*_: object) -> None:
        raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    monkeypatch.setattr(f"qmail_smtpd_py.rehearsal.{what}", fails)
    before = os.listdir("/proc/self/fd"), children(os.getpid())
    with pytest.raises(OSError, match="temporarily unavailable"):
        rehearsal.rehearse(a_service({}))
    assert (os.listdir("/proc/self/fd"), children(os.getpid())) == before


def test_a_rehearsal_that_comes_to_nothing_takes_no_longer(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Its client says nothing: there is an end to each session, and to all of them."""

    def say_nothing(connections: list[socket.socket]) -> None:
        time.sleep(10 * PATIENCE)

    (tmp_path / "control").mkdir()
    (tmp_path / "control" / "me").write_text("mx.example.org\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(rehearsal, "_play_client", say_nothing)
    monkeypatch.setattr(rehearsal, "_SECONDS", 1)
    monkeypatch.setitem(rehearsal._ENVIRON, b"TIMEOUTSESSION", b"1")
    environ = {b"QMAILHOME": os.fsencode(tmp_path)}
    began = time.monotonic()
    with pytest.raises(TimeoutError):
        rehearsal.rehearse(a_service(environ))
    assert time.monotonic() - began < PATIENCE


def test_sessions_leave_nothing_for_the_collector(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """In workers there is none: what goes round in circles, with all that it holds of a session,
    would be there until they end.  The queue can not be started here.
    """
    (tmp_path / "control").mkdir()
    (tmp_path / "control" / "me").write_text("mx.example.org\n")
    monkeypatch.chdir(tmp_path)
    service = a_service({b"QMAILHOME": os.fsencode(tmp_path)})
    rehearsal.rehearse(service)  # with all that is loaded and set up only now
    gc.collect()
    gc.disable()
    try:
        rehearsal.rehearse(service)
        assert gc.collect() == 0
    finally:
        gc.enable()


def test_a_stranger_who_finds_the_port_of_a_rehearsal(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """And says nothing there: our own client is before it."""
    strangers = []
    stage = rehearsal._stage

    def intrude(service: Service) -> Service:
        (port,) = {port for _, port in listening_on(os.getpid())}
        strangers.append(socket.create_connection(("127.0.0.1", port)))
        return stage(service)

    (tmp_path / "control").mkdir()
    (tmp_path / "control" / "me").write_text("mx.example.org\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(rehearsal, "_stage", intrude)
    environ = {b"QMAILHOME": os.fsencode(tmp_path)}
    rehearsal.rehearse(a_service(environ))
    with strangers.pop() as stranger, pytest.raises(ConnectionResetError):
        stranger.recv(1)


FAILING = """
import sys
from qmail_smtpd_py import oomscore, prefork
def work():
    raise eval(sys.argv[1])
prefork._become_worker(work, lambda text: print(text, flush=True), (), oomscore.OomScore())
"""


@pytest.mark.parametrize(
    ("error", "told"),
    [
        ("MemoryError", "fatal: out of memory; is the memory limit too low?"),
        ("OSError(24, 'Too many open files')", "fatal: OSError at .*: Too many open files"),
        ("KeyError('secret')", "fatal: KeyError at <string> line 5"),
    ],
)
def test_what_a_worker_says_at_its_end(error: str, told: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FAILING, error], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (1, "")
    assert re.fullmatch(told.replace("?", r"\?") + "\n", done.stdout)


EMPLOYER = """
import os, signal, time
from qmail_smtpd_py import oomscore, prefork
class Employer(prefork.Employer):
    def employ(self, place):
        return lambda: time.sleep(9)
    def prepare(self):
        pass
"""

SIGNALLED = f"""{EMPLOYER}
signal.signal(signal.SIGTERM, lambda number, frame: None)
def fork():
    pid = os.fork()
    if not pid:
        os.kill(os.getpid(), signal.SIGTERM)
    return pid
prefork.fork = fork
pool = prefork.Pool(1, 1, Employer(), oomscore.OomScore(), os.open("/dev/null", os.O_RDONLY))
pool.maintain()
(worker,) = pool.workers
print(os.waitpid(worker, 0)[1], signal.pthread_sigmask(signal.SIG_BLOCK, []))
"""


def test_a_worker_that_is_to_end_before_it_has_begun() -> None:
    """Not a word of the interpreter's, and no signal lost."""
    done = subprocess.run(
        [sys.executable, "-c", SIGNALLED], capture_output=True, text=True, check=True
    )
    assert (done.stdout, done.stderr) == (f"{signal.SIGTERM.value} set()\n", "")


ORPHANS = f"""{EMPLOYER}
pool = prefork.Pool(5, 1, Employer(), oomscore.OomScore(), os.open("/dev/null", os.O_RDONLY))
pool.maintain()
for _ in range(3):
    orphan = os.fork()
    if not orphan:
        os._exit(3)
    os.waitid(os.P_PID, orphan, os.WEXITED | os.WNOWAIT)
    pool.maintain()
print(len(pool.workers))
pool.signal_all(9)
"""


def test_an_orphan_that_fails_is_no_worker() -> None:
    """They are children of process 1, which in a container may be a listener."""
    done = subprocess.run(
        [sys.executable, "-c", ORPHANS], capture_output=True, text=True, check=True
    )
    assert (done.stdout, done.stderr) == ("1\n", "")


def test_the_end_of_its_client_is_the_end_of_a_rehearsal() -> None:
    with rehearsal._client_of([]) as lifeline:
        hung_up = select.poll()
        hung_up.register(lifeline, select.POLLHUP)
        assert hung_up.poll(PATIENCE * 1000) == [(lifeline, select.POLLHUP)]
