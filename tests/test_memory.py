"""Memory for libraries: whoever runs out of it does so in a child, and is told in time."""

from __future__ import annotations

import os
import signal
import time

import pytest

from qmail_smtpd_py import memory

HUGE = 1 << 62


@pytest.fixture
def tight(monkeypatch: pytest.MonkeyPatch) -> None:
    """As under a memory limit that is not plainly enough."""
    monkeypatch.setattr(memory, "_AMPLE", HUGE)


def crash() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def never_end() -> None:
    time.sleep(60)


def take_all() -> None:
    bytes(HUGE)


def complain() -> None:
    os.write(2, b"a traceback\n")
    raise MemoryError


def find_no_file() -> None:
    raise OSError("no such file")


def test_where_there_is_plenty_nothing_is_tried() -> None:
    tried: list[int] = []
    memory.see_room_for(lambda: tried.append(1), 1)
    assert tried == []


def test_what_is_tried_is_done_in_a_child(tight: None) -> None:
    done: list[int] = []
    read, write = os.pipe()

    def load() -> None:
        done.append(1)
        os.write(write, b"%d" % os.getpid())

    memory.see_room_for(load, 1)
    child = int(os.read(read, 100))
    os.close(read)
    os.close(write)
    assert done == [] and child != os.getpid()
    with pytest.raises(ChildProcessError):
        os.waitpid(child, os.WNOHANG)


@pytest.mark.parametrize("load", [crash, take_all, complain])
def test_what_becomes_of_the_child_is_want_of_memory(
    tight: None, capfd: pytest.CaptureFixture[str], load
) -> None:
    with pytest.raises(MemoryError):
        memory.see_room_for(load, 1)
    assert capfd.readouterr().err == ""


def test_what_is_taken_beside_it_has_to_be_there(tight: None) -> None:
    with pytest.raises(MemoryError):
        memory.see_room_for(int, HUGE)


def test_another_exception_is_for_whoever_loads_it(tight: None) -> None:
    memory.see_room_for(find_no_file, 1)


def test_no_child_is_no_answer(tight: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fork", find_no_file)
    with pytest.raises(OSError, match="no such file"):
        memory.see_room_for(int, 1)


def test_the_alarm_of_whoever_has_a_handler_ends_the_child(
    tight: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "_SECONDS", 1)
    before = signal.signal(signal.SIGALRM, lambda *_: None)
    try:
        with pytest.raises(TimeoutError, match="not loaded in 1 s"):
            memory.see_room_for(never_end, 1)
    finally:
        signal.signal(signal.SIGALRM, before)
