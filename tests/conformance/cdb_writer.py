"""Write constant databases, as cdb(5) describes them: what qmail-newmrh makes of morercpthosts."""

from __future__ import annotations

import struct


def make_cdb(stored: dict[bytes, bytes]) -> bytes:
    """A database with this data under these keys.

    Behind 256 pairs (position, slots) come the records, then for each pair a table with two slots a
    key, so that half of them stay empty.
    """
    records = b""
    tables: list[list[tuple[int, int]]] = [[] for _ in range(256)]
    for key, data in stored.items():
        tables[_hash(key) % 256].append((_hash(key), 2048 + len(records)))
        records += struct.pack("<II", len(key), len(data)) + key + data
    pairs = slots = b""
    for table in tables:
        pairs += struct.pack("<II", 2048 + len(records) + len(slots), 2 * len(table))
        slots += _table(table)
    return pairs + records + slots


def _table(entries: list[tuple[int, int]]) -> bytes:
    slots = [(0, 0)] * (2 * len(entries))
    for entry in entries:
        at = (entry[0] >> 8) % len(slots)
        while slots[at] != (0, 0):
            at = (at + 1) % len(slots)
        slots[at] = entry
    return b"".join(struct.pack("<II", *slot) for slot in slots)


def _hash(key: bytes) -> int:
    value = 5381
    for octet in key:
        value = (value * 33 ^ octet) & 0xFFFFFFFF
    return value
