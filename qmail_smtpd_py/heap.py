"""The heap before the fork, arranged so that a worker writes to few of its pages.

A page is shared between parent and workers until one of them writes to it: then that one copies it.
A worker writes to where its new objects get their place, and to the code that it runs, as an object
that is in use is counted.  What was loaded leaves both all over the heap:

    holes   malloc, and the interpreter for small objects, give what was freed last, or what fits,
            so that a page would be copied for every few new objects.  With the holes filled, they
            stand side by side, and small ones in pools that have nothing else: what the interpreter
            notes at the head of a pool is then on the same page.
    code    of what was loaded with a function that every session runs, most is never run.  The code
            that a rehearsal ran is copied to where there are no holes, and the functions get the
            copies.

What it is good for, on one machine: the private memory of a busy worker is 1.1 to 1.2 MiB instead
of 1.4 to 1.6, and a process for each connection (`--max-use=1`) costs a tenth to a fifth less; with
compiled sessions it is a tenth fewer of the pages that such a process writes to or reads first.
The CPU time of workers that live longer is the same.  Where it can not be done, or there is no
memory for it, it is left undone.
"""

from __future__ import annotations

import contextlib
import gc
import sys
from itertools import repeat
from types import CodeType, FunctionType

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import FrameType

_WIDE = sys.maxsize > 2**32  # a pointer has 8 octets, and not 4
_STEP = 16 if _WIDE else 8  # octets: sizes are multiples of that
_SMALL = 512  # octets; what is larger the interpreter, too, has from malloc
# Octets of a pool, which has objects of one size, and of its head.
_POOL = 16 << 10 if _WIDE and sys.version_info >= (3, 10) else 4 << 10
_HEAD = 48 if _WIDE else 32
_ROOM = 64 << 10  # octets; what the holes of one small size come to is less
_LOOKING = 8 * _STEP  # octets: no object that it takes to look at others is larger
_FEW = 16  # objects that are made at a time
_EMPTY = sys.getsizeof(b"")  # octets; 33 or 17

_LARGE = 4096  # octets; no session asks malloc for many pieces that are larger, but buffers
_NOTE = 8 if _WIDE else 4  # octets that malloc needs for itself
_MOST_PIECES = 5000  # there are hundreds
_INFO = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"


class Filling:
    """What fills the holes: objects, and pieces of malloc's."""

    def __init__(self) -> None:
        self._objects: list[object] = []
        self._pieces: list[int] = []
        try:
            self._malloc: _Malloc | None = _Malloc()
        except (AttributeError, ImportError, MemoryError, OSError):
            self._malloc = None

    def empty(self) -> None:
        """Leave the holes as they were."""
        self._objects.clear()
        while self._malloc and self._pieces:
            self._malloc.free(self._pieces.pop())

    def fill(self) -> None:
        """Fill all holes."""
        self.fill_mallocs()
        for size in range(_STEP, _SMALL + 1, _STEP):
            self._fill_small(size)

    def fill_mallocs(self) -> None:
        """Fill malloc's holes, the largest first, as it takes from those what has no hole."""
        malloc = self._malloc
        if not malloc:
            return
        end = malloc.end()
        for size in range(_LARGE, 0, -_STEP):
            while piece := malloc.take(size - _NOTE):
                if piece > end:
                    malloc.free(piece)
                    break
                self._pieces.append(piece)
                if len(self._pieces) > _MOST_PIECES:
                    return

    def _fill_small(self, size: int) -> None:
        """Fill the interpreter's holes of a size, until two objects begin a pool of their own.

        To look where they are takes small objects, too, which would come in between: of those sizes
        some are made at a time.
        """
        few = _FEW if size <= _LOOKING else 1
        for _ in range(_ROOM // size // few):
            self._objects.extend(map(_object, repeat(size, few)))
            recent = self._objects[-few - 1 :]
            if any(_begin_pool(size, *pair) for pair in zip(map(id, recent), map(id, recent[1:]))):
                break


def _begin_pool(size: int, first: int, second: int) -> bool:
    """Whether at these addresses are the first two objects of a pool."""
    return second % _POOL == _HEAD + size and second == first + size


def _object(size: int) -> object:
    """An object that nobody else has, of some octets."""
    if size >= _EMPTY + _STEP - 1:
        return bytes(size - _EMPTY)
    return float(1) if size == 2 * _STEP else object()


class _Malloc:
    """glibc's malloc(3); raises AttributeError where there is another, and ImportError, MemoryError
    or OSError where it can not be called from here.
    """

    def __init__(self) -> None:
        import ctypes

        class Info(ctypes.Structure):
            """What mallinfo(3) tells."""

            _fields_ = [(name, ctypes.c_int) for name in _INFO.split()]

        library = ctypes.CDLL(None)
        self.take, self.free = library.malloc, library.free
        self.take.argtypes, self.take.restype = [ctypes.c_size_t], ctypes.c_void_p
        self.free.argtypes, self.free.restype = [ctypes.c_void_p], None
        self._info, self._move_end = library.mallinfo, library.sbrk
        self._info.argtypes, self._info.restype = [], Info
        self._move_end.argtypes, self._move_end.restype = [ctypes.c_ssize_t], ctypes.c_void_p

    def end(self) -> int:
        """The address where the last hole begins, which is the rest of the heap."""
        end: int = self._move_end(0) - self._info().keepcost
        return end


@contextlib.contextmanager
def watching() -> Iterator[dict[CodeType, int]]:
    """The code that runs meanwhile, in the order in which it ran first."""
    ran: dict[CodeType, int] = {}

    def note(frame: FrameType, event: str, argument: object) -> None:
        if event == "call":
            ran.setdefault(frame.f_code, len(ran))

    sys.setprofile(note)
    try:
        yield ran
    finally:
        sys.setprofile(None)


def move(ran: dict[CodeType, int]) -> list[object]:
    """Give functions a copy of their code, if it ran, where there is room; what they had before is
    to be kept where it is, as it would leave holes.
    """
    functions: dict[CodeType, list[FunctionType]] = {code: [] for code in ran}
    for found in gc.get_objects():
        if type(found) is FunctionType and found.__code__ in functions:
            functions[found.__code__].append(found)
    # Of one size, what runs first, which is what runs in most sessions, is to stand together.
    for code in sorted(functions, key=lambda code: (sys.getsizeof(code), ran[code])):
        copy = code.replace()
        for function in functions[code]:
            function.__code__ = copy
    return list(functions)
