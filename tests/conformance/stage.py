"""A stage: a qmail home, and around it stand-ins for qmail-queue and checkpassword."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

from .cases import FIXTURES, HERE, Case, octets

_RECORDED = ("RELAYCLIENT", "TCPREMOTEINFO", "TCPREMOTEIP")


class Record(NamedTuple):
    """What one run of a stand-in was given.

    `descriptors` has what each was, as /proc names it; `read` what was read from them.
    """

    argv: list[str]
    environ: dict[str, str]
    descriptors: dict[int, str]
    read: dict[int, bytes]

    @property
    def client(self) -> dict[str, str]:
        """What the environment says of the client."""
        return {name: self.environ[name] for name in _RECORDED if name in self.environ}


class Stage:
    """A home directory with its control files, the program's environment and arguments.

    Unless `env` says otherwise, QMAILQUEUE is a stand-in; `@checkpassword` in `args` is the other.
    """

    def __init__(self, directory: Path, recorder: Path) -> None:
        self.home = directory / "home"
        self.tools = directory / "tools"
        self._recorder = recorder
        self._queue = self.tools / "qmail-queue"
        self.tools.mkdir()
        self.home.mkdir()
        self.env = {
            "PATH": os.environ["PATH"],
            "QMAILHOME": str(self.home),
            "QMAILQUEUE": str(self._queue),
        }
        self.args: list[str] = []
        for name in ("qmail-queue", "checkpassword"):
            (self.tools / name).symlink_to(recorder)
            self.plan(name, {"exit": 0})

    @classmethod
    def of(cls, case: Case, directory: Path, recorder: Path) -> Stage:
        """The stage that a case asks for."""
        stage = cls(directory, recorder)
        stage.control(case.control)
        stage.environment(case.env)
        stage.arguments(*case.args)
        stage.plan("qmail-queue", case.queue)
        stage.plan("checkpassword", case.checkpassword)
        return stage

    def control(self, files: dict[str, str | list]) -> None:
        """Write control files: a text, `@NAME` for a fixture, `@directory` and `@loop` for what can
        not be read and not be opened.
        """
        directory = self.home / "control"
        directory.mkdir(exist_ok=True)
        for name, text in files.items():
            path = directory / name
            if text == "@directory":
                path.mkdir()
            elif text == "@loop":
                path.symlink_to(path.name)
            elif isinstance(text, str) and text.startswith("@") and not text.endswith("\n"):
                shutil.copyfile(FIXTURES / text[1:], path)
            else:
                path.write_bytes(octets(text))

    def environment(self, variables: dict[str, str]) -> None:
        """Set variables; `@recorders` in a value is the directory of the stand-ins."""
        for name, value in variables.items():
            self.env[name] = value.replace("@recorders", str(self.tools))

    def arguments(self, *words: str) -> None:
        """Set the program's arguments; `@NAME` is a program."""
        self.args = [self.programs.get(word, word) for word in words]

    @property
    def programs(self) -> dict[str, str]:
        """The programs that a case may name."""
        return {
            "@checkpassword": str(self.tools / "checkpassword"),
            "@missing": str(self.tools / "no-such-program"),
            "@true": shutil.which("true") or "/bin/true",
            "@false": shutil.which("false") or "/bin/false",
        }

    def plan(self, name: str, plans: dict | list) -> None:
        """Plan how a stand-in ends, each of its runs or all of them.

        `as` puts qmail-queue at that place of the home directory, and leaves QMAILQUEUE unset.
        """
        plans = plans if isinstance(plans, list) else [plans]
        program = self.tools / name
        if "as" in plans[0]:
            program = self._queue = self.home / plans[0]["as"]
            program.parent.mkdir()
            program.symlink_to(self._recorder)
            del self.env["QMAILQUEUE"]
        Path(f"{program}.plan").write_text("".join(map(_plan_line, plans)))

    def queued_by(self) -> list[int]:
        """The process ids that qmail-queue had so far."""
        return self._pids(self._queue)

    def checked_by(self) -> list[int]:
        """The process ids that checkpassword had so far."""
        return self._pids(self.tools / "checkpassword")

    @staticmethod
    def _pids(program: Path) -> list[int]:
        runs = Path(f"{program}.runs")
        return [int(line) for line in runs.read_text().split()] if runs.exists() else []

    def deliveries(self) -> list[Record]:
        """The runs of qmail-queue that read what they were given."""
        return [record for record in self.records(self._queue) if record.read]

    def checks(self) -> list[Record]:
        """The runs of checkpassword that read what they were given."""
        return [record for record in self.records(self.tools / "checkpassword") if record.read]

    @staticmethod
    def records(program: Path) -> list[Record]:
        """All runs of a stand-in, in their order."""
        runs = program.parent.glob(program.name + ".[0-9]*")
        return [_read_record(path) for path in sorted(runs, key=lambda path: int(path.suffix[1:]))]


def _plan_line(plan: dict) -> str:
    how = "signal" if "signal" in plan else "exit"
    read = "read" if plan.get("read", True) else "unread"
    return f"{read} {how} {plan.get(how, 0)}\n"


def _read_record(directory: Path) -> Record:
    def entries(item: str) -> list[str]:
        return (directory / item).read_bytes().decode("latin-1").split("\0")[:-1]

    lines = (directory / "descriptors").read_text().splitlines()
    return Record(
        entries("argv"),
        dict(entry.split("=", 1) for entry in entries("environ")),
        {int(number): target for number, _, target in (line.partition(" ") for line in lines)},
        {int(path.name): path.read_bytes() for path in directory.iterdir() if path.name.isdigit()},
    )


def install_recorder(directory: Path) -> Path:
    """A copy of the stand-in that this very Python runs, so that it starts fast: the interpreter
    itself, as the mail user may not reach the environment of this checkout.
    """
    interpreter = os.path.realpath(getattr(sys, "_base_executable", sys.executable))
    _, _, program = (HERE / "recorder").read_text().partition("\n")
    path = directory / "recorder"
    path.write_text(f"#!{interpreter} -IS\n{program}")
    path.chmod(0o755)
    return path


def inheritable() -> set[int]:
    """Descriptors that this process hands on to children: those it was itself started with."""
    found = set()
    for descriptor in map(int, os.listdir("/proc/self/fd")):
        try:
            if os.get_inheritable(descriptor):
                found.add(descriptor)
        except OSError:
            pass  # that of the listing
    return found - {0, 1, 2, 3}
