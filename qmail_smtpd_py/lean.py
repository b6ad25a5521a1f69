"""What pyOpenSSL's import would bring along, and TLS has no use for, is left out.

    hashlib's OpenSSL   the host's, beside the one that TLS is made with
    typing_extensions   asked, before Python 3.13, for a decorator that warns of what is deprecated;
                        with it come inspect, ast and dis
    email.utils         asked for a function that reads addresses, for names in certificates that
                        nobody makes here; with it come urllib and more of email
    calendar            kept for a method that nobody calls here; with it comes locale

Together they are a fifth of the time that it takes, and an eighth of the memory.  Nothing is lost:
of the last three a stand-in is there, and whoever asks it for anything else has it of the module.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, TypeVar

    Decorated = TypeVar("Decorated")

_OWN_HASHES = frozenset(("_blake2", "_md5", "_sha1", "_sha3"))


def leave_out() -> None:
    """Leave it out; to be called before pyOpenSSL is imported, and of no effect on what is there
    already.
    """
    # Where an interpreter does not have the hashes built in, hashlib would complain.
    if _OWN_HASHES.issubset(sys.builtin_module_names):
        sys.modules.setdefault("_hashlib", None)  # type: ignore[arg-type]
    if sys.version_info < (3, 13):
        _StandIn("typing_extensions", deprecated=_deprecated)
    _StandIn("email.utils", parseaddr=_parse_address)
    _StandIn("calendar")


class _StandIn(ModuleType):
    """Stands for a module, and has some functions of it, where it is not loaded yet."""

    def __init__(self, name: str, **functions: Callable[..., object]) -> None:
        super().__init__(name)
        vars(self).update(functions)
        package, _, child = name.rpartition(".")
        parent = importlib.import_module(package) if package else None  # first, as it may fail
        if sys.modules.setdefault(name, self) is self and parent:
            setattr(parent, child, self)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name != "__all__":  # which the import system looks for
            raise AttributeError(name)
        return getattr(_loaded(self.__name__), name)


def _loaded(name: str) -> ModuleType:
    """The module itself."""
    if isinstance(sys.modules.get(name), _StandIn):
        del sys.modules[name]
    return importlib.import_module(name)


def _deprecated(*about: object, **how: object) -> Callable[[Decorated], Decorated]:
    """A decorator that changes nothing: no warning is heeded here."""
    return lambda decorated: decorated


def _parse_address(*arguments: Any, **options: Any) -> Any:
    return _loaded("email.utils").parseaddr(*arguments, **options)
