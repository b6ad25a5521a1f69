"""The memory that workers share, in pages of 2 MiB where the kernel makes them of it.

A fork copies where each page is, and the end of a process takes all of that apart again: of what a
process for each connection costs (`--max-use=1`), that is a third.  Pages that were made one large
one stay together in that, even where processes have written to some of them and have copies of
their own: the kernel goes through what lies side by side at once.

The interpreter has its memory in arenas, which the kernel puts where there is room: between the
libraries that are loaded meanwhile.  Importing this module has so many of them made that they lie
side by side; so it is imported before all else.  Where it can not be done, it is left undone.
"""

from __future__ import annotations

import sys

from .memory import is_ample

_LARGE = 2 << 20  # octets of a large page, where others have 4 KiB
_RESERVE = 5 << 20  # octets that a listener comes to need, over what the interpreter begins with
# Octets of an arena, and of an object: what is larger the interpreter has from malloc.
_ARENA = 1 << 20 if sys.maxsize > 2**32 and sys.version_info >= (3, 10) else 256 << 10
_OBJECT = 512

_MADV_COLLAPSE = 25  # madvise(2), Linux 6.1
_MAPS = "/proc/self/maps"


def _reserve() -> list[bytes]:
    """Have arenas made, and give back all but what keeps them: an object in each.  None where they
    might take the room that something else needs.
    """
    if not is_ample():
        return []
    try:
        made = [bytes(_OBJECT - sys.getsizeof(b"")) for _ in range(_RESERVE // _OBJECT)]
    except MemoryError:
        return []
    return list({id(one) // _ARENA: one for one in made}.values())


_kept = _reserve()


def gather() -> None:
    """Have the kernel make large pages of what this process has written to; raises MemoryError."""
    try:
        import ctypes

        advise = ctypes.CDLL(None).madvise
    except (AttributeError, ImportError, OSError, SystemError):
        return
    advise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    for start, end in _own_memory():
        for page in range(start + -start % _LARGE, end - _LARGE + 1, _LARGE):
            advise(page, _LARGE, _MADV_COLLAPSE)  # it may have none; then all is as before


def _own_memory() -> list[tuple[int, int]]:
    """Where memory is that is no file's, and that this process alone may write to (proc(5))."""
    found = []
    try:
        with open(_MAPS, "rb") as maps:
            for line in maps:
                addresses, rights, _, _, inode, *name = line.split()
                if rights == b"rw-p" and inode == b"0" and name in ([], [b"[heap]"]):
                    start, end = addresses.split(b"-")
                    found.append((int(start, 16), int(end, 16)))
    except OSError:
        pass
    return found
