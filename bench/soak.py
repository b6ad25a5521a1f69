"""Soak qmail-smtpd-listen: many sessions of mixed kinds, killed workers, a restart in the middle.

    python3 bench/soak.py [--program PATH] [--sessions N] [--clients N] [--seed N]

The listener is started on a port of loopback, with a queue program that notes what it is given.
While clients run the sessions of mixture.py, workers chosen at random are killed (SIGKILL), all are
replaced (HUP) at each quarter, and in the middle the listener is restarted (USR2).  Then:

    messages      each that was acknowledged is in the queue once, octet for octet; each that was not
                  is there once at most, and one that the client cut off is not
    connections   none is refused, none is lost but those of workers that were killed, and no reply is
                  a wrong one
    leaks         memory does not grow from the first half of a listener's life to the second; idle
                  processes have as many descriptors as at the start; no process is left
    the log       has no word of a defect

Exit status 1 where one of them is not so.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import functools
import multiprocessing
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import bench
from mixture import BATCH, Message, Outcome, run_batch

HERE = Path(__file__).resolve().parent

KILL_EVERY = 2
"""Batches from one killed worker to the next."""

GROWTH = 1.0
"""MiB that a process may grow by, where it has not grown by more than a fluctuation."""

LIMIT = 40
"""Connections at a time (-c)."""

_CALM = 30.0  # seconds for the listener to become idle, or to end


class Sample(NamedTuple):
    """The listener at one moment: anonymous memory in MiB and open descriptors, of the parent, and of
    the worker that has most.
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
            if self.workers:  # it heeds signals
                return

    @property
    def workers(self) -> list[int]:
        """The process ids of the parent's children."""
        return list(map(int, Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()))

    @property
    def busy(self) -> int:
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

    def kill_worker(self, chance: random.Random) -> bool:
        """Kill one of the workers; whether there was one."""
        try:
            os.kill(chance.choice(self.workers), signal.SIGKILL)
        except (IndexError, ProcessLookupError):
            return False
        return True

    def sample(self) -> Sample:
        """See how it is."""
        workers = [
            found for found in map(_look_at, self.workers) if found is not None
        ] or [(0.0, 0)]
        parent = _look_at(self.pid)
        if parent is None:
            raise RuntimeError(f"the listener is gone: {self.last_words()}")
        memory, descriptors = zip(*workers)
        return Sample(parent[0], max(memory), parent[1], max(descriptors), 1 + len(workers))

    def rest(self) -> Sample:
        """See how it is when the last session is over."""
        for _ in _until(_CALM):
            if self.busy == 0:
                return self.sample()
        raise TimeoutError("connections in use that no client has")

    def last_words(self) -> str:
        """The last line of the log."""
        return (self.log.read_text(errors="replace").splitlines() or [""])[-1]

    def stop(self) -> tuple[int, list[int]]:
        """End it: its exit status, and processes that it left."""
        self.signal(signal.SIGTERM)
        status = self._process.wait(_CALM)
        return status, _processes_of_session(self.pid)


def _until(seconds: float) -> Iterator[None]:
    """Try again until so many seconds are over."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        yield
        time.sleep(0.02)


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


def _processes_of_session(session: int) -> list[int]:
    """The processes of a session (setsid(2)), zombies not counted."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, _, its_session = path.read_text().rpartition(")")[2].split()[:4]
            if int(its_session) == session and state != "Z":
                found.append(int(path.parent.name))
    return found


class Soak:
    """The run: what was done to the listener, and what was seen."""

    def __init__(self, listener: Listener, batches: int, seed: int) -> None:
        self.listener = listener
        self.batches = batches
        self.outcome = Outcome()
        self.samples: list[Sample] = []
        self.kills = 0
        self._chance = random.Random(seed)
        self._stride = max(1, batches // 200)

    def take(self, number: int, outcome: Outcome) -> None:
        """A batch is over, the number-th: see how all is, and disturb it."""
        self.outcome.add(outcome)
        if number % self._stride == 0:
            self.samples.append(self.listener.sample())
        if number % KILL_EVERY == 0:
            self.kills += self.listener.kill_worker(self._chance)
        if number in (self.batches // 4, self.batches * 3 // 4):
            self.listener.signal(signal.SIGHUP)
        elif number == self.batches // 2:
            self.listener.signal(signal.SIGUSR2)

    def growth(self, process: str) -> float:
        """By how many MiB the parent or the largest worker grew, in the worse of its two lives: from
        the most in the first half of a life to the usual in the second.
        """
        values = [getattr(sample, process) for sample in self.samples]
        quarters = [values[len(values) * at // 4 : len(values) * (at + 1) // 4] for at in range(4)]
        first, second, third, fourth = quarters
        lives = ((first, second), (third, fourth))
        return max(statistics.median(later) - max(sooner) for sooner, later in lives)


def misqueued(outcome: Outcome, queue: Path) -> Iterator[str]:
    """What is in the queue and should not be, or the other way round."""
    lines = queue.read_text().splitlines() if queue.exists() else []
    found = collections.Counter(
        Message(name, int(length), int(sum_)) for name, length, sum_ in map(str.split, lines)
    )
    for message in outcome.acknowledged:
        if found[message] != 1:
            yield f"acknowledged, and {found[message]} times in the queue: {message.name}"
    for message in outcome.open:
        if found[message] > 1:
            yield f"not acknowledged, and {found[message]} times in the queue: {message.name}"
    for message in outcome.cut_off:
        if found[message]:
            yield f"cut off, and in the queue: {message.name}"
    sent = {*outcome.acknowledged, *outcome.open, *outcome.cut_off}
    yield from (f"in the queue, and never sent: {message}" for message in found if message not in sent)


def complaints(log: Path, kills: int) -> Iterator[str]:
    """Lines of the log that tell of a defect, or of more crashes than there were kills."""
    killed = 0
    with log.open(errors="replace") as lines:
        for line in lines:
            if re.search(r"listen: warning: worker \d+ was killed by signal 9\b", line):
                killed += 1
            elif re.search(r"internal error|listen: (warning|fatal)|Traceback", line):
                yield line.strip()
    if killed > kills:
        yield f"{killed} workers were killed by signal 9, and we killed {kills}"


def faults(soak: Soak, queue: Path, before: Sample, after: Sample) -> Iterator[str]:
    """All that is not as it should be."""
    outcome = soak.outcome
    yield from misqueued(outcome, queue)
    yield from complaints(soak.listener.log, soak.kills)
    yield from outcome.wrong
    if outcome.refused:
        yield f"{outcome.refused} connections were refused"
    if outcome.lost > soak.kills:
        yield f"{outcome.lost} connections were lost, and only {soak.kills} workers killed"
    for process in ("parent", "worker"):
        if soak.growth(process) > GROWTH:
            yield f"memory of the {process} grew by {soak.growth(process):.2f} MiB"
        descriptors = f"{process}_descriptors"
        if getattr(after, descriptors) > getattr(before, descriptors):
            was, became = getattr(before, descriptors), getattr(after, descriptors)
            yield f"the {process} had {was} descriptors, and has {became} now"
    status, left = soak.listener.stop()
    if status or left:
        yield f"the listener ended with status {status}, and left processes {left}"


def report(soak: Soak, seconds: float, before: Sample, after: Sample) -> None:
    """Print what was done, and what was seen."""
    outcome, samples = soak.outcome, soak.samples
    total = sum(outcome.kinds.values())
    print(f"sessions      {total} in {seconds:.0f} s ({total / seconds:.0f} a second)")
    print(f"              {', '.join(f'{kind} {n}' for kind, n in outcome.kinds.most_common())}")
    print(f"TLS           {outcome.resumed} sessions resumed")
    print(f"messages      {len(outcome.acknowledged)} acknowledged, {len(outcome.open)} not,", end=" ")
    print(f"{len(outcome.cut_off)} cut off by the client")
    print(f"connections   {outcome.refused} refused, {outcome.lost} lost; {soak.kills} workers killed")
    for process in ("parent", "worker"):
        values = [getattr(sample, process) for sample in samples]
        print(f"{process:<13} {_trend(values)} MiB; growth {soak.growth(process):.2f} MiB")
    print(f"descriptors   parent {before.parent_descriptors}, then {after.parent_descriptors};", end=" ")
    print(f"worker {before.worker_descriptors}, then {after.worker_descriptors}")
    print(f"processes     {before.processes}, at most {max(s.processes for s in samples)},", end=" ")
    print(f"then {after.processes}")


def _trend(values: Sequence[float]) -> str:
    """Ten values, from the first to the last."""
    picked = [values[at * (len(values) - 1) // 9] for at in range(10)]
    return " ".join(f"{value:.1f}" for value in picked)


def options() -> argparse.Namespace:
    """What was asked for on the command line."""
    default = os.environ.get("PROGRAM") or str(HERE.parent / "bin/qmail-smtpd-listen")
    parser = argparse.ArgumentParser(description="Soak qmail-smtpd-listen.")
    parser.add_argument("--program", default=default, help="the listener (%(default)s)")
    parser.add_argument("--sessions", type=int, default=2000, help="(%(default)s)")
    parser.add_argument("--clients", type=int, default=12, help="at a time (%(default)s)")
    parser.add_argument("--max-use", type=int, default=1000, help="of a worker (%(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="other sessions (%(default)s)")
    return parser.parse_args()


def run(chosen: argparse.Namespace, directory: Path) -> int:
    """Soak, and say how it was; the exit status."""
    batches = max(4, chosen.sessions // BATCH)  # a sample of each quarter, at least
    with multiprocessing.get_context("fork").Pool(chosen.clients) as clients:
        listener = Listener(os.path.abspath(chosen.program), chosen.max_use, directory)
        soak = Soak(listener, batches, chosen.seed)
        try:
            before = listener.rest()
            start = time.monotonic()
            batch = functools.partial(run_batch, listener.address, chosen.seed)
            for number, outcome in enumerate(clients.imap_unordered(batch, range(batches)), 1):
                soak.take(number, outcome)
            seconds = time.monotonic() - start
            after = listener.rest()
            report(soak, seconds, before, after)
            found = list(faults(soak, directory / "queue", before, after))
        finally:
            for pid in _processes_of_session(listener.pid):
                os.kill(pid, signal.SIGKILL)
    for fault in found[:20]:
        print(f"FAULT         {fault}")
    print(f"{len(found)} faults")
    return 1 if found else 0


def main() -> int:
    """Make what the listener needs, and soak it."""
    chosen = options()
    compiler = bench.shutil.which("cc")
    if not compiler:
        sys.exit("no C compiler (cc) is here, for the queue program")
    with tempfile.TemporaryDirectory(prefix="soak-") as name:
        directory = Path(name)
        bench.make_helpers(directory)
        bench.make_home(directory / "home")
        bench.compile_static(compiler, [], HERE / "record.c", directory / "record")
        return run(chosen, directory)


if __name__ == "__main__":
    sys.exit(main())
