"""Launchers: the programs as they are installed, made to start in the least time.

qmail-smtpd is started anew for every connection, so every connection pays for what it does before
its first reply.  Five things make that cheap:

    the interpreter itself is started, not a virtual environment's link to it, with -I and -S: it
    neither looks at the environment nor runs `site`; the launcher says where the packages are; with
    -X utf8 it does without the C library's conversions, where a locale would have it use them
    posix is imported, of which os is a wrapper that takes a seventh of an interpreter's start
    all modules come out of one file, the start-up image, which has their code in the order in
    which they import each other: nothing is looked for, and nothing is read but this file; its
    start has what the launcher runs, too, as the launcher itself is compiled each time
    what not every session needs is in the image as octets, and runs when something of it is used
    the program ends by _exit: a process that ends anyway need not take itself apart

A module that is not in the image is imported in the usual way when it is asked for.  An image is
good for one kind of bytecode only.  Where the interpreter was replaced by one of another kind, or
the image is gone, the launcher imports all modules in the usual way, as slowly as that is.

A launcher also says what nothing else can: that there was not even the memory to load the program.

    python -X no_debug_ranges -m qmail_smtpd_py.launcher DIRECTORY [COMPILED]

writes the launchers and their images into the directory, from where the launchers can be moved.
COMPILED is a directory that has the package with extension modules (setup/compiling.py), for the
listener, which loads them once.  The option keeps out of the images what is only there for the
marks under the lines of tracebacks.
"""

from __future__ import annotations
import __future__

import ast
import importlib.util
import marshal
import os
import sys
import sysconfig
import textwrap
from pathlib import Path

from . import reply

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Sequence
    from types import CodeType
    from typing import Union

    Entry = tuple[str, str, Union[CodeType, bytes]]

PACKAGE = "qmail_smtpd_py"
SOURCES = Path(__file__).resolve().parent

NEEDED = ("OpenSSL", "cryptography", "daemon")
"""What is imported of other projects: ours to install, or the system's, beside what it needs."""

PROGRAM_FLAGS, TOOL_FLAGS = "-ISXutf8", "-IS"
"""Options of the interpreter; of a script's it takes them in one word."""

SHEBANG_LIMIT = 127
"""Octets that every Linux takes of a script's first line (execve(2))."""


class Program:
    """A program that the mail system starts: `main` is the module whose `main` function it is.

    `late` names modules that only some runs need: the image has them as octets, which become code
    when something of the module is first used.  So others import it as a module, as to take a name
    out of it would be a use.  `soon` names those that it imports where it needs them, and needs in
    every run.  If the program can not be loaded, `trouble` is the exit status, and `reply` is
    written to descriptor 1.
    """

    def __init__(
        self,
        main: str,
        late: tuple[str, ...] = (),
        soon: tuple[str, ...] = (),
        trouble: int = 111,
        reply: bytes = b"",
    ) -> None:
        self.main = main
        self.late = late
        self.soon = soon
        self.trouble = trouble
        self.reply = reply


PROGRAMS = {
    "qmail-smtpd": Program(
        "smtpd",
        late=("cdb", "maildata", "qmail_queue", "sasl", "trace", "transaction"),
        trouble=1,
        reply=reply.OUT_OF_MEMORY.render(),
    ),
    "qmail-queue-maildir": Program("maildir_queue", trouble=51),
    "checkpassword-users": Program("users_check", soon=("users_file",), trouble=111),
}

TOOLS = {
    "qmail-smtpd-users": "users_tool",
    "qmail-smtpd-listen": "listener",
    "qmail-smtpd-check": "check",
}
"""The programs that are started now and then: they have no image, and end as others do."""

SERVERS = ("qmail-smtpd-listen",)
"""Those of them that run for so long that compiled modules are worth their loading."""

_LAUNCHER = """\
#!{interpreter} {flags}
# Made by {package}/launcher.py, which tells why it is so.
import marshal, posix, sys, _frozen_importlib_external

sys.path += {path!r}
sources = {sources!r}
run = r\"\"\"
{run}\"\"\"
try:
    image = open({image!r}, "rb", 0)
    start = image.read({size})
    if start.endswith(_frozen_importlib_external.MAGIC_NUMBER):
        run = marshal.loads(start)
    else:
        image.close()
except Exception:
    image = None
try:
    exec(run)
except Exception:  # there is no memory to compile it
    posix.write(1, {reply!r})
    posix.write(2, {words!r})
    posix._exit({trouble})
"""

_RUN = """\
import _signal

status, reply, words = {trouble}, {reply!r}, {words!r}
try:
    {load}
    from {package}.{main} import main
    reply = b""
    status = main()
except Exception as error:
    image = modules = None  # there may be no memory for words of its own
    try:
        posix.write(1, reply)
    finally:
        try:
            why = "%s (uid %d): can it not read the program, or is the memory limit too low?"
            why %= (type(error).__name__, posix.geteuid())
            words = ('{name}[%d]: error why="%s"\\n' % (posix.getpid(), why)).encode()
        finally:
            _signal.alarm(2)  # a log that takes nothing is not waited for
            posix.write(2, words)
finally:
    posix._exit(status)
"""
"""What a launcher runs: as code out of the image, or else as text, where it loads nothing."""

_LOAD = """\
import gc

class Late(type(sys)):
    # A module of octets, which is asked for what it has not: it becomes a usual one.  If it can
    # not, it is as before, so that whoever asks again is told the cause again.
    def __getattr__(self, name):
        exec(marshal.loads(self.late), self.__dict__)
        self.__class__ = type(sys)
        del self.late
        return getattr(self, name)

gc.disable()  # what is loaded is no garbage, and would be looked at again and again
modules = marshal.loads(image.read())
image.close()
package = modules[0][0]
for name, file, code in modules:
    is_late = type(code) is bytes
    module = sys.modules[name] = (Late if is_late else type(sys))(name)
    module.__package__, module.__file__ = package, sources + file
    if is_late:
        module.late = code
    else:
        exec(code, module.__dict__)
sys.modules[package].__path__ = [sources]
gc.freeze()
gc.enable()
"""
"""What makes modules of the rest of the image.

It runs in the launcher, and has of it the modules `sys` and `marshal`, the file `image`, and
`sources`, where the source of the modules is.
"""

_TOOL = """\
#!{interpreter} {flags}
import sys

sys.path += {path!r}
try:
    from {package}.{main} import main
    status = main()
except (ImportError, LookupError, MemoryError, SystemError) as error:
    why = type(error).__name__ + ": can it not read the program, or is the memory limit too low?"
except OSError as error:
    why = str(error)
    if error.errno == 12:  # ENOMEM
        why += "; is the memory limit too low?"
else:
    sys.exit(status)
print("{name}: fatal:", why, file=sys.stderr)
sys.exit(111)
"""


def start(name: str) -> bytes:
    """What a program's image begins with: the code that the launcher runs, in which there are words
    for trouble, and the number of this kind of bytecode.
    """
    text = _run(name, textwrap.indent(_LOAD, "    ").strip())
    code = compile(text, "launcher", "exec", dont_inherit=True)
    return marshal.dumps(code) + importlib.util.MAGIC_NUMBER


def modules(program: Program) -> bytes:
    """The rest of it: (name, file, code) for each module, with the code in octets where it is for
    later.
    """
    entries: dict[str, Entry] = {}
    for name in ("__init__", *program.late, *program.soon, program.main):
        _add(name, entries, program.late)
    return marshal.dumps(list(entries.values()))


def _run(name: str, load: str) -> str:
    return _RUN.format(
        name=name, package=PACKAGE, main=PROGRAMS[name].main, load=load, **_trouble(name)
    )


def _trouble(name: str) -> dict[str, object]:
    """What there is to say, and to exit with, where a program can not be loaded."""
    words = f'{name}: error why="out of memory: is the memory limit too low?"\n'
    program = PROGRAMS[name]
    return {"trouble": program.trouble, "reply": program.reply, "words": words.encode()}


def _add(name: str, entries: dict[str, Entry], late: Collection[str]) -> None:
    """Add a module's entry behind those of the modules that it imports."""
    if name not in entries:
        source = SOURCES / f"{name}.py"
        tree = ast.parse(source.read_bytes())
        for imported in _imports(tree):
            _add(imported, entries, late)
        code = _compile(source, tree)
        full_name = PACKAGE if name == "__init__" else f"{PACKAGE}.{name}"
        entries[name] = full_name, f"/{source.name}", marshal.dumps(code) if name in late else code


def _imports(tree: ast.Module) -> Iterator[str]:
    """The modules of this package that a module imports as soon as it is imported itself."""
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.level == 1:
            yield from [node.module] if node.module else [alias.name for alias in node.names]


def _compile(source: Path, tree: ast.Module) -> CodeType:
    """The code, without docstrings, and without an import of __future__ when it runs."""
    tree.body = [node for node in tree.body if getattr(node, "module", None) != "__future__"]
    flags = __future__.annotations.compiler_flag
    code: CodeType = compile(tree, source.name, "exec", flags, dont_inherit=True, optimize=2)
    return code


def launcher(name: str, image: Path, size: int) -> bytes:
    """The launcher of a program, whose image has a start of so many octets; raises ValueError where
    no script can name the interpreter.
    """
    text = _LAUNCHER.format(
        run=_run(name, "pass"),
        image=str(image),
        size=size,
        **_trouble(name),
        **_surroundings(PROGRAM_FLAGS),
    )
    return os.fsencode(text)


def tool(name: str, first: Sequence[str] = ()) -> bytes:
    """The launcher of a tool; `first` are directories to look for this package in before its own.
    Raises ValueError where no script can name the interpreter.
    """
    return os.fsencode(
        _TOOL.format(name=name, main=TOOLS[name], **_surroundings(TOOL_FLAGS, first))
    )


def _surroundings(flags: str, first: Sequence[str] = ()) -> dict[str, object]:
    """The interpreter, and where to look for the packages that this one needs, and for this one."""
    interpreter = os.path.realpath(getattr(sys, "_base_executable", sys.executable))
    if " " in interpreter or len(f"#!{interpreter} {flags}") > SHEBANG_LIMIT:
        raise ValueError(f"no script can name {interpreter!r}: it has a blank, or is too long")
    path = [*first, *map(sysconfig.get_path, ("purelib", "platlib")), str(SOURCES.parent)]
    path += [place for place in map(_place, NEEDED) if place]
    return {
        "interpreter": interpreter,
        "flags": flags,
        "package": PACKAGE,
        "sources": str(SOURCES),
        "path": list(dict.fromkeys(path)),
    }


def _place(package: str) -> str | None:
    """The directory that a package is in, which may be the system's; None if there is none."""
    spec = importlib.util.find_spec(package)
    return str(Path(spec.origin).parent.parent) if spec and spec.origin else None


def main() -> int:
    """Write all launchers and images into the directory that is named; returns the exit status."""
    directory = Path(sys.argv[1]).resolve()
    compiled = [os.path.realpath(name) for name in sys.argv[2:]]
    for name, program in PROGRAMS.items():
        image = directory / f"{name}.image"
        beginning = start(name)
        _write(image, beginning + modules(program), 0o644)
        _write(directory / name, launcher(name, image, len(beginning)), 0o755)
    for name in TOOLS:
        _write(directory / name, tool(name, compiled if name in SERVERS else ()), 0o755)
    return 0


def _write(path: Path, content: bytes, mode: int) -> None:
    """Write a file, and put it in the place of the one that is there, if any; raises OSError."""
    new = path.with_name(f"{path.name}.new")
    new.write_bytes(content)
    new.chmod(mode)
    new.replace(path)


if __name__ == "__main__":
    sys.exit(main())
