"""The heap before the fork: what is arranged for workers is as it was, but for its place."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from conformance.program import page_faults
from conformance.stage import Stage
from listener.listening import Listening
from listener.mail import begin_message, end_message, quit_

from qmail_smtpd_py import heap, hugepages

pytest_plugins = ["listener.fixtures"]

PLACES = """
import ctypes
from qmail_smtpd_py import heap
malloc = ctypes.CDLL(None).malloc
malloc.restype = ctypes.c_void_p
held = [[bytes(size - heap._EMPTY) for _ in range(300)] for size in range(48, 1024, 16)]
for row in held:
    del row[::50]
made = [None] * 1000
filling = heap.Filling()
filling.{fill}()
for number in range(3 * len({sizes})):
    size = {sizes}[number // 3]
    made[number] = {make}
print(*({place} for one in made if one is not None))
"""


def run(program: str) -> list[str]:
    words = [sys.executable, "-c", program]
    return subprocess.run(words, stdout=subprocess.PIPE, check=True, text=True).stdout.split()


def pages(fill: str, sizes: list[int], make: str, place: str) -> int:
    """How many pages three objects of each size stand in, made where the heap has many holes."""
    places = run(PLACES.format(fill=fill, sizes=sizes, make=make, place=place))
    assert len(places) == 3 * len(sizes)
    return len({int(place) >> 12 for place in places})


def test_small_objects_of_a_size_stand_on_a_page() -> None:
    sizes = [*range(64, 513, 16)]  # smaller ones the interpreter makes by the way, too
    assert pages("fill", sizes, "bytes(size - heap._EMPTY)", "id(one)") <= len(sizes) + 3
    assert pages("empty", sizes, "bytes(size - heap._EMPTY)", "id(one)") > 2 * len(sizes)


def test_the_holes_of_every_size_come_to_an_end() -> None:
    """Of numbers, too, which the interpreter makes by the way."""
    program = """
from qmail_smtpd_py import heap
held = [float(number) for number in range(3000)], [object() for _ in range(3000)]
for row in held:
    del row[::50]
filling = heap.Filling()
for size in range(heap._STEP, heap._SMALL + 1, heap._STEP):
    before = len(filling._objects)
    filling._fill_small(size)
    made = len(filling._objects) - before
    if made > heap._ROOM // size - heap._FEW:
        print(size)
"""
    assert run(program) == []


def test_a_pool_is_as_large_as_the_interpreters() -> None:
    program = """
from qmail_smtpd_py import heap
made = [heap._object(48) for _ in range(3000)]
print(*{(id(one) % heap._POOL - heap._HEAD) % 48 for one in made})
"""
    assert run(program) == ["0"], "no power of two is a multiple of 48"


def test_pieces_of_mallocs_stand_on_few_pages() -> None:
    sizes = [120, 248, 504, 1000, 2040]
    assert pages("fill_mallocs", sizes, "malloc(size)", "one") <= 11
    assert pages("empty", sizes, "malloc(size)", "one") > 11


def test_what_filled_the_holes_can_be_given_back() -> None:
    program = """
import resource
from qmail_smtpd_py import heap
filling = heap.Filling()
def rounds(number):
    for _ in range(number):
        filling.fill()
        filling.empty()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(rounds(50) - rounds(5))
"""
    assert int(run(program)[0]) < 1000, "KiB"


CAN_BE_LARGE = """
import ctypes, mmap
size = 2 << 20
tried = mmap.mmap(-1, 2 * size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
tried.write(bytes(2 * size))
start = ctypes.addressof(ctypes.c_char.from_buffer(tried))
madvise = ctypes.CDLL(None).madvise
madvise.argtypes = ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int
print(not madvise(start + -start % size, size, 25))
"""

LARGE = """
from qmail_smtpd_py import hugepages
held = [bytes(400) for _ in range(20_000)]
hugepages.gather()
with open("/proc/self/smaps") as lines:
    print(sum(int(line.split()[1]) for line in lines if line.startswith("AnonHugePages:")))
"""


def test_memory_becomes_large_pages_where_the_kernel_can() -> None:
    [can], [large] = run(CAN_BE_LARGE), run(LARGE)
    assert int(large) >= 2 * 2048 if can == "True" else int(large) == 0, "KiB"


@pytest.mark.parametrize("lacks", ["madvise", "/proc"])
def test_memory_is_left_as_it_is_where_that_can_not_be_done(
    monkeypatch: pytest.MonkeyPatch, lacks: str
) -> None:
    if lacks == "madvise":
        monkeypatch.setattr("ctypes.CDLL", lambda name: object())
    else:
        monkeypatch.setattr(hugepages, "_MAPS", "/nowhere/maps")
    hugepages.gather()


@pytest.mark.tls
def test_what_workers_share_lies_side_by_side(mx: Stage) -> None:
    with Listening(mx) as listener:
        listener.greeted().close()
        maps = Path(f"/proc/{listener.pid}/maps").read_text().splitlines()
    own = [line.split()[0].split("-") for line in maps if len(line.split()) == 5]
    largest = max(int(end, 16) - int(start, 16) for start, end in own)
    assert largest > hugepages._RESERVE * 3 // 4, "without it, there are 3 MiB between libraries"


@pytest.mark.tls
def test_the_heap_does_not_shrink_and_grow_with_each_chunk_of_a_message(mx: Stage) -> None:
    text = (b"x" * 70 + b"\r\n") * 200_000
    with Listening(mx, "-c", "1") as listener:
        client = listener.greeted()
        [worker] = listener.workers
        begin_message(client)
        before = page_faults(worker)
        end_message(client, text)
        faults = page_faults(worker) - before
        quit_(client)
    assert faults < 1000, "a chunk has 16 pages, and each would be given back and had anew"


@pytest.mark.parametrize("lacks", ["ctypes", "malloc"])
def test_a_listener_does_without(monkeypatch: pytest.MonkeyPatch, lacks: str) -> None:
    if lacks == "ctypes":
        monkeypatch.setitem(sys.modules, "ctypes", None)
    else:
        monkeypatch.setattr("ctypes.CDLL", lambda name: object())
    filling = heap.Filling()
    filling.fill()
    filling.empty()


def counted(first: int, second: int = 2, *rest: int, key: str = "a") -> tuple[object, ...]:
    """What has of everything that a function can have."""
    return first, second, rest, key


def adder(number: int):
    def add(other: int) -> int:
        return number + other

    return add


def never() -> None:
    """What did not run."""


def test_code_that_ran_is_copied_and_no_other() -> None:
    before = counted.__code__, never.__code__
    add = adder(2)
    with heap.watching() as ran:
        add(1)
        counted(1)
    assert sys.getprofile() is None
    assert list(ran)[:2] == [add.__code__, counted.__code__]
    assert before[0] in heap.move(ran)
    assert counted.__code__ is not before[0]
    assert counted.__code__ == before[0]
    assert never.__code__ is before[1]
    assert counted(1, key="b") == (1, 2, (), "b")
    assert counted.__doc__
    assert (add(3), adder(4)(3)) == (5, 7)


def test_a_watch_ends_with_what_was_watched() -> None:
    with pytest.raises(KeyError), heap.watching():
        raise KeyError
    assert sys.getprofile() is None
