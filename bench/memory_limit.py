"""Find the smallest `softlimit -m` that qmail-smtpd works under, and what is seen below it.

    python3 bench/memory_limit.py [--program PREFIX/bin/qmail-smtpd] [--megabytes N]

A run file's `softlimit -m` counts address space, of each process by itself: what libraries take of
it, the interpreter's and OpenSSL's, is far more than is ever in memory, and none of it can be seen
in advance.  So it is tried: for each kind of session, limits are halved between until the smallest
is found, to half a megabyte, under which the session goes through; a larger one may still not do,
as libraries are left out for which there is no room.  Printed are that limit, the
largest resident set of qmail-smtpd in such a session without limit, and, for limits that are too
low, what the client saw and the first line of the log that
says what went wrong.  MB are softlimit's, 1,000,000 octets.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import dialogues
from cost import Process, connection

import bench

STEP = 500_000
"""Octets: how exactly the limit is found."""

NO_LIMIT = 10**9


class Kind(NamedTuple):
    """A kind of session; the children are the program's embedded ones, or idle ones."""

    name: str
    dialogue: dialogues.Dialogue
    embedded: bool = False


class Outcome(NamedTuple):
    """How a session went: whether it was well, and what was seen."""

    well: bool
    memory: float
    reply: str
    log: str


def kinds(megabytes: int) -> list[Kind]:
    """What is tried."""
    small = dialogues.mail_data(dialogues.LINE, 2048)
    large = dialogues.mail_data(dialogues.LINE, megabytes * 10**6)
    return [
        Kind("EHLO, QUIT", dialogues.plain),
        Kind("STARTTLS, AUTH, 2 kB", dialogues.submission(small)),
        Kind(f"{megabytes} MB in clear", dialogues.message(large)),
        Kind(f"{megabytes} MB over TLS, AUTH", dialogues.submission(large)),
        Kind("the same, embedded programs", dialogues.submission(large), embedded=True),
    ]


class Trial:
    """The program, its home, and its children."""

    def __init__(self, program: Path, directory: Path) -> None:
        self._program = program
        self._directory = directory
        bench.make_helpers(directory)
        bench.make_home(directory / "home")
        subprocess.run(
            [program.with_name("qmail-smtpd-users"), "set", "bench", "--stdin"],
            env={"QMAILHOME": str(directory / "home")},
            input=b"secret\n",
            stdout=subprocess.DEVNULL,
            check=True,
        )
        found = shutil.which("softlimit")
        if found is None:
            sys.exit("softlimit is not here; it is part of daemontools")
        self._softlimit = found

    def _children(self, embedded: bool) -> tuple[str, str]:
        """The queue and the check program."""
        if embedded:
            names = ("qmail-queue-maildir", "checkpassword-users")
            return str(self._program.with_name(names[0])), str(self._program.with_name(names[1]))
        return str(self._directory / "null-queue"), str(self._directory / "null-check")

    def _environ(self, queue: str) -> Mapping[str, str]:
        home = self._directory / "home"
        return {
            "PATH": os.defpath,
            "QMAILHOME": str(home),
            "QMAILQUEUE": queue,
            "QMAILMAILDIR": str(self._directory / "Maildir"),
            "SMTPAUTH": "",
            "RELAYCLIENT": "",
        }

    def run(self, kind: Kind, limit: int) -> Outcome:
        """Try a session under a limit, in octets."""
        queue, check = self._children(kind.embedded)
        command = [self._softlimit, "-m", str(limit), str(self._program), check, "/bin/true"]
        log = self._directory / "log"
        with log.open("wb") as file, connection() as (end, server):
            ends = {0: server.fileno(), 1: server.fileno(), 2: file.fileno()}
            process = Process(command, self._environ(queue), ends)
            server.close()
            client = dialogues.Client(end)
            memory, seen = 0.0, ""
            try:
                client.expect(220)
                kind.dialogue(client)
                memory = process.memory()
                client.quit()
            except (OSError, RuntimeError) as error:
                seen = str(error)
                os.kill(process.pid, signal.SIGTERM)  # what it had to say, it has said before
            _, status = os.waitpid(process.pid, 0)
        shutil.rmtree(self._directory / "Maildir", ignore_errors=True)
        lines = [line for line in log.read_text(errors="replace").splitlines() if line]
        why = [line for line in lines if " why=" in line or not line.startswith("qmail-smtpd[")]
        return Outcome(not seen and status == 0, memory, seen, (why or lines or [""])[0])

    def smallest(self, kind: Kind) -> int:
        """The smallest limit that lets such a session through, in octets."""
        low, high = 0, NO_LIMIT
        while high - low > STEP:
            middle = (low + high) // 2 // STEP * STEP
            if self.run(kind, middle).well:
                high = middle
            else:
                low = middle
        return high


def report(trial: Trial, kind: Kind) -> None:
    """Print what was found for a kind of session."""
    free = trial.run(kind, NO_LIMIT)
    if not free.well:
        sys.exit(f"{kind.name}: fails without a limit: {free.reply} {free.log}")
    limit = trial.smallest(kind)
    print(f"{kind.name:<28} {limit / 1e6:6.1f} MB   resident {free.memory:5.1f} MiB", flush=True)
    told = set()
    for part in (0.99, 0.9, 0.75, 0.5, 0.25):
        below = trial.run(kind, int(limit * part))
        words = below.log.split("]: ")[-1]
        if words not in told and not below.well:
            print(f"    under {limit * part / 1e6:.1f} MB: {words}")
            print(f"        client: {below.reply or 'hung up'}")
            told.add(words)


def main() -> None:
    """Find the limits and print them."""
    default = os.environ.get("PROGRAM") or "/usr/local/qmail-smtpd-py/bin/qmail-smtpd"
    parser = argparse.ArgumentParser(description="Find the smallest memory limit that works.")
    parser.add_argument("--program", type=Path, default=Path(default), help="(%(default)s)")
    parser.add_argument("--megabytes", type=int, default=300, help="of mail data (%(default)s)")
    chosen = parser.parse_args()
    with contextlib.ExitStack() as stack:
        directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="memory-limit-"))
        trial = Trial(chosen.program.absolute(), Path(directory))
        print(f"{chosen.program}: {bench.interpreter_of(str(chosen.program))}")
        for kind in kinds(chosen.megabytes):
            report(trial, kind)


if __name__ == "__main__":
    main()
