"""Control files for a process that serves many connections: what was read of them is kept.

It looks at the stat(2) of files once a connection and reads again what has changed.  Most of the
files that may be there are not: one look at the directory tells that they still are not.
"""

from __future__ import annotations

import time

from .control import DIRECTORY, ControlFiles, has_entry, signature

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from .control import Derived, Key, Parsed, Signature

_MOST_DERIVED = 100  # as many environments as rules may make are too many
_SETTLED_SECONDS = 3  # what is older has another time when it changes again, on any file system


class CachedControlFiles(ControlFiles):
    """Control files that are read once, until `refresh` finds them changed.  Callers must not
    change what they are given.
    """

    def __init__(self) -> None:
        self._signatures: dict[str, Signature | None] = {}  # of names that the directory has
        self._absent: set[str] = set()  # names that it has not
        self._directory: Signature | None = None  # None: it has to be looked at name by name
        self._values: dict[tuple[str, object], Any] = {}
        self._derived: dict[object, Any] = {}

    def refresh(self) -> None:
        """Forget what was read of files that have changed since."""
        changed = []
        for name, known in self._signatures.items():
            if signature(DIRECTORY + name) != known:
                changed.append(name)
        directory = signature(DIRECTORY + ".")
        if directory is None or directory != self._directory:
            changed += [name for name in self._absent if has_entry(name)]
            self._directory = directory if _is_settled(directory) else None
        if changed:
            for name in changed:
                self._signatures.pop(name, None)
                self._absent.discard(name)
            self._values = {key: self._values[key] for key in self._values if key[0] not in changed}
            self._derived.clear()

    def load(self, name: str, parse: Callable[[bytes | None], Parsed]) -> Parsed:
        try:
            value: Parsed = self._values[name, parse]
        except KeyError:
            self._note(name)
            value = self._values[name, parse] = super().load(name, parse)
        return value

    def derive(self, key: Key, make: Callable[[Key, ControlFiles], Derived]) -> Derived:
        try:
            value: Derived = self._derived[key]
        except KeyError:
            if len(self._derived) >= _MOST_DERIVED:
                self._derived.clear()
            value = self._derived[key] = make(key, self)
        return value

    def open(self, name: str) -> int | None:
        self._note(name)
        return None if name in self._absent else super().open(name)

    def is_readable(self, name: str) -> bool:
        value = self._values.get((name, "is_readable"))
        if value is None:
            self._note(name)
            value = self._values[name, "is_readable"] = super().is_readable(name)
        return bool(value)

    def exists(self, name: str) -> bool:
        self._note(name)
        return name not in self._absent and super().exists(name)

    def seen(self, name: str) -> Signature | None:
        self._note(name)
        return self._signatures.get(name)

    def _note(self, name: str) -> None:
        # Before it is read: a change in between shows at the next refresh.
        if name not in self._signatures and name not in self._absent:
            if has_entry(name):
                self._signatures[name] = signature(DIRECTORY + name)
            else:
                self._absent.add(name)


def _is_settled(directory: Signature | None) -> bool:
    """Whether every change from now on will show in the signature of a directory."""
    if directory is None or len(directory) == 1:
        return False
    return max(directory[-2:]) / 1e9 < time.time() - _SETTLED_SECONDS
