"""Constant databases (cdb(5)): what is stored under a key, without reading the file into memory.

The file starts with 256 pairs (position, slots) of little-endian 32-bit numbers.  The hash of a key
chooses the pair by its low 8 bits and the first slot by the others; a slot is a pair (hash,
position of the record); a record starts with the lengths of its key and its data.
"""

from __future__ import annotations

import posix as os  # cheaper at start: see launcher.py


class CdbError(Exception):
    """The file is not a whole constant database."""


def cdb_hash(key: bytes) -> int:
    """The hash of a key (cdb(5))."""
    value = 5381
    for octet in key:
        value = ((value << 5) + value) & 0xFFFFFFFF ^ octet
    return value


def find(descriptor: int, key: bytes) -> bytes | None:
    """The first data under the key, or None; raises CdbError, or OSError where reading fails."""
    place = _place(descriptor, key)
    if place is None:
        return None
    position, length = place
    if length > os.fstat(descriptor).st_size:  # it would ask for so much memory first
        raise CdbError("the file is cut off")
    return _read(descriptor, position, length)


def has(descriptor: int, key: bytes) -> bool:
    """Whether something is stored under the key; raises what `find` does.  Data are not read."""
    return _place(descriptor, key) is not None


def _place(descriptor: int, key: bytes) -> tuple[int, int] | None:
    """The position and the length of the first data under the key, or None."""
    value = cdb_hash(key)
    table, slots = _pair(descriptor, (value & 255) * 8)
    for number in range(slots):
        slot = ((value >> 8) + number) % slots
        slot_hash, record = _pair(descriptor, table + slot * 8)
        if not record:
            return None
        if slot_hash == value:
            key_length, data_length = _pair(descriptor, record)
            if key_length == len(key) and _read(descriptor, record + 8, key_length) == key:
                return record + 8 + key_length, data_length
    return None


def _pair(descriptor: int, position: int) -> tuple[int, int]:
    octets = _read(descriptor, position, 8)
    return int.from_bytes(octets[:4], "little"), int.from_bytes(octets[4:], "little")


def _read(descriptor: int, position: int, length: int) -> bytes:
    octets = os.pread(descriptor, length, position)
    if len(octets) != length:
        raise CdbError("the file is cut off")
    return octets
