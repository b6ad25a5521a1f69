"""The variables of a script that is read and not run: what is set, what is exported, and what
nobody can tell without running it.
"""

from __future__ import annotations

import copy
import re

_EXPORTED = ("PATH", "HOME", "USER", "SHELL", "LANG", "TZ")
"""What init exports already: sh exports a variable that came with the environment again."""

_LONGEST = 1 << 17  # octets; Linux takes no longer one

_OF_SHELLS = ("PWD", "UID", "EUID", "PPID", "HOSTNAME", "IFS", "RANDOM")
"""What a shell sets by itself."""


class Variables:
    """Variables as a script sets them.

    `environ` has those that are exported, with values that are known; of others there may be more
    than is known: see `may_have`.  With `exports_all`, what is set is exported (`set -a`); None is
    not known.
    """

    def __init__(self, environ: dict[str, str]) -> None:
        self.environ = environ
        self.exports_all: bool | None = False
        self._values: dict[str, str | None] = {}
        self._set_at: dict[str, str] = {}
        self._exported: set[str] = set()
        self._doubtful: set[str] = set()
        self._may_export = False
        self._settled: set[str] | None = None

    def value(self, name: str) -> str | None:
        """The value, or None where it is not known or there is none."""
        return self._values[name] if name in self._values else self.environ.get(name)

    def is_unset(self, name: str) -> bool:
        """Whether the script leaves it unset, and nothing that is not known may set it."""
        is_set = name in self._values or name in self.environ or name in (*_EXPORTED, *_OF_SHELLS)
        return not is_set and not self.may_have(name)

    def may_have(self, name: str) -> bool:
        """Whether the environment may have a variable with a value that is not known."""
        if name in self.environ:
            return False
        is_doubtful = name in self._doubtful or (self._may_export and name in self._values)
        return is_doubtful or self.is_open(name)

    def is_open(self, name: str) -> bool:
        """Whether what is not known could have set it, and the script has not set it since."""
        return self._settled is not None and name not in self._settled

    def assign(self, name: str, value: str | None, where: str = "") -> None:
        """NAME=value, where None is a value that is not known; `where` is what is told of it, if
        anything is.
        """
        self._values[name] = value if value is None or len(value) <= _LONGEST else None
        if where:
            self._set_at[name] = where
        if self._settled is not None:
            self._settled.add(name)
        if self.exports_all or name in self.environ or name in (*self._exported, *_EXPORTED):
            self.export(name)
        elif self.exports_all is None:
            self._doubtful.add(name)

    def export(self, name: str) -> None:
        """`export NAME`, which counts as soon as there is a value."""
        self._exported.add(name)
        if name not in self._values:
            return
        value = self._values[name]
        if value is not None:
            self.environ[name] = value
            self._doubtful.discard(name)
        else:
            self.environ.pop(name, None)
            self.doubt(name)

    def unset(self, name: str) -> None:
        """`unset NAME`."""
        for known in (self._values, self._set_at, self.environ):
            known.pop(name, None)
        self._forget_export(name)
        if self._settled is not None:
            self._settled.add(name)

    def keep(self, name: str) -> None:
        """`export -n NAME`: it is set, and not exported any more."""
        self.environ.pop(name, None)
        self._forget_export(name)

    def _forget_export(self, name: str) -> None:
        self._exported.discard(name)
        self._doubtful.discard(name)

    def copy(self) -> Variables:
        """Those of a shell that this one starts."""
        return copy.deepcopy(self)

    def doubt(self, name: str) -> None:
        """It may be set from here on, or exported, or not."""
        self._values[name] = None
        self.environ.pop(name, None)
        self._doubtful.add(name)

    def doubt_all(self) -> None:
        """From here on everything that the script has not set may be set."""
        self._settled = set()

    def doubt_exports(self) -> None:
        """What the script sets may be exported, whatever it is."""
        self._may_export = True

    def unexported(self, script: str) -> list[tuple[str, str, str, bool]]:
        """What is set and surely not exported: where, the name, the value, and whether the
        script uses it.
        """
        return [
            (where, name, self._values[name] or "", bool(re.search(rf"\$\{{?{name}\b", script)))
            for name, where in self._set_at.items()
            if self._values[name] is not None
            and name not in self.environ
            and not self.may_have(name)
        ]
