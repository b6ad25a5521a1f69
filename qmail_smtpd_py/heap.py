"""Holes in the heap, filled before the fork.

The interpreter puts a small object where one of its size was freed last.  What was loaded leaves
such holes all over the heap, a few on a page, and each page is shared between parent and workers
until one of them writes to it: a worker that made its objects there would copy a page for every few
of them.  With the holes filled, new objects stand side by side.
"""

from __future__ import annotations

_STEP, _LARGEST = 16, 512  # octets: the sizes that the interpreter's allocator has, and keeps apart
_ROOM = 32 << 10  # octets; what the holes of one size come to is less
_EMPTY = 33  # octets of bytes(0)


def fill() -> list[object]:
    """Objects of each size; while they are kept, the holes are filled.

    Where there is no memory for all of them, there are none: that is a matter of speed alone.
    """
    kept: list[object] = []
    try:
        for size in range(_STEP, _LARGEST + 1, _STEP):
            for number in range(_ROOM // size):
                kept.append(_object(size, number))
    except MemoryError:
        kept.clear()
    return kept


def _object(size: int, number: int) -> object:
    """An object that nobody else has, of some octets."""
    if size >= 48:
        return bytes(size - _EMPTY)
    return float(number) if size == 32 else object()
