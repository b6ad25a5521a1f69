"""Memory for libraries: whether what is about to be loaded has room under the memory limit.

A library that runs out of memory half way may raise an exception, but it may crash as well, and
then nobody is told why; and the interpreter may never end.  How much is taken depends on the
versions of all that is loaded.  So where there is not plainly enough, a child loads it first: it
has the same limit and what is in memory already, so it fares as we would.
"""

from __future__ import annotations

import os
from _signal import (  # type: ignore[import-not-found]
    SIG_DFL,
    SIGALRM,
    alarm,
    set_wakeup_fd,
    signal,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import NoReturn

_AMPLE = 40 << 20  # octets of address space; pyOpenSSL takes 21 to 26 MiB
_SECONDS = 5  # for what takes 0.1


def is_ample() -> bool:
    """Whether there is room for a large library, or several, without a closer look."""
    try:
        bytes(_AMPLE)
    except MemoryError:
        return False
    return True


def see_room_for(load: Callable[[], object], spare: int) -> None:
    """Raise MemoryError where there is no room for what `load` loads and `spare` octets beside it,
    or OSError where a child that tries it can not be had, or takes too long.

    An exception of `load` is not raised, unless it is MemoryError: it is for its next caller.
    """
    if is_ample():
        return
    child = os.fork()
    if not child:
        _try(load, spare)
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == SIGALRM:
        raise TimeoutError(f"not loaded in {_SECONDS} s")
    if status:
        raise MemoryError


def _try(load: Callable[[], object], spare: int) -> NoReturn:
    """Exit with 0 if there is room."""
    status = 1
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # it is for the parent to find words
        set_wakeup_fd(-1)  # which is the parent's
        signal(SIGALRM, SIG_DFL)
        alarm(_SECONDS)
        _load(load)
        bytes(spare)
        status = 0
    finally:
        os._exit(status)


def _load(load: Callable[[], object]) -> None:
    try:
        load()
    except MemoryError:
        raise
    except Exception:
        pass  # the parent meets it, too, and has words for it
