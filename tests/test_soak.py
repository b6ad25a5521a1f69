"""A small soak of the listener: bench/soak.py, which also runs larger ones."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from e2e.programs import need

ROOT = Path(__file__).resolve().parent.parent

pytestmark = pytest.mark.tls


@pytest.fixture
def listener(tmp_path: Path) -> Path:
    """The installed qmail-smtpd-listen, or that of the checkout with the tests' interpreter."""
    installed = os.environ.get("QMAIL_SMTPD")
    if installed:
        return Path(installed).with_name("qmail-smtpd-listen")
    program = tmp_path / "qmail-smtpd-listen"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -I {ROOT}/bin/{program.name} "$@"\n')
    program.chmod(0o755)
    return program


def test_nothing_is_lost_or_leaks(listener: Path) -> None:
    """While workers are killed and replaced, and the listener is restarted."""
    need("cc", "openssl")
    command = [sys.executable, ROOT / "bench/soak.py", "--program", listener, "--sessions", "500"]
    soak = subprocess.run(command, check=False, capture_output=True, text=True, timeout=120)
    assert soak.returncode == 0, soak.stdout + soak.stderr
    assert re.search(r"^sessions +500 in ", soak.stdout, re.M)
    assert re.search(r"^killed +[1-9]", soak.stdout, re.M)
    assert re.search(r"^messages +[1-9]\d\d acknowledged", soak.stdout, re.M)
    assert re.search(r"^connections +0 refused", soak.stdout, re.M)


def test_what_is_wrong_is_found(listener: Path, tmp_path: Path) -> None:
    """A queue that loses a message and has another twice does not pass."""
    need("cc", "openssl")
    queue, faulty = tmp_path / "queue", tmp_path / "faulty"
    faulty.write_text(
        f"""#!/bin/sh
export REAL="$QMAILQUEUE" QMAILQUEUE="{queue}"
exec {listener} "$@"
"""
    )
    queue.write_text(
        f"""#!/bin/sh
queue="$RECORD"
export RECORD="{tmp_path}/$$"
"$REAL" || exit $?
mkdir "{tmp_path}/lost" && exit 0
mkdir "{tmp_path}/doubled" && cat "$RECORD" >> "$queue"
cat "$RECORD" >> "$queue"
"""
    )
    for program in (faulty, queue):
        program.chmod(0o755)
    command = [sys.executable, ROOT / "bench/soak.py", "--program", faulty, "--sessions", "200"]
    soak = subprocess.run(command, check=False, capture_output=True, text=True, timeout=120)
    assert soak.returncode == 1, soak.stdout + soak.stderr
    assert "acknowledged, and 0 times in the queue" in soak.stdout
    assert "acknowledged, and 2 times in the queue" in soak.stdout
