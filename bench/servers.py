"""Measure what whole servers cost: a peer and this program under tcpserver, and the listener.

    python3 bench/servers.py --peer /var/qmail/bin/qmail-smtpd [--bin DIRECTORY] [--rounds N]

    peer        the program that --peer names, under tcpserver
    one-shot    qmail-smtpd, under tcpserver
    helper      the same, with a listener that does TLS for it (TLSHELPER)
    listener    qmail-smtpd-listen
    max-use 1   the same, with a process for each connection

Each is started once, takes what clients on loopback send it, and is asked what CPU time it used,
with all its processes, those that have ended and those that live.  A cell lasts so many seconds,
and a round has one of each server, every other round in reverse.  What is printed are CPU time for
a session, and its ratio to the peer's, as medians over the rounds with the least and the largest.

bench/README.md says how to read it.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import dialogues
from listening import processes_of_session

from bench import set_up, spread

LIMIT = 400
"""Connections at a time (-c)."""

CROWD = 200
"""Clients that come at once."""

_TICKS = os.sysconf("SC_CLK_TCK")
_SERVE_SECONDS = 20.0  # until a server serves


class Kind(NamedTuple):
    """A kind of session: what is said in it, by how many clients at a time."""

    name: str
    dialogue: dialogues.Dialogue
    clients: int = 1


class Cell(NamedTuple):
    """What a server did in a moment: sessions, seconds, and CPU time in seconds."""

    sessions: int
    seconds: float
    cpu: float

    @property
    def cost(self) -> float:
        """CPU time for a session, in milliseconds."""
        return self.cpu / self.sessions * 1e3


class Server:
    """A server that runs, and prints its port as tcpserver -1 does."""

    def __init__(self, name: str, command: list[str], environ: dict[str, str], log: Path) -> None:
        self.name = name
        self._log = log
        with log.open("ab") as file:
            self._process = subprocess.Popen(
                command, env=environ, stdout=subprocess.PIPE, stderr=file, start_new_session=True
            )
        assert self._process.stdout
        port = self._process.stdout.readline()
        if not port:
            sys.exit(f"{name} does not start:\n{log.read_text()}")
        self._address = ("127.0.0.1", int(port))

    def session(self, dialogue: dialogues.Dialogue) -> None:
        """Have a session; raises OSError or RuntimeError if it goes wrong."""
        with socket.create_connection(self._address, timeout=_SERVE_SECONDS) as connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            client = dialogues.Client(connection)
            client.expect(220)
            dialogue(client)
            client.quit()

    def cell(self, kind: Kind, seconds: float) -> Cell:
        """Have sessions for so many seconds; exits with a word on it if one goes wrong."""
        begin, before = time.monotonic(), self._cpu()
        sessions = _crowd(kind, lambda: self.session(kind.dialogue), begin + seconds)
        if not sessions:
            sys.exit(f"{self.name}, {kind.name}: a session went wrong\n{self._log.read_text()}")
        return Cell(sessions, time.monotonic() - begin, self._cpu() - before)

    def stop(self) -> None:
        """End it, and all that it started."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            for pid in processes_of_session(self._process.pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(5)

    def _cpu(self) -> float:
        """CPU time of all processes so far, in seconds: those that live, and those waited for."""
        ticks = 0
        for pid in processes_of_session(self._process.pid):
            with contextlib.suppress(OSError):
                fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
                ticks += sum(map(int, fields[11:15]))
        return ticks / _TICKS


def _crowd(kind: Kind, session: Callable[[], None], until: float) -> int:
    """Have sessions until then, by so many clients at a time; how many, 0 if one went wrong."""
    counts = [0] * kind.clients
    wrong: list[str] = []

    def client(number: int) -> None:
        while not wrong and (not counts[number] or time.monotonic() < until):
            try:
                session()
            except (OSError, RuntimeError) as error:
                wrong.append(f"{kind.name}: {error}")
            counts[number] += 1

    threads = [threading.Thread(target=client, args=(number,)) for number in range(kind.clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print(*wrong[:1], sep="\n", end="\n" if wrong else "", file=sys.stderr)
    return 0 if wrong else sum(counts)


def kinds(megabytes: int) -> list[Kind]:
    """What is measured."""
    small = dialogues.mail_data(dialogues.LINE, 2048)
    large = dialogues.mail_data(dialogues.LINE, megabytes * 10**6)
    dots = dialogues.mail_data(dialogues.SHORT_LINES, megabytes * 10**6)
    return [
        Kind("connect, EHLO, QUIT", dialogues.plain),
        Kind("EHLO, STARTTLS, EHLO", dialogues.tls),
        Kind("STARTTLS, AUTH, 2 KB", dialogues.submission(small)),
        Kind("2 KB in clear", dialogues.message(small)),
        Kind(f"2 KB, {CROWD} clients", dialogues.message(small), CROWD),
        Kind(f"{megabytes} MB in clear", dialogues.message(large)),
        Kind(f"{megabytes} MB over TLS", dialogues.message_over_tls(large)),
        Kind(f"{megabytes} MB of short lines", dialogues.message(dots)),
    ]


def servers(
    chosen: argparse.Namespace, directory: Path, home: Path, environ: dict[str, str]
) -> list[Server]:
    """Start all of them."""
    check = [str(directory / "null-check"), "true"]
    options = ["-1", "-R", "-H", "-l", "localhost", "-c", str(LIMIT), "127.0.0.1", "0"]
    under_tcpserver = ["tcpserver", "-D", "-b", "512", *options]
    program, listen = (os.path.join(chosen.bin, f"qmail-smtpd{end}") for end in ("", "-listen"))
    helper = str(directory / "helper")
    environ = {**environ, "QMAILHOME": str(home)}
    with_helper = {**environ, "TLSHELPER": helper}
    log = directory / "log"
    helping = f'{listen} -c {LIMIT} --helper={helper} & exec "$@"'
    commands = {
        "peer": [*under_tcpserver, chosen.peer, *check],
        "one-shot": [*under_tcpserver, program, *check],
        "helper": ["sh", "-c", helping, "sh", *under_tcpserver, program, *check],
        "listener": [listen, *options, *check],
        "max-use 1": [listen, "--max-use=1", *options, *check],
    }
    return [
        Server(name, command, with_helper if name == "helper" else environ, log)
        for name, command in commands.items()
    ]


def measure(found: list[Server], kind: Kind, chosen: argparse.Namespace) -> dict[str, list[Cell]]:
    """The cells of a kind of session: for each server one a round."""
    for server in found:
        server.cell(kind, 0.2)  # what was not warm is now
    cells: dict[str, list[Cell]] = {server.name: [] for server in found}
    for number in range(chosen.rounds):
        for server in found if number % 2 == 0 else reversed(found):
            cells[server.name].append(server.cell(kind, chosen.seconds))
    return cells


def report(kind: Kind, cells: dict[str, list[Cell]]) -> None:
    """Print what was measured, a line for each server."""
    for name, found in cells.items():
        costs = spread([cell.cost for cell in found], ".2f")
        pairs = zip(found, cells["peer"])
        to_peer = spread([one.cost / other.cost for one, other in pairs], ".2f")
        pace = spread([cell.sessions / cell.seconds for cell in found], ".0f")
        print(f"{kind.name:<24} {name:<10} {costs:>24} {to_peer:>20} {pace:>20}", flush=True)


def arguments() -> argparse.Namespace:
    """What was asked for on the command line and in the environment."""
    parser = argparse.ArgumentParser(description="Measure what servers of SMTP cost.")
    peer = os.environ.get("PEER")
    parser.add_argument("--peer", default=peer, required=not peer, help="a qmail-smtpd")
    parser.add_argument("--bin", default="/usr/local/qmail-smtpd-py/bin", help="(%(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="(%(default)s)")
    parser.add_argument("--seconds", type=float, default=1.0, help="of a cell (%(default)s)")
    parser.add_argument("--megabytes", type=int, default=50, help="(%(default)s)")
    parser.add_argument("--only", help="kinds of sessions with this in their name")
    return parser.parse_args()


def main() -> None:
    """Set up, measure, and print."""
    chosen = arguments()
    if not shutil.which("tcpserver"):
        sys.exit("there is no tcpserver")
    with contextlib.ExitStack() as stack:
        directory, made, home = set_up(stack, chosen.peer)
        environ = {"PATH": os.environ["PATH"], "QMAILQUEUE": str(directory / "null-queue")}
        environ.update({"SMTPAUTH": "", "RELAYCLIENT": "", "DATABYTES": "0"})
        found = servers(chosen, directory, home, environ)
        for server in found:
            stack.callback(server.stop)
        print(f"peer {chosen.peer}, control files {home}/control, helpers {made}\n")
        print(f"{'session':<24} {'server':<10} {'CPU ms':>24} {'/ peer':>20} {'a second':>20}")
        for kind in kinds(chosen.megabytes):
            if not chosen.only or chosen.only in kind.name:
                report(kind, measure(found, kind, chosen))


if __name__ == "__main__":
    main()
