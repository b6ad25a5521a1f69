"""Measure what sessions of qmail-smtpd cost: CPU time as ratios, waits, memory.

    python3 bench/bench.py [--program PATH] [--peer PATH] [--rounds N] [--megabytes N]

The program is compared with a bare interpreter, `python -I -S -c pass`, and with a peer: another
qmail-smtpd with the same interface, where one is named by --peer or the variable PEER.  A figure in
milliseconds says as much of the machine as of the program; a ratio of two that were measured a
moment apart says nearly nothing of it.  So each round runs all of them, every other round in
reverse, and what is printed are medians over the rounds, with the least and the largest.

bench/README.md says how to read it.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import dialogues
from cost import Cost, Process, connection

HERE = Path(__file__).resolve().parent
BARE = "bare"


class Scenario(NamedTuple):
    """A kind of session, how many of it make a cell, and what the program is to reach.

    `of_bare` and `of_peer` are CPU time as a ratio, `memory` is in MiB.
    """

    name: str
    dialogue: dialogues.Dialogue
    sessions: int
    of_bare: float | None = None
    of_peer: float | None = None
    memory: float | None = None


class Bench:
    """The programs, their environment, and what was measured."""

    def __init__(
        self, programs: dict[str, str], interpreter: str, home: str, helpers: Path
    ) -> None:
        self.programs = programs
        self._interpreter = interpreter
        self._helpers = helpers
        self._environ = {
            "PATH": os.defpath,
            "QMAILHOME": home,
            "QMAILQUEUE": str(helpers / "null-queue"),
            "SMTPAUTH": "",
            "RELAYCLIENT": "",
            "DATABYTES": "0",
            "TCPREMOTEIP": "127.0.0.1",
            "TCPREMOTEHOST": "localhost",
            "TCPLOCALIP": "127.0.0.1",
            "TCPLOCALHOST": "localhost",
            "TCPLOCALPORT": "25",
        }

    def bare(self) -> Cost:
        """What it costs to start the interpreter and to do nothing."""
        return Process([self._interpreter, "-I", "-S", "-c", "pass"], self._environ, {}).cost()

    def session(
        self, name: str, dialogue: dialogues.Dialogue, environ: dict[str, str] | None = None
    ) -> Cost:
        """What a session costs; exits with a word on it if it goes wrong."""
        command = [self.programs[name], str(self._helpers / "null-check"), "true"]
        environ = {**self._environ, **(environ or {})}
        log = self._helpers / "log"
        try:
            with log.open("wb") as file, connection() as (end, server):
                socket = server.fileno()
                process = Process(command, environ, {0: socket, 1: socket, 2: file.fileno()})
                server.close()
                client = dialogues.Client(end)
                client.expect(220)
                dialogue(client)
                memory = process.memory()
                client.quit()
            return process.cost()._replace(memory=memory, waits=client.waits)
        except (OSError, RuntimeError) as error:
            sys.exit(f"{log.read_text()}{name}: {self.programs[name]}: {error}")

    def verify(self) -> None:
        """See that each program delivers a message to the octet: to be fast and wrong is easy."""
        data = dialogues.mail_data(dialogues.LINE + dialogues.SHORT_LINES, 200_000)
        copy = self._helpers / "copy"
        environ = {"QMAILQUEUE": str(self._helpers / "keep-queue"), "COPY": str(copy)}
        for name in self.programs:
            self.session(name, dialogues.message(data), environ)
            delivered = copy.read_bytes().split(b"\n", 2)[2]  # behind the two lines of Received
            if delivered != data.replace(b"\r\n", b"\n").replace(b"\n.", b"\n"):
                sys.exit(f"{name}: the message was not delivered as it was sent")

    def cell(self, name: str, scenario: Scenario) -> Cost:
        """What one session costs on average, of as many as the scenario has."""
        costs = [
            self.bare() if name == BARE else self.session(name, scenario.dialogue)
            for _ in range(scenario.sessions)
        ]
        return Cost(
            statistics.fmean(cost.own for cost in costs),
            statistics.fmean(cost.children for cost in costs),
            max(cost.memory for cost in costs),
            {
                wait: statistics.median(cost.waits[wait] for cost in costs)
                for wait in costs[0].waits
            },
        )

    def measure(self, scenario: Scenario, rounds: int) -> dict[str, list[Cost]]:
        """The cells of a scenario: for each program, and the bare interpreter, one a round."""
        for name in self.programs:
            self.session(name, scenario.dialogue)  # what was not in memory is now
        names = [BARE, *self.programs]
        cells: dict[str, list[Cost]] = {name: [] for name in names}
        for number in range(rounds):
            for name in names if number % 2 == 0 else reversed(names):
                cells[name].append(self.cell(name, scenario))
        return cells


def spread(values: Sequence[float], form: str) -> str:
    """Median and range: `1.23 [1.20-1.30]`."""
    figures = (statistics.median(values), min(values), max(values))
    return "{} [{}-{}]".format(*(format(figure, form) for figure in figures))


def ratios(cells: dict[str, list[Cost]], name: str, to: str) -> list[float]:
    """CPU time of one as a ratio to another's, round by round."""
    return [one.cpu / other.cpu for one, other in zip(cells[name], cells[to])]


def report(scenario: Scenario, cells: dict[str, list[Cost]]) -> None:
    """Print what was measured, a line for each program, and the goals."""
    for name, costs in cells.items():
        words = [f"{scenario.name:<12} {name:<8}"]
        words.append(f"{spread([cost.own * 1e3 for cost in costs], '.2f'):>24}")
        words.append(f"{statistics.median(cost.children for cost in costs) * 1e3:8.2f}")
        words.append(f"{max(cost.memory for cost in costs):6.1f}")
        words.append(f"{spread(ratios(cells, name, BARE), '.2f'):>22}")
        if "peer" in cells:
            words.append(f"{spread(ratios(cells, name, 'peer'), '.2f'):>22}")
        print(" ".join(words))
        for wait in costs[0].waits:
            figures = spread([cost.waits[wait] * 1e3 for cost in costs], ".1f")
            print(f"{'':12} {name:<8}   {wait}: {figures} ms")
    for line in goals(scenario, cells):
        print(f"{'':12} {line}")
    sys.stdout.flush()


def goals(scenario: Scenario, cells: dict[str, list[Cost]]) -> list[str]:
    """What the program was to reach in this scenario, and whether it did."""
    found = []
    for to, goal in ((BARE, scenario.of_bare), ("peer", scenario.of_peer)):
        if goal is not None and to in cells:
            ratio = statistics.median(ratios(cells, "program", to))
            found.append((ratio <= goal, f"CPU at most {goal} of {to}: {ratio:.2f}"))
    if scenario.memory is not None:
        memory = max(cost.memory for cost in cells["program"])
        found.append((memory <= scenario.memory, f"at most {scenario.memory} MiB: {memory:.1f}"))
    return [f"{'reached' if reached else 'MISSED'}: {goal}" for reached, goal in found]


def scenarios(megabytes: int, with_tls: bool) -> list[Scenario]:
    """What is measured, the short sessions first."""
    small = dialogues.mail_data(dialogues.LINE, 2048)
    large = dialogues.mail_data(dialogues.LINE, megabytes * 10**6)
    dots = dialogues.mail_data(dialogues.SHORT_LINES, megabytes * 10**6)
    in_clear = [
        Scenario("plain", dialogues.plain, 20, of_bare=1.4, memory=16),
        Scenario("message", dialogues.message(small), 10),
        Scenario("bulk", dialogues.message(large), 1, of_peer=1.0, memory=16),
        Scenario("dots", dialogues.message(dots), 1),
    ]
    over_tls = [
        Scenario("tls", dialogues.tls, 5),
        Scenario("tls-far", dialogues.far_tls, 3),
        Scenario("submission", dialogues.submission(small), 5),
        Scenario("bulk-tls", dialogues.message_over_tls(large), 1, of_peer=1.0),
    ]
    return in_clear + (over_tls if with_tls else [])


# What is set up


def interpreter_of(program: str) -> str:
    """The interpreter that the program's first line names, or the one that runs this."""
    with open(program, "rb") as file:
        first = file.readline()
    words = [os.fsdecode(word) for word in first[2:].split()] if first.startswith(b"#!") else []
    named = next((word for word in words if "python" in os.path.basename(word)), sys.executable)
    return shutil.which(named) or sys.executable


def make_helpers(directory: Path) -> str:
    """Put an idle qmail-queue and checkpassword into a directory; how they were made."""
    keep = '#!/bin/sh\ncat >"$COPY" && exec cat <&1 >/dev/null\n'
    write_program(directory / "keep-queue", keep)
    compiler = shutil.which("cc")
    for name, first, last in (("null-queue", 0, 1), ("null-check", 3, 3)):
        if compiler:
            define = [f"-DFIRST={first}", f"-DLAST={last}"]
            compile_static(compiler, define, HERE / "drain.c", directory / name)
        else:
            drain = f"for fd in range({first}, {last + 1}):\n while os.read(fd, 65536): pass\n"
            write_program(directory / name, f"#!{sys.executable} -IS\nimport os\n{drain}")
    return "compiled" if compiler else "Python, as there is no cc: they cost more than the program"


def compile_static(compiler: str, options: list[str], source: Path, target: Path) -> None:
    """Make a program from C, without shared libraries if that can be."""
    command = [compiler, "-O2", *options, "-o", str(target), str(source)]
    static = subprocess.run([*command, "-static"], check=False, stderr=subprocess.DEVNULL)
    if static.returncode:
        subprocess.run(command, check=True)


def write_program(path: Path, text: str) -> None:
    """Make a program from a script."""
    path.write_text(text)
    path.chmod(0o755)


def make_home(home: Path) -> None:
    """A qmail home with what the sessions need, and a certificate, if openssl is there."""
    control = home / "control"
    control.mkdir(parents=True)
    (control / "me").write_text("localhost\n")
    if shutil.which("openssl"):
        command = "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost"
        command += " -keyout key.pem -out certificate.pem"
        subprocess.run(command.split(), cwd=home, check=True, stderr=subprocess.DEVNULL)
        pair = (home / "key.pem").read_text() + (home / "certificate.pem").read_text()
        (control / "servercert.pem").write_text(pair)


def home_of(peer: str | None) -> Path | None:
    """The home that is compiled into a peer, as far as its path shows it; it is only read."""
    home = Path(peer).resolve().parent.parent if peer else None
    return home if home and (home / "control/me").exists() else None


def set_up(stack: contextlib.ExitStack, peer: str | None) -> tuple[Path, str, Path]:
    """A directory with helpers, how they were made, and a qmail home: the peer's, or a new one."""
    directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-")))
    made = make_helpers(directory)
    home = home_of(peer)
    if home is None:
        home = directory / "home"
        make_home(home)
    return directory, made, home


def options() -> argparse.Namespace:
    """What was asked for on the command line and in the environment."""
    default = os.environ.get("PROGRAM") or str(HERE.parent / "bin/qmail-smtpd")
    parser = argparse.ArgumentParser(description="Measure what sessions of qmail-smtpd cost.")
    parser.add_argument("--program", default=default, help="the program (%(default)s)")
    parser.add_argument("--peer", default=os.environ.get("PEER") or None, help="another one")
    parser.add_argument("--rounds", type=int, default=9, help="(%(default)s)")
    parser.add_argument("--megabytes", type=int, default=50, help="mail data of bulk (%(default)s)")
    names = [scenario.name for scenario in scenarios(0, with_tls=True)]
    parser.add_argument("--only", choices=names, nargs="+", help="these scenarios")
    return parser.parse_args()


def main() -> None:
    """Set up, measure, and print."""
    chosen = options()
    programs = {"program": os.path.abspath(chosen.program)}
    if chosen.peer:
        programs["peer"] = os.path.abspath(chosen.peer)
    with contextlib.ExitStack() as stack:
        directory, made, home = set_up(stack, chosen.peer)
        interpreter = interpreter_of(programs["program"])
        bench = Bench(programs, interpreter, str(home), directory)
        bench.verify()
        print(f"program      {programs['program']}\npeer         {programs.get('peer', 'none')}")
        print(f"bare         {interpreter} -I -S -c pass\ncontrol      {home}/control")
        print(f"helpers      {made}\nrounds       {chosen.rounds}\n")
        print_heading(with_peer="peer" in programs)
        with_tls = (home / "control/servercert.pem").exists()
        known = {scenario.name: scenario for scenario in scenarios(chosen.megabytes, with_tls)}
        for scenario in [known[name] for name in chosen.only or known]:
            report(scenario, bench.measure(scenario, chosen.rounds))
        if not with_tls:
            print("no TLS was measured: there is no control/servercert.pem")


def print_heading(with_peer: bool) -> None:
    """Print what the columns are."""
    print(f"{'scenario':<12} {'':<8} {'CPU ms':>24} {'children':>8} {'MiB':>6}", end=" ")
    print(f"{'CPU / bare':>22}", f"{'CPU / peer':>22}" if with_peer else "")


if __name__ == "__main__":
    main()
