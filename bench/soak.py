"""Soak qmail-smtpd-listen: many sessions of mixed kinds, killed workers, a restart in the middle.

    python3 bench/soak.py [--program PATH] [--sessions N] [--clients N] [--seed N]

The listener is started on a port of loopback, with a queue program that notes what it is given.
While clients run the sessions of mixture.py, workers chosen at random are killed (SIGKILL), all are
replaced (HUP) at each quarter, and in the middle the listener is restarted (USR2).  Then:

    messages      each that was acknowledged is in the queue once, octet for octet; each that was
                  not is there once at most, and one that the client cut off is not
    connections   none is refused, none is lost but those of workers that were killed, and no reply
                  is a wrong one
    leaks         memory does not grow; idle processes have as many descriptors as at the start; no
                  process is left
    the log       has no word of a defect

Exit status 1 where one of them is not so.
"""

from __future__ import annotations

import argparse
import collections
import functools
import multiprocessing
import os
import random
import re
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from listening import Listener, Sample, processes_of_session
from mixture import BATCH, Message, Outcome, run_batch

import bench

HERE = Path(__file__).resolve().parent

KILL_EVERY = 2
"""Batches from one killed worker to the next."""

GROWTH = 1.0
"""MiB that a process may grow by: it fluctuates by less."""


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
        if number in (self.batches // 4, self.batches * 3 // 4):
            self.listener.renew(signal.SIGHUP)
        elif number == self.batches // 2:
            self.listener.renew(signal.SIGUSR2)
        elif number % KILL_EVERY == 0:
            self.kills += self.listener.kill_worker(self._chance)

    def growth(self, process: str) -> float:
        """By how many MiB the parent or the largest worker grew, at most: in each life, before the
        restart and after it, from the most that it had until HUP to the usual after that.

        Two lives are not compared: how the heap begins differs by a MiB from start to start.
        """
        values: list[float] = [getattr(sample, process) for sample in self.samples]
        quarters = [values[len(values) * at // 4 : len(values) * (at + 1) // 4] for at in range(4)]
        lives = (quarters[:2], quarters[2:])
        return max(statistics.median(after) - max(until) for until, after in lives)


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
    for message in found.keys() - {*outcome.acknowledged, *outcome.open, *outcome.cut_off}:
        yield f"in the queue, and never sent: {message}"


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
    kinds = ", ".join(f"{kind} {count}" for kind, count in outcome.kinds.most_common())
    sent, left, cut_off = map(len, (outcome.acknowledged, outcome.open, outcome.cut_off))
    _line("sessions", f"{total} in {seconds:.0f} s, {total / seconds:.0f} a second: {kinds}")
    _line("TLS", f"{outcome.resumed} sessions resumed")
    _line("messages", f"{sent} acknowledged, {left} not, {cut_off} cut off by the client")
    _line("connections", f"{outcome.refused} refused, {outcome.lost} lost")
    _line("killed", f"{soak.kills} workers")
    for process in ("parent", "worker"):
        trend = _trend([getattr(sample, process) for sample in samples])
        was, became = (getattr(sample, f"{process}_descriptors") for sample in (before, after))
        _line(process, f"{trend} MiB, growth {soak.growth(process):.2f}")
        _line("", f"{was} descriptors at the start, {became} at the end")
    most = max(sample.processes for sample in samples)
    _line(
        "processes",
        f"{before.processes} at the start, {most} at most, {after.processes} at the end",
    )


def _line(name: str, text: str) -> None:
    print(f"{name:<12} {text}")


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
        # Only now, as it is by SIGTERM that a pool ends its processes.
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit("ended by SIGTERM"))
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
            for pid in processes_of_session(listener.pid):
                os.kill(pid, signal.SIGKILL)
    for fault in found[:20]:
        _line("FAULT", fault)
    _line("faults", str(len(found)))
    return 1 if found else 0


def main() -> int:
    """Make what the listener needs, and soak it."""
    chosen = options()
    compiler = shutil.which("cc")
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
