"""In the background, without a supervisor: --daemon, --pid-file and --log-file."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest
from conformance.stage import Stage
from listener.daemon import Daemon
from listener.listening import (
    ADDRESS,
    Listening,
    octet_environment,
    program,
    refusal,
    wait_for_death,
    without,
)
from listener.mail import begin_message, end_message, quit_

pytest_plugins = ["listener.fixtures"]


def test_its_life(mx: Stage, tmp_path: Path) -> None:
    with Daemon(mx, tmp_path) as daemon:
        assert os.getsid(daemon.pid) != os.getsid(0)
        for number in (0, 1):
            assert os.readlink(f"/proc/{daemon.pid}/fd/{number}") == "/dev/null"
        client = daemon.greeted()
        begin_message(client)
        os.kill(daemon.pid, signal.SIGTERM)
        daemon.says("stopping: 1 connection")
        end_message(client)
        quit_(client)
        wait_for_death(daemon.pid)
        assert not daemon.pid_file.exists()
        lines = daemon.log_file.read_text().splitlines()
    assert lines[0] == "qmail-smtpd-listen: status: 0/40"
    assert any(" mail ip=127.0.0.1 result=accepted " in line for line in lines)
    [delivery] = mx.deliveries()
    assert delivery.descriptors[2] == str(daemon.log_file)


@pytest.mark.parametrize("closed", [[0], [1], [2], [0, 1, 2]], ids=str)
def test_descriptors_that_are_not_there(mx: Stage, tmp_path: Path, closed: list[int]) -> None:
    """Many a script starts what goes into the background like that."""
    with Daemon(mx, tmp_path, closed=closed) as daemon:
        client = daemon.greeted()
        begin_message(client)
        end_message(client)
        quit_(client)


def test_wrong_use_with_no_descriptor_for_words(mx: Stage) -> None:
    done = subprocess.run(without([0, 1, 2], *program(), "--nonsense"), check=False)
    assert done.returncode == 100


def test_a_second_one_is_refused(mx: Stage, tmp_path: Path) -> None:
    with Daemon(mx, tmp_path) as daemon:
        status, text = refusal(mx, *daemon.options, ADDRESS, "0")
        assert status == 111
        assert text == (
            f"qmail-smtpd-listen: fatal: {daemon.pid_file} is there, "
            f"and process {daemon.pid} runs\n"
        )
        assert int(daemon.pid_file.read_text()) == daemon.pid
        quit_(daemon.greeted())


@pytest.mark.parametrize("content", ["dead", "", "nonsense\n", "0\n", "-1\n"])
def test_a_pid_file_of_nobody(mx: Stage, tmp_path: Path, content: str) -> None:
    if content == "dead":
        gone = subprocess.Popen(["true"])
        gone.wait()
        content = f"{gone.pid}\n"
    (tmp_path / "pid").write_text(content)
    with Daemon(mx, tmp_path) as daemon:
        assert f"{daemon.pid}\n" != content
        quit_(daemon.greeted())


def test_a_pid_file_that_can_not_be_written(mx: Stage, tmp_path: Path) -> None:
    """Told as long as there is somebody to tell: the disk is full, or no file may have an octet."""
    path = tmp_path / "pid"
    limited = ["sh", "-c", 'ulimit -f 0; exec "$@"', "sh", *program()]
    done = subprocess.run(
        [*limited, "--daemon", f"--pid-file={path}", ADDRESS, "0"],
        env=octet_environment(mx),
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )
    why = f"cannot write {path}: File too large (uid {os.geteuid()})"
    assert (done.returncode, done.stderr) == (111, f"qmail-smtpd-listen: fatal: {why}\n")


def test_a_pid_file_with_the_pid_of_another_listener(mx: Stage, tmp_path: Path) -> None:
    with Listening(mx) as other:
        (tmp_path / "pid").write_text(f"{other.pid}\n")
        with Daemon(mx, tmp_path) as daemon:
            quit_(daemon.greeted())


def test_a_pid_file_with_the_pid_of_anything(mx: Stage, tmp_path: Path) -> None:
    """Whose command line is no text."""
    with subprocess.Popen([b"\xff", b"60"], executable="sleep") as other:
        (tmp_path / "pid").write_text(f"{other.pid}\n")
        with Daemon(mx, tmp_path) as daemon:
            quit_(daemon.greeted())
        other.kill()


@pytest.mark.parametrize("what", ["pid", "log"])
@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_a_file_that_leads_elsewhere(mx: Stage, tmp_path: Path, what: str, kind: str) -> None:
    """Its directory may be somebody else's."""
    path, target = tmp_path / what, tmp_path / "target"
    target.write_text("of root\n")
    if kind == "link":
        path.symlink_to(target)
    else:
        os.mkfifo(path)
    status, text = refusal(mx, "--daemon", f"--{what}-file={path}", ADDRESS, "0")
    assert status == 111
    assert text.startswith(f"qmail-smtpd-listen: fatal: cannot write {path}: ")
    assert target.read_text() == "of root\n"


def test_a_restart(mx: Stage, tmp_path: Path) -> None:
    """It stays the same process, and it is still its own pid file that it removes."""
    with Daemon(mx, tmp_path) as daemon:
        old = daemon.greeted()
        begin_message(old)
        for count in (2, 3):
            os.kill(daemon.pid, signal.SIGUSR2)
            daemon.says("status: 0/40", count)
        assert int(daemon.pid_file.read_text()) == daemon.pid
        quit_(daemon.greeted())
        end_message(old)
        quit_(old)
        daemon.stop()
        assert not daemon.pid_file.exists()


@pytest.mark.parametrize("what", ["pid", "log"])
def test_a_file_that_can_not_be_written(mx: Stage, tmp_path: Path, what: str) -> None:
    path = tmp_path / "nowhere" / what
    status, text = refusal(mx, "--daemon", f"--{what}-file={path}", ADDRESS, "0")
    assert status == 111
    assert text.startswith(f"qmail-smtpd-listen: fatal: cannot write {path}: No such file")
