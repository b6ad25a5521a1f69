"""The architecture of docs/design.md, as what the syntax trees of the package say.

Which module is of which layer stands in the tables of docs/design.md; a module that is in none of
them is an error here.
"""

from __future__ import annotations

import ast
import functools
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from qmail_smtpd_py import qmail_queue, reply
from qmail_smtpd_py.reply import Reply
from qmail_smtpd_py.session import _UNKNOWN, VERBS, Session

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "qmail_smtpd_py"
MODULES = sorted(path.stem for path in PACKAGE.glob("*.py") if path.stem != "__init__")

BELOW_MAIN = ("core", "edges")

EDGES_THAT_MEET = {
    ("badmailfrom", "control"): "a list is a control file",
    ("controlcache", "control"): "it keeps what the other reads",
    ("rcpthosts", "control"): "a list is a control file",
    ("rcpthosts", "cdb"): "morercpthosts.cdb is one",
    ("tls", "control"): "a certificate is a control file",
    ("tls", "certificates"): "a context has them",
    ("tls", "channel"): "the first handshake is one with ourselves",
    ("channel", "certificates"): "one error for all that is TLS",
    ("transcript", "log"): "octets that are not printable look the same in both",
}

UPWARDS = {
    ("encryption", "handover"): "the listener's helper can go on with a session",
}

CORE_NEEDS = {"binascii", "_io", "time"}
"""What the core may import beside itself: these cost next to nothing, and do no input or output."""

PYOPENSSL = {"OpenSSL", "cryptography"}

MOST_LINES = 500
MOST_LINES_OF_A_FUNCTION = 33
LONGER_FUNCTIONS = {
    "options.__init__": "the options, each with its default",
}


@functools.cache
def tree(module: str) -> ast.Module:
    return ast.parse((PACKAGE / f"{module}.py").read_bytes())


@functools.cache
def layers() -> dict[str, str]:
    """The layer of each module, by the tables in docs/design.md."""
    found, layer = {}, ""
    for line in (ROOT / "docs" / "design.md").read_text().splitlines():
        head = re.fullmatch(r"\| (core|edges|programs|listener|check) \| \|", line)
        if head:
            layer = head[1]
        elif not line.startswith("|"):
            layer = ""
        elif layer:
            modules = re.findall(r"`(\w+)\.py`", line.split("|")[1])
            found.update(dict.fromkeys(modules, layer))
    return found


def modules_of(*names: str) -> list[str]:
    return [module for module in MODULES if layers().get(module) in names]


def imports(node: ast.AST, for_types: bool = False) -> Iterator[str]:
    """What is imported, at whatever place: `.name` for a module of the package.

    What is imported for the types alone is left out, unless it is asked for.
    """
    for child in ast.iter_child_nodes(node):
        is_for_types = isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"
        if is_for_types and not for_types:
            continue
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom) and not child.level:
            yield child.module or ""
        elif isinstance(child, ast.ImportFrom):
            names = [child.module] if child.module else [alias.name for alias in child.names]
            yield from (f".{name}" for name in names)
        yield from imports(child, for_types)


def ours(module: str, for_types: bool = False) -> set[str]:
    return {name[1:] for name in imports(tree(module), for_types) if name.startswith(".")}


def functions(module: str) -> Iterator[ast.FunctionDef]:
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.FunctionDef):
            yield node


# Layers


def test_every_module_has_a_layer() -> None:
    assert set(MODULES) == set(layers())


@pytest.mark.parametrize("module", modules_of("core"))
def test_the_core_imports_only_the_core(module: str) -> None:
    assert {layers()[name] for name in ours(module, for_types=True)} <= {"core"}
    others = {name for name in imports(tree(module)) if not name.startswith(".")}
    assert others <= CORE_NEEDS | {"__future__"}


@pytest.mark.parametrize("module", modules_of("edges"))
def test_edges_import_the_core_and_each_other_by_exception(module: str) -> None:
    for name in ours(module):
        assert layers()[name] == "core" or (module, name) in EDGES_THAT_MEET


def test_the_exceptions_are_used() -> None:
    pairs = {*EDGES_THAT_MEET, *UPWARDS}
    assert {pair for pair in pairs if pair[1] not in ours(pair[0])} == set()


@pytest.mark.parametrize("module", modules_of("core", "edges", "programs"))
def test_nothing_imports_the_listener_but_the_listener(module: str) -> None:
    others = {name for name in ours(module, for_types=True) if (module, name) not in UPWARDS}
    assert "listener" not in {layers()[name] for name in others}


@pytest.mark.parametrize("module", modules_of("core", "edges"))
def test_nothing_below_imports_a_program(module: str) -> None:
    assert "programs" not in {layers()[name] for name in ours(module, for_types=True)}


@pytest.mark.parametrize("module", modules_of("core", "edges", "programs", "listener"))
def test_nothing_imports_the_check_but_the_check(module: str) -> None:
    assert "check" not in {layers()[name] for name in ours(module, for_types=True)}


def test_of_what_serves_three_modules_import_pyopenssl_and_only_late() -> None:
    who = {
        module
        for module in modules_of("core", "edges", "programs", "listener")
        if PYOPENSSL & {name.partition(".")[0] for name in imports(tree(module))}
    }
    assert who == {"certificates", "channel", "tls"}
    for module in who:
        at_once = ast.Module([node for node in tree(module).body if is_import(node)], [])
        assert not PYOPENSSL & {name.partition(".")[0] for name in imports(at_once)}


def test_a_listener_loads_at_once_what_others_import_late() -> None:
    """Later the files may be gone."""
    loaded, new = set(), {"listener"}
    while new:
        loaded |= new
        bodies = [ast.Module([*filter(is_import, tree(name).body)], []) for name in new]
        at_once = {name[1:] for body in bodies for name in imports(body) if name[0] == "."}
        new = at_once - loaded
    assert set().union(*map(ours, loaded)) <= loaded


def is_import(node: ast.stmt) -> bool:
    return isinstance(node, (ast.Import, ast.ImportFrom))


@pytest.mark.parametrize("path", sorted((ROOT / "bin").iterdir()), ids=lambda path: path.name)
def test_programs_in_bin_only_call_main(path: Path) -> None:
    program = ast.parse(path.read_bytes())
    names = set(imports(program))
    assert {name for name in names if name not in ("os", "sys")} <= {
        f"qmail_smtpd_py.{module}" for module in modules_of("programs", "listener", "check")
    }
    assert not [node for node in program.body if isinstance(node, ast.FunctionDef)]


# What nothing below main does


def names_used(module: str) -> set[str]:
    """Names, and names with their attribute, such as os.environ."""
    found = set()
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Name):
            found.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            found.add(f"{node.value.id}.{node.attr}")
    return found


@pytest.mark.parametrize("module", modules_of(*BELOW_MAIN))
def test_nothing_reads_the_environment_or_ends_the_process_or_prints(module: str) -> None:
    forbidden = {
        *("os.environ", "os.environb", "os.getenv", "os.getenvb", "os.putenv"),
        *("os._exit", "sys.exit", "exit", "quit", "sys.argv", "print", "sys.stdout", "sys.stderr"),
    }
    assert not names_used(module) & forbidden


def test_the_program_reads_its_environment_in_one_place() -> None:
    """And calls that from main, so that `serve` can be called for many connections."""
    readers = {
        function.name
        for function in (*functions("smtpd"), *functions("process"))
        for node in ast.walk(function)
        if isinstance(node, ast.Attribute) and node.attr in ("environ", "environb", "argv")
        if isinstance(node.value, ast.Name) and node.value.id in ("os", "sys")
    }
    assert readers == {"environment", "main"}
    callers = [
        function.name
        for function in functions("smtpd")
        for node in ast.walk(function)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "process.environment"
    ]
    assert callers == ["main"]


@pytest.mark.parametrize("module", [*modules_of(*BELOW_MAIN), "smtpd", "process"])
def test_no_global_state(module: str) -> None:
    """No function assigns to a global name, or changes what stands behind one of its module."""
    globals_ = {
        name.id
        for statement in tree(module).body
        if isinstance(statement, (ast.Assign, ast.AnnAssign))
        for name in ast.walk(statement)
        if isinstance(name, ast.Name) and isinstance(name.ctx, ast.Store)
    }
    for function in functions(module):
        for node in ast.walk(function):
            assert not isinstance(node, ast.Global), f"line {node.lineno}"
            assert changed_by(node) not in globals_, f"line {node.lineno}"


CHANGES = {
    *("append", "extend", "insert", "remove", "pop", "clear", "sort", "reverse"),
    *("popitem", "setdefault", "update", "add", "discard"),
}
"""The methods that change a list, a dict or a set."""


def changed_by(node: ast.AST) -> str | None:
    """The name of what is changed in its place: by `x[...] = `, `del x[...]` or `x.append()`."""
    if isinstance(node, ast.Subscript) and not isinstance(node.ctx, ast.Load):
        changed = node.value
    elif isinstance(node, ast.Call) and getattr(node.func, "attr", None) in CHANGES:
        changed = node.func.value
    else:
        return None
    return changed.id if isinstance(changed, ast.Name) else None


def test_only_the_session_changes_the_session() -> None:
    """No module but session.py assigns to an attribute of a session."""
    for module in MODULES:
        for node in ast.walk(tree(module)):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                assert ast.unparse(node.value) != "session", f"{module} line {node.lineno}"


# Replies


def test_every_named_reply_is_used() -> None:
    names = {name for name, value in vars(reply).items() if isinstance(value, Reply)}
    used = set()
    for module in MODULES:
        used |= {name.partition("reply.")[2] for name in names_used(module)}
    assert names - used == set()


def test_no_reply_is_written_anywhere_else() -> None:
    """But for what qmail-queue's exit statuses mean, and for values of the session's own."""
    makers = {
        module
        for module in MODULES
        for node in ast.walk(tree(module))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("Reply", "reply.Reply")
    }
    assert makers == {"reply", "qmail_queue", "session"}
    for node in ast.walk(tree("session")):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "Reply":
            texts = [arg for arg in node.args[1:] if isinstance(arg, ast.Constant)]
            assert not texts, f"line {node.lineno}"


def test_each_exit_status_of_qmail_queue_stands_there_once() -> None:
    """A key that is there twice would hide the first silently."""
    for node in tree("qmail_queue").body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "REPLIES":
            assert isinstance(node.value, ast.Dict)
            assert len(node.value.keys) == len(qmail_queue.REPLIES)
            return
    raise AssertionError("no table of replies")


# Commands


def test_the_command_table_has_the_commands_that_ehlo_promises() -> None:
    required = {b"HELO", b"EHLO", b"MAIL", b"RCPT", b"DATA", b"RSET", b"NOOP", b"QUIT", b"VRFY"}
    assert set(VERBS) == required | {b"AUTH", b"STARTTLS", b"HELP"}


def test_every_verb_and_check_of_the_session_is_in_the_table() -> None:
    in_table = {check for checks, _ in VERBS.values() for check in checks}
    checks = {value for name, value in vars(Session).items() if name.startswith("_check_")}
    assert checks == in_table
    verbs = {value for value in vars(Session).values() if is_verb(value)}
    assert verbs == {obey for _, obey in (*VERBS.values(), _UNKNOWN)}


def is_verb(member: object) -> bool:
    """Whether it is a method that takes a command's argument and returns a reply."""
    types = getattr(member, "__annotations__", {})
    return types == {"argument": "bytes", "return": "Reply"}


# What the compiler for the listener does not do as the interpreter does


@pytest.mark.parametrize("module", sorted(ours("preload")))
def test_no_names_are_unpacked_from_a_map(module: str) -> None:
    """mypyc takes an exception for its end, and raises that of the next call instead."""
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Tuple):
            called = node.value.func if isinstance(node.value, ast.Call) else None
            assert getattr(called, "id", "") not in ("filter", "iter", "map", "zip"), node.lineno


# Size


@pytest.mark.parametrize("module", MODULES)
def test_no_file_is_too_long(module: str) -> None:
    assert len((PACKAGE / f"{module}.py").read_text().splitlines()) <= MOST_LINES


def test_no_function_is_too_long() -> None:
    long = {
        f"{module}.{node.name}"
        for module in MODULES
        for node in functions(module)
        if node.end_lineno and node.end_lineno - node.lineno + 1 > MOST_LINES_OF_A_FUNCTION
    }
    assert long == set(LONGER_FUNCTIONS)


@pytest.mark.parametrize("module", MODULES)
def test_every_file_and_everything_public_says_what_it_is(module: str) -> None:
    assert ast.get_docstring(tree(module))
    for node in tree(module).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{module}.{node.name}"


def test_this_test_sees_the_whole_package() -> None:
    loaded = {name.partition(".")[2] for name in sys.modules if name.startswith("qmail_smtpd_py.")}
    assert {"session", "reply", "qmail_queue"} <= loaded <= set(MODULES)
