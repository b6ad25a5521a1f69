"""Whose a file is, and what is in the way of those who want to use it, as the kernel has it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from e2e.programs import lack, mail_user, need

from qmail_smtpd_py.rights import obstacle, owner

ROOT = Path(__file__).resolve().parent.parent
CLOSED = 0o600  # to a directory's owner as well, unless that is root


@pytest.fixture
def deep() -> Iterator[Path]:
    """A file two directories below one that everybody may enter."""
    base = Path(tempfile.mkdtemp())
    base.chmod(0o755)
    inner = base / "outer" / "inner"
    inner.mkdir(parents=True)
    for directory in (inner.parent, inner):
        directory.chmod(0o755)
    (inner / "file").touch()
    yield inner / "file"
    for directory in (inner.parent, inner):
        directory.chmod(0o755)
    shutil.rmtree(base)


def in_the_way(path: Path) -> str:
    """What keeps the mail user from a file."""
    hear, tell = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            if os.getuid() == 0:
                user = mail_user()
                os.setgroups([])
                os.setgid(user.pw_gid)
                os.setuid(user.pw_uid)
            os.write(tell, obstacle(str(path)).encode())
        finally:
            os._exit(0)
    os.close(tell)
    os.waitpid(pid, 0)
    with open(hear) as answer:
        return answer.read()


def test_the_first_directory_that_may_not_be_entered_is_named(deep: Path) -> None:
    """What lies behind it can not be looked at."""
    inner, outer = deep.parent, deep.parent.parent
    inner.chmod(CLOSED)
    assert in_the_way(deep) == f"{inner} ({owner(os.stat(inner))}) may not be entered"
    outer.chmod(CLOSED)
    assert in_the_way(deep) == f"{outer} ({owner(os.stat(outer))}) may not be entered"


def test_where_all_may_be_entered_it_is_the_file(deep: Path) -> None:
    deep.chmod(0o640)
    assert in_the_way(deep) == f"{deep} is {owner(os.stat(deep))}"
    assert owner(os.stat(deep)).endswith(" 0640")
    assert in_the_way(deep.with_name("another")) == ""


MAKE_PROGRAM = """
mount -t tmpfs -o "$1" none "$PWD" && install -m "$2" /dev/null "$PWD/program" && exec "$3" -c "$4"
"""

ASK = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from qmail_smtpd_py.rights import has_setuid
print(has_setuid("{{}}/program"))
"""


@pytest.mark.parametrize(
    ("mount", "mode", "expected"),
    [("suid", "4755", True), ("nosuid", "4755", False), ("suid", "0755", False)],
)
def test_a_program_runs_as_its_owner_where_its_file_system_lets_it(
    tmp_path: Path, mount: str, mode: str, expected: bool
) -> None:
    (unshare,) = need("unshare")
    words = (mount, mode, sys.executable, ASK.format(tmp_path))
    done = subprocess.run(
        [unshare, "--mount", "sh", "-c", MAKE_PROGRAM, "sh", *words],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    if "mount" in done.stderr or "unshare" in done.stderr:
        lack(f"no right to mount a file system: {done.stderr}")
    assert (done.stdout, done.stderr) == (f"{expected}\n", "")
