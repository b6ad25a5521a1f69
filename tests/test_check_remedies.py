"""What is to be done about a line of the log, where the file is that it names."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from listener.world import need_root

from qmail_smtpd_py.findings import ERROR, WARNING, Report
from qmail_smtpd_py.remedies import explain
from qmail_smtpd_py.rights import group_name, user_name


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A qmail home, and the current directory."""
    (tmp_path / "control").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def problem(why: str) -> dict[str, str]:
    """What is said of a line."""
    report = Report()
    explain(why, report)
    (found,) = report.problems
    return found


@pytest.mark.parametrize(
    ("words", "level", "remedy"),
    [
        ("STARTTLS not offered: cannot read {0}servercert.pem: {1}", ERROR, "chown {2}; chmod 640"),
        ("TLS not available: {0}servercert.pem: {1}", ERROR, "chown {2}; chmod 640"),
        ("{0}servercert-ecdsa.pem: {1}; left out", ERROR, "chown {2}; chmod 640"),
        ("{0}clientca.pem: {1}", ERROR, "chmod a+r"),
        ("{0}clientcrl.pem: {1}; no client certificate counts", ERROR, "chmod a+r"),
        ("{0}dh2048.pem: {1}", WARNING, "chmod a+r"),
    ],
)
def test_file_that_can_not_be_read(home: Path, words: str, level: str, remedy: str) -> None:
    """Keys are for the service's user alone; the others are no secrets, and for everybody."""
    name = words.partition("{0}")[2].partition(":")[0]
    path = home / "control" / name
    path.write_text("")
    path.chmod(0o600)
    found = problem(words.format("control/", f"Permission denied (uid {os.geteuid()})", ""))
    owner = f"{user_name(os.geteuid())} {path}"
    assert (found["level"], found["code"]) == (level, "unreadable")
    assert found["remedy"] == f"{remedy.format('', '', owner)} {path}"
    assert found["cause"].startswith(f"{path} is ")
    assert found["cause"].endswith(" 0600")


def test_secret_of_another_service(home: Path) -> None:
    """That one is to go on reading it: chown would take it away."""
    need_root()
    path = home / "control/servercert.pem"
    path.touch(0o600)
    os.chown(path, 65534, 65534)
    found = problem("STARTTLS not offered: cannot read control/servercert.pem: Permission denied")
    assert found["remedy"] == f"chgrp {group_name(os.getegid())} {path}; chmod 640 {path}"


@pytest.mark.parametrize(
    ("why", "code"),
    [
        (
            "ModuleNotFoundError (uid 89): can it not read the program, or is the memory limit ...",
            "program-unreadable",
        ),
        ("cannot use /etc/tcp.smtp.cdb: the file is cut off", "rules-damaged"),
        ("cannot use control/morercpthosts.cdb: the file is cut off", "morercpthosts-damaged"),
        ("control/clientca.pem: no start line", "clientca-unusable"),
        ("control/clientca.pem: too many authorities to name them to clients", "clientca-too-many"),
        ("control/clientcrl.pem: no start line; no client certificate counts", "crl-unusable"),
        ("control/dh2048.pem: no start line", "dh-unusable"),
        (
            "memory that can be written and executed is forbidden, and pyOpenSSL needs it",
            "execmem",
        ),
    ],
)
def test_file_that_is_not_what_it_should_be(home: Path, why: str, code: str) -> None:
    assert problem(why)["code"] == code
