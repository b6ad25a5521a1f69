"""A listener that is watched from outside: its processes, their memory and descriptors, its log."""

from __future__ import annotations

import contextlib
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

LIMIT = 40
"""Connections at a time (-c)."""

_CALM = 30.0  # seconds for the listener to become idle, or to end


class Sample(NamedTuple):
    """The listener at one moment: anonymous memory in MiB and open descriptors, of the parent, and
    of the worker that has most.
    """

    parent: float
    worker: float
    parent_descriptors: int
    worker_descriptors: int
    processes: int


class Listener:
    """A running listener, seen from outside."""

    def __init__(self, program: str, max_use: int, directory: Path) -> None:
        self.log = directory / "log"
        command = [program, "-1", "-R", "-H", "-l", "localhost", "-c", str(LIMIT)]
        command += [f"--max-use={max_use}", "127.0.0.1", "0", str(directory / "null-check"), "true"]
        environ = {
            "PATH": os.defpath,
            "QMAILHOME": str(directory / "home"),
            "QMAILQUEUE": str(directory / "record"),
            "RECORD": str(directory / "queue"),
            "SMTPAUTH": "",
        }
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                command, env=environ, stdout=subprocess.PIPE, stderr=log, start_new_session=True
            )
        self.pid = self._process.pid
        assert self._process.stdout
        port = self._process.stdout.readline()
        if not port:
            sys.exit(f"{program} does not start:\n{self.log.read_text()}")
        self.address = ("127.0.0.1", int(port))
        for _ in _until(_CALM):
            if self._process.poll() is not None:
                break
            if self.workers:  # it heeds signals
                return
        self._process.kill()
        sys.exit(f"{program} does not serve: {self.last_words()}")

    @property
    def workers(self) -> list[int]:
        """The process ids of the parent's children."""
        children = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text()
        return [int(pid) for pid in children.split()]

    def status(self) -> int:
        """How many connections the listener says are in use, when it is asked by ALRM."""
        before = self.log.stat().st_size
        self.signal(signal.SIGALRM)
        for _ in _until(_CALM):
            with self.log.open("rb") as log:
                log.seek(before)
                found = re.search(rb"listen: status: (\d+)/", log.read())
            if found:
                return int(found[1])
        raise TimeoutError("no answer to SIGALRM")

    def signal(self, number: int) -> None:
        """Send the parent a signal."""
        os.kill(self.pid, number)

    def renew(self, number: int) -> None:
        """Send the parent HUP or USR2, and wait until it has done all that this asks of it."""
        before = set(self.workers)
        self.signal(number)
        for _ in _until(_CALM):
            if before.isdisjoint(self.workers):
                break
        else:
            raise TimeoutError("workers that do not end")
        self.status()
        self.status()  # it answers before it forks: now it has done that

    def kill_worker(self, chance: random.Random) -> bool:
        """Kill one of the workers; whether there was one."""
        try:
            os.kill(chance.choice(self.workers), signal.SIGKILL)
        except (IndexError, ProcessLookupError):
            return False
        return True

    def sample(self) -> Sample:
        """See how it is."""
        at_work = filter(_is_at_work, self.workers)
        workers = [found for found in map(_look_at, at_work) if found is not None]
        parent = _look_at(self.pid)
        if parent is None:
            raise RuntimeError(f"the listener is gone: {self.last_words()}")
        memory, descriptors = (max(values) for values in zip((0.0, 0), *workers))
        return Sample(parent[0], memory, parent[1], descriptors, 1 + len(workers))

    def rest(self) -> Sample:
        """See how it is when the last session is over."""
        for _ in _until(_CALM):
            if self.status() == 0:
                return self.sample()
        raise TimeoutError("connections in use that no client has")

    def last_words(self) -> str:
        """The last line of the log."""
        return (self.log.read_text(errors="replace").splitlines() or [""])[-1]

    def stop(self) -> tuple[int, list[int]]:
        """End it: its exit status, and processes that it left."""
        self.signal(signal.SIGTERM)
        status = self._process.wait(_CALM)
        return status, processes_of_session(self.pid)


def _until(seconds: float) -> Iterator[None]:
    """Try again until so many seconds are over."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        yield
        time.sleep(0.02)


def _is_at_work(pid: int) -> bool:
    """Whether a worker waits for connections, by epoll(7), or has done so: just forked it still has
    all of its parent's descriptors.
    """
    directory = f"/proc/{pid}/fd"
    try:
        open_files = [os.readlink(f"{directory}/{number}") for number in os.listdir(directory)]
    except OSError:
        return False
    return "anon_inode:[eventpoll]" in open_files


def _look_at(pid: int) -> tuple[float, int] | None:
    """Anonymous memory in MiB and open descriptors of a process, or None if it is gone.

    What is shared with parent or children counts in full: what a process has to itself changes with
    what the others do.
    """
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
        descriptors = len(os.listdir(f"/proc/{pid}/fd"))
    except OSError:
        return None
    anonymous = re.search(r"^Anonymous: +(\d+) kB", text, re.M)
    return int(anonymous[1]) / 1024 if anonymous else 0.0, descriptors


def processes_of_session(session: int) -> list[int]:
    """The processes of a session (setsid(2)), zombies not counted."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, _, its_session = path.read_text().rpartition(")")[2].split()[:4]
            if int(its_session) == session and state != "Z":
                found.append(int(path.parent.name))
    return found
