"""Words of a script that are not known, as they can not be without running it."""

from __future__ import annotations

import os

_MOST_DIGITS = 25


class Unknown(str):
    """A word that is not known, as it is written.  One that is not quoted may be any number of
    words, and then `is_one` is false.
    """

    is_one = True


def is_known(word: str) -> bool:
    """Whether a word, or what was made of one, is what the program gets."""
    return not isinstance(word, Unknown) and "$" not in word and "`" not in word


def joined(directory: str, path: str) -> str:
    """A path from a directory on; Unknown where one of them that counts is not known."""
    whole = os.path.join(directory, path)
    is_found = is_known(path) and (path.startswith("/") or is_known(directory))
    return whole if is_found else Unknown(whole)


def number_in(word: str) -> int | None:
    """The number that a word is, or None; of one that is larger than any limit, its start."""
    return int(word[:_MOST_DIGITS]) if word.isdecimal() else None
