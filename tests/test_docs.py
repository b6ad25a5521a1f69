"""What the documents say is so: variables, control files, replies, log fields, files, links.

What the code reads is taken from its syntax trees, so that a variable or a control file that is
added without a word in the manual page is found without a list to keep.
"""

from __future__ import annotations

import ast
import functools
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from e2e.programs import need

import qmail_smtpd_py
from qmail_smtpd_py import qmail_queue, reply
from qmail_smtpd_py.subject import SERVICE_VARIABLES

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "qmail_smtpd_py"
PAGES = sorted(ROOT.glob("man/*.8"))
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("*/*.md")])

MAIN_MODULES = {
    "qmail-smtpd": "smtpd",
    "qmail-queue-maildir": "maildir_queue",
    "checkpassword-users": "users_check",
    "qmail-smtpd-users": "users_tool",
}
"""The module that each program begins with; its manual page has the program's name."""

THE_INTERPRETERS = {"LC_CTYPE"}
"""Variables that the code only takes out again, as the interpreter puts them in."""

FILE_METHODS = {"exists", "line", "list", "load", "number", "open"}


@functools.cache
def tree(module: str) -> ast.Module:
    return ast.parse((PACKAGE / f"{module}.py").read_bytes())


@functools.cache
def modules_of(main: str) -> frozenset[str]:
    """The modules that a program may load, at its start or later."""
    found, ahead = set(), [main]
    while ahead:
        module = ahead.pop()
        if module in found:
            continue
        found.add(module)
        for node in imports(tree(module)):
            names = [node.module] if node.module else [alias.name for alias in node.names]
            ahead += [name for name in names if name]
    return frozenset(found)


def imports(node: ast.AST) -> Iterator[ast.ImportFrom]:
    """What is imported of the package when it runs, at whatever place."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and getattr(child.test, "id", "") == "TYPE_CHECKING":
            continue
        if isinstance(child, ast.ImportFrom) and child.level == 1:
            yield child
        yield from imports(child)


def text_of(node: ast.AST | None) -> str | None:
    """The text of a constant, octets or not."""
    value = getattr(node, "value", None)
    if isinstance(value, bytes):
        return value.decode("latin-1")
    return value if isinstance(node, ast.Constant) and isinstance(value, str) else None


def is_environment(node: ast.AST) -> bool:
    name = getattr(node, "id", getattr(node, "attr", ""))
    return name in ("environ", "_environ", "environb")


def variables_read(module: str) -> Iterator[str]:
    """The variables that a module looks for in an environment."""
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.args:
            is_read = node.func.attr in ("get", "pop") and is_environment(node.func.value)
            if is_read or ast.unparse(node.func.value).endswith("sources"):
                yield text_of(node.args[0]) or ""
        elif isinstance(node, ast.Subscript) and is_environment(node.value):
            yield text_of(node.slice) or ""
        elif isinstance(node, ast.Compare) and is_environment(node.comparators[0]):
            yield text_of(node.left) or ""


def control_files_read(module: str) -> Iterator[str]:
    """The control files that a module names."""
    constants = {
        target.id: text_of(node.value)
        for node in tree(module).body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    for node in ast.walk(tree(module)):
        text = text_of(node) or ""
        if re.fullmatch(r"control/[\w.]+", text):
            yield text.partition("/")[2]
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.args:
            receiver = ast.unparse(node.func.value)
            if node.func.attr in FILE_METHODS and receiver.endswith("files"):
                name = node.args[0]
                yield text_of(name) or constants.get(getattr(name, "id", "")) or ""
            elif receiver.endswith("sources") and len(node.args) > 1:
                yield text_of(node.args[1]) or ""


def found_in(main: str, search: object) -> set[str]:
    names = {name for module in modules_of(main) for name in search(module)}  # type: ignore[operator]
    return names - {""}


@functools.cache
def manual(name: str) -> str:
    """A manual page as it is read, with single blanks."""
    (mandoc,) = need("mandoc")
    command = [mandoc, "-Tascii", str(ROOT / f"man/{name}.8")]
    page = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return " ".join(re.sub(r".\x08", "", page).split())


# Manual pages


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_manual_page_is_well_formed(page: Path) -> None:
    (mandoc,) = need("mandoc")
    command = [mandoc, "-Tlint", "-W", "warning", str(page)]
    lint = subprocess.run(command, check=False, capture_output=True, text=True)
    assert (lint.returncode, lint.stdout) == (0, "")


def test_every_installed_program_has_a_manual_page() -> None:
    command = [sys.executable, "-c", "import install; print(*install.PROGRAMS)"]
    listed = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT / "setup")
    programs = listed.stdout.split()
    assert set(MAIN_MODULES) <= set(programs)
    assert {f"{program}.8" for program in programs} <= {page.name for page in PAGES}


def test_the_search_finds_what_is_known_to_be_there() -> None:
    variables = found_in("smtpd", variables_read)
    assert variables >= {"SMTPAUTH", "FORCETLS", "SMTPS", "DATABYTES", "TLSCIPHERS", "QMAILHOME"}
    files = found_in("smtpd", control_files_read)
    assert files >= {"me", "rcpthosts", "morercpthosts.cdb", "clientcrl.pem", "timeoutsmtpd"}


@pytest.mark.parametrize("program", MAIN_MODULES)
def test_variables_are_in_the_manual_page(program: str) -> None:
    variables = found_in(MAIN_MODULES[program], variables_read) - THE_INTERPRETERS
    described = manual(program).partition("ENVIRONMENT")[2]
    assert [name for name in sorted(variables) if not re.search(rf"\b{name}\b", described)] == []


def test_control_files_are_in_the_manual_page() -> None:
    described = manual("qmail-smtpd").partition("CONTROL FILES")[2].partition("ENVIRONMENT")[0]
    files = found_in("smtpd", control_files_read)
    assert [name for name in sorted(files) if f" {name} " not in described] == []


def test_the_manual_page_has_no_variable_that_nothing_reads() -> None:
    source = (ROOT / "man/qmail-smtpd.8").read_text().partition(".Sh ENVIRONMENT")[2]
    entries = re.findall(r"^\.It Ev (.+)$", source.partition(".Sh ")[0], re.M)
    described = {name for entry in entries for name in entry.split(" , ")}
    assert described == found_in("smtpd", variables_read) - THE_INTERPRETERS


def test_replies_are_in_the_manual_page() -> None:
    constants = [value for value in vars(reply).values() if isinstance(value, reply.Reply)]
    more = [qmail_queue.CRASHED, qmail_queue.PERMANENT, qmail_queue.TEMPORARY]
    page = manual("qmail-smtpd").replace(" \\ ", " ")
    missing = []
    for answer in [*constants, *qmail_queue.REPLIES.values(), *more]:
        text = f"{answer.code} {answer.lines[0].decode().strip()}"
        if text not in page:
            missing.append(text)
    assert missing == []


def test_codes_of_problems_are_in_the_manual_page() -> None:
    """What the check calls a problem, for programs to know it by."""
    codes = set()
    for module in modules_of("check"):
        for node in ast.walk(tree(module)):
            if isinstance(node, ast.Call) and len(node.args) >= 3 and tells_a_problem(node.func):
                codes.add(text_of(node.args[0]))
            elif isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "_REMEDIES":
                codes |= {text_of(row.elts[1]) for row in node.value.elts}  # type: ignore[attr-defined]
    source = (ROOT / "man/qmail-smtpd-check.8").read_text().partition(".Sh DIAGNOSTICS")[2]
    described = set(re.findall(r"^\.Li (\S+)", source.partition(".Sh ")[0], re.M))
    assert codes - {None} >= {"memory", "open-relay", "certificate-expired", "not-exported"}
    assert described == codes - {None}


def test_the_check_knows_each_variable_that_an_administrator_sets() -> None:
    """So that one that a run file does not export is an error."""
    read = found_in("smtpd", variables_read) - THE_INTERPRETERS - {"PATH"}
    given = {name for name in read if name.startswith(("TCP", "SSL", "REMOTE_", "OPENSSL_"))}
    others = {"QMAILMAILDIR", "SMTPUSERS"}  # those of the programs beside it
    assert set(SERVICE_VARIABLES) == read - given | others


def tells_a_problem(function: ast.AST) -> bool:
    return getattr(function, "attr", getattr(function, "id", "")) in ("error", "warning", "tell")


# The other documents


def test_log_events_and_fields_are_described() -> None:
    described = (ROOT / "docs/log.md").read_text()
    keys, events = set(), set()
    modules = ("conduct", "session", "smtpd", "encryption", "channel", "transaction", "transcript")
    for module in modules:
        for node in ast.walk(tree(module)):
            if isinstance(node, ast.Dict):
                keys |= {key.value for key in node.keys if isinstance(key, ast.Constant)}
            elif isinstance(node, ast.Call) and len(node.args) == 2 and is_log(node.func):
                events.add(text_of(node.args[0]))
    fields = {key for key in keys if isinstance(key, str)}
    assert events - {None} >= {"connect", "tls", "auth", "mail", "limit", "error", "disconnect"}
    assert fields >= {"cipher", "mechanism", "qp", "from", "why"}
    assert [event for event in events if event and f"### {event}\n" not in described] == []
    assert [field for field in sorted(fields) if f"`{field}`" not in described] == []


THEIR_WORDS = """
    ee key too small; ca md too weak; bad base64 decode; Is a directory; Exec format error
    no shared cipher; unsupported protocol; wrong version number; http request
    tlsv1 alert unknown ca; alert certificate unknown
"""
"""What OpenSSL and the kernel say in our lines."""


def test_lines_that_have_a_remedy_are_lines_that_there_are() -> None:
    """Each word of theirs is somewhere in the code, or not ours."""
    described = (ROOT / "docs/log.md").read_text()
    table = described.partition("\n## Line seen, ")[2].partition("\n## ")[0]
    lines = []
    for row in table.splitlines():
        if row.startswith("| `"):
            lines += re.findall("`(.*?)`", row.split(" | ")[0])
    assert len(lines) > 60
    known = set(re.findall(r"[A-Za-z]+", THEIR_WORDS))
    for module in PACKAGE.glob("*.py"):
        known |= set(re.findall(r"[A-Za-z]+", module.read_text()))
    assert [line for line in lines if set(re.findall(r"[A-Za-z]{4,}", line)) - known] == []


def is_log(function: ast.AST) -> bool:
    return getattr(function, "attr", "") in ("log", "_log", "_tell", "write")


def test_the_design_has_every_module() -> None:
    design = (ROOT / "docs/design.md").read_text()
    modules = {path.name for path in PACKAGE.glob("*.py")} - {"__init__.py"}
    named = set(re.findall(r"`(\w+\.py)`", design))
    assert modules - named == set()
    assert {name for name in named - modules if "/" not in name} == set()


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document: Path) -> None:
    dead = []
    for target in re.findall(r"\]\(([^)\s]+)\)", document.read_text()):
        if re.match(r"\w+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (document.parent / path).resolve() if path else document
        if not file.exists() or (anchor and anchor not in anchors(file)):
            dead.append(target)
    assert dead == []


def anchors(document: Path) -> set[str]:
    """What a link can point to: the headings, as they are commonly made anchors."""
    headings = re.findall(r"^#+ (.+)$", document.read_text(), re.M)
    return {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_make_has_the_targets_that_are_named(document: Path) -> None:
    targets = set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(), re.M))
    named = re.findall(r"(?:`|^    (?:sudo )?)make ([a-z][\w-]*)", document.read_text(), re.M)
    assert set(named) <= targets


def test_changes_begin_with_this_version() -> None:
    first = re.search(r"^## (\S+)", (ROOT / "CHANGES.md").read_text(), re.M)
    assert first and first[1] == qmail_smtpd_py.__version__
