"""Name the oldest and the newest interpreter of this host that qmail-smtpd runs on.

They are looked for in PATH and where pyenv has them.  The one that runs this is left out, and so
are releases that are not final, and interpreters that can not make a virtual environment.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

OLDEST = (3, 9)

_TELL = """
import ensurepip, ssl, sys
if sys.version_info.releaselevel == "final":
    print(*sys.version_info[:2])
"""


def candidates() -> list[Path]:
    """Every file that could be an interpreter."""
    directories = [Path(name) for name in os.environ.get("PATH", "").split(os.pathsep) if name]
    directories += Path.home().glob(".pyenv/versions/*/bin")
    return [path for directory in directories for path in directory.glob("python3.*")]


def version(interpreter: Path) -> tuple[int, ...] | None:
    """Its version, major and minor, or None where it is of no use."""
    command = [str(interpreter), "-I", "-c", _TELL]
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except OSError:
        return None
    return tuple(map(int, told.stdout.split())) or None


def main() -> None:
    """Print the paths, one a line."""
    found: dict[tuple[int, ...], Path] = {}
    for interpreter in candidates():
        if interpreter.name[7:].replace(".", "").isdigit():
            number = version(interpreter)
            if number is not None and number >= OLDEST:
                found.setdefault(number, interpreter)
    chosen = {min(found), max(found)} - {sys.version_info[:2]} if found else set()
    for number in sorted(chosen):
        print(found[number])


if __name__ == "__main__":
    main()
