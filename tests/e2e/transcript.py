"""Transcripts: dialogues as a person sees them; transcripts/README.md has the form of the files."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from .conversation import Conversation
from .programs import need
from .service import ADDRESS

_DIRECTORY = Path(__file__).resolve().parent.parent / "transcripts"


class Transcript:
    """One transcript: its command, and turns of what is typed and what is printed then.

    The first turn has nothing typed.
    """

    def __init__(self, name):
        self.turns = [(None, [])]
        for line in (_DIRECTORY / f"{name}.txt").read_text().splitlines():
            if line.startswith("$ "):
                self._command = line[2:]
            elif line.startswith("> "):
                self.turns.append((line[2:], []))
            elif not line.startswith("# "):
                self.turns[-1][1].append(line)

    def command(self, service):
        """The words of the command, for this service."""
        words = shlex.split(self._command)
        words = [word.replace("PORT", str(service.port)) for word in words]
        words = [word.replace("SERVER", ADDRESS) for word in words]
        return need(words[0]) + words[1:]

    def replay(self, service):
        """Type what was typed, each line when all that was printed before has come; what came."""
        *turns, (last, _) = self.turns
        is_telnet = self._command.startswith("telnet ")
        with Conversation(self.command(service), ends_by_itself=is_telnet) as client:
            for typed, printed in turns:
                if typed:
                    client.type(typed)
                for line in printed:
                    client.wait_for(re.escape(_with_address(line).encode()) + rb"\r?\n")
            if last:
                client.type(last)
            client.end()
            return _comparable(client.printed.decode().splitlines())

    def printed(self):
        """What has to come, as `replay` returns it."""
        return _comparable(line for _, printed in self.turns for line in printed)


def _with_address(line):
    return line.replace("SERVER", ADDRESS)


def _comparable(lines):
    lines = (re.sub(r"250 ok \d+ qp \d+", "250 ok TIME qp PID", line) for line in lines)
    return [_with_address(line) for line in lines if not line.startswith("===")]
