"""Compile what qmail-smtpd-listen serves a connection with: mypyc makes C of it, by annotations.

    python setup/compiling.py TOOLS PACKAGE DIRECTORY       install.py runs this

TOOLS is a directory with mypyc, or empty where `python` has it, PACKAGE has the sources, and
DIRECTORY gets a copy of the package with an extension module for each that was compiled.

Only the listener has a use for it: a program that is started for each connection would have the
more to load.  Where it can not be compiled, or the interpreter is later replaced by one of another
kind, the modules of the copy do the same in the usual way.

Compiled code keeps Python's rules, but for two: outside of what was compiled no class of it can be
derived from, and a value of another type than its annotation's is a TypeError at once.
"""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent / "qmail_smtpd_py"
FIRST = "preload"
"""The module that loads all that are compiled."""

MYPYC = "mypy[mypyc] >= 1.15, < 3"
"""What pip is asked for."""

OLDEST = (3, 10)
"""Of the versions of Python: what is compiled for an older one loses memory with each session."""

_TRIAL = """
import sys
sys.path.insert(0, sys.argv[1])
import qmail_smtpd_py.listener
for name in sys.argv[2:]:
    file = sys.modules[f"qmail_smtpd_py.{name}"].__file__
    if file.endswith(".py"):
        sys.exit(f"{file} was not compiled")
"""


class NotCompiled(Exception):
    """It can not be; the text says why."""


def modules() -> list[str]:
    """What is compiled: the module that loads them all, and what it loads."""
    tree = ast.parse((PACKAGE / f"{FIRST}.py").read_bytes())
    found = [node for node in tree.body if isinstance(node, ast.ImportFrom) and node.level]
    return [FIRST, *(alias.name for node in found for alias in node.names)]


def compile_installed(python: Path, package: Path, directory: Path, fetches: bool) -> None:
    """Compile a package that an interpreter has installed into a directory, which is not there
    yet; mypyc is fetched, or the interpreter has it.  Raises NotCompiled, and leaves nothing.
    """
    if sys.version_info < OLDEST:
        raise NotCompiled("what is compiled for Python 3.9 loses memory")
    compiler = (os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc").split()[0]
    if not shutil.which(compiler):
        raise NotCompiled(f"there is no C compiler {compiler} (Debian's gcc)")
    if not os.path.exists(f"{sysconfig.get_path('include')}/Python.h"):
        raise NotCompiled("the headers of Python are missing (Debian's python3-dev)")
    # Not below TMPDIR, where nothing may be executed on some hosts.
    with tempfile.TemporaryDirectory(dir=directory.parent) as tools:
        try:
            if fetches:
                _run(python, "-I", "-m", "pip", "install", "--quiet", "--target", tools, MYPYC)
            _run(python, "-I", __file__, tools, package, directory)
            _run(python, "-I", "-m", "compileall", "-q", directory)
            _run(python, "-I", "-c", _TRIAL, directory, *modules())
        except NotCompiled:
            shutil.rmtree(directory, ignore_errors=True)
            raise


def with_finals(source: bytes) -> bytes:
    """A module that says of its constants, whose names are in capitals, that they are constant:
    mypyc looks for the values of other names each time that they are used.
    """
    lines = source.splitlines(keepends=True)

    def insert(text: bytes, number: int | None, octet: int | None) -> None:
        assert number and octet is not None  # ast.parse tells where all nodes are
        line = lines[number - 1]
        lines[number - 1] = line[:octet] + text + line[octet:]

    for node in reversed(ast.parse(source).body):
        if isinstance(node, ast.ImportFrom) and node.module == "__future__":
            insert(b"; from typing import Final", node.end_lineno, node.end_col_offset)
        elif isinstance(node, ast.Assign) and _is_constant(name := node.targets[0]):
            insert(b": Final", name.end_lineno, name.end_col_offset)
        elif isinstance(node, ast.AnnAssign) and _is_constant(node.target):
            kind = node.annotation
            insert(b"]", kind.end_lineno, kind.end_col_offset)
            insert(b"Final[", kind.lineno, kind.col_offset)
    return b"".join(lines)


def _is_constant(target: ast.expr) -> bool:
    """Whether what is assigned to is a name in capitals; that of typing is a case apart."""
    return isinstance(target, ast.Name) and target.id.isupper() and target.id != "TYPE_CHECKING"


def _run(*command: object) -> None:
    """Run a step; raises NotCompiled with the last error of what it says when it fails, but not
    with setuptools' own, which is the compiler's command.
    """
    done = subprocess.run(
        [str(word) for word in command],
        # Warnings that packagers ask for would be errors: mypyc adds -Werror.
        env={name: value for name, value in os.environ.items() if name != "CFLAGS"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    if done.returncode:
        lines = [line for line in done.stdout.splitlines() if "error: Command " not in line]
        told = [line for line in lines if "rror:" in line]
        why = [f"exit status {done.returncode}", *lines, *told][-1]
        raise NotCompiled(why.strip()[:200])


def main() -> None:
    """Make the copy, and compile it."""
    tools, package, directory = (Path(name).resolve() for name in sys.argv[1:])
    sys.path.insert(0, str(tools))
    from mypyc.build import mypycify
    from setuptools import setup

    shutil.copytree(package, directory / package.name, ignore=shutil.ignore_patterns("__pycache__"))
    os.chdir(directory)
    sources = [f"{package.name}/{name}.py" for name in modules()]
    for name in sources:
        Path(name).write_bytes(with_finals(Path(name).read_bytes()))
    with tempfile.TemporaryDirectory(dir=tools) as scratch:
        extensions = mypycify(
            ["--config-file=", f"--cache-dir={scratch}/cache", *sources],
            group_name=package.name,
            target_dir=scratch,
            debug_level="0",
        )
        steps = ["build", "--build-base", scratch, "build_ext", "--inplace"]
        setup(name=package.name, packages=[], ext_modules=extensions, script_args=steps)


if __name__ == "__main__":
    main()
