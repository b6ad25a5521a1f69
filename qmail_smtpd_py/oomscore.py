"""Who goes first where memory runs out for all: a worker, and not the listener (proc(5)).

A worker that is killed takes its connection with it, and another takes its place; with the parent
the service would end.  So each worker raises its own score when it has been forked: that of a
parent who raised its own for them would be the highest just then, when memory is short.
"""

from __future__ import annotations

from os import O_WRONLY, close, write  # who looks for them in a module writes to more pages
from os import open as open_file

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

_MORE, _MOST = 200, 1000  # what workers have more than their parent, and what there can be
_FILE = "/proc/self/oom_score_adj"

_PR_SET_DUMPABLE = 4  # prctl(2)


class OomScore:
    """What a worker's oom_score_adj is to be; made by its parent, which keeps its own."""

    __slots__ = ("_of_worker", "_set_dumpable")

    def __init__(self) -> None:
        self._of_worker: bytes | None = None
        try:
            with open(_FILE, "rb") as file:
                self._of_worker = b"%d" % min(int(file.read()) + _MORE, _MOST)
        except (OSError, ValueError):
            return  # there is no such file
        self._set_dumpable = _set_dumpable()

    def raise_own(self) -> None:
        """Have this process, a worker, be killed before its parent.

        One function, and what it needs at hand: each other one would be a page more that a worker
        writes to.
        """
        if self._of_worker is None:
            return
        try:
            descriptor = open_file(_FILE, O_WRONLY)
        except PermissionError:
            # Behind -u our files in /proc are root's, as long as nobody may look into us.
            self._set_dumpable(1)
            try:
                descriptor = open_file(_FILE, O_WRONLY)
            except OSError:
                return  # no reason to serve nobody
            finally:
                self._set_dumpable(0)
        except OSError:
            return
        try:
            write(descriptor, self._of_worker)
        except OSError:
            pass
        close(descriptor)


def _set_dumpable() -> Callable[[int], object]:
    """What says whether those with the same user id may look into this process (prctl(2))."""
    try:
        import ctypes

        prctl = ctypes.CDLL(None).prctl
    except (AttributeError, ImportError, MemoryError, OSError):
        return lambda is_on: None
    prctl.argtypes = [ctypes.c_int, *[ctypes.c_ulong] * 4]
    return lambda is_on: prctl(_PR_SET_DUMPABLE, is_on, 0, 0, 0)
