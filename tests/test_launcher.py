"""Launchers and start-up images: the programs as they are installed, made from this checkout."""

from __future__ import annotations

import importlib.util
import marshal
import os
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import CodeType

import pytest
from conformance.logs import nobody_reads
from conformance.program import ROOT, Program
from conformance.stage import Stage

from qmail_smtpd_py import launcher
from qmail_smtpd_py.launcher import PROGRAMS, TOOLS

PACKAGE = ROOT / "qmail_smtpd_py"
MAGIC = importlib.util.MAGIC_NUMBER

PLAIN = {"gc", "select"}
"""What connect, EHLO, QUIT imports beyond what every interpreter has."""


@pytest.fixture(scope="module")
def launchers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the launchers of this checkout."""
    directory = tmp_path_factory.mktemp("launchers")
    write_launchers(directory)
    return directory


def write_launchers(directory: Path) -> None:
    module = [sys.executable, "-X", "no_debug_ranges", "-m", "qmail_smtpd_py.launcher"]
    subprocess.run([*module, directory], cwd=ROOT, check=True)


@pytest.fixture
def copied(launchers: Path, tmp_path: Path) -> Path:
    """The same, for a test that damages them."""
    directory = tmp_path / "launchers"
    directory.mkdir()
    write_launchers(directory)
    return directory


def start_size(launchers: Path, name: str) -> int:
    """How much of an image its launcher reads first."""
    found = re.search(r"(?m)^    start = image.read\((\d+)\)$", (launchers / name).read_text())
    assert found
    return int(found[1])


def entries(launchers: Path, name: str) -> list[tuple[str, str, CodeType]]:
    image = (launchers / f"{name}.image").read_bytes()
    found = marshal.loads(image[start_size(launchers, name) :])
    return [
        (module, file, marshal.loads(code) if isinstance(code, bytes) else code)
        for module, file, code in found
    ]


def functions(code: CodeType) -> Iterator[tuple[object, ...]]:
    """All functions, classes and comprehensions in the code, as what they are and do."""
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            simple = [item for item in constant.co_consts if not isinstance(item, CodeType)]
            yield constant.co_name, constant.co_code, constant.co_names, simple
            yield from functions(constant)


@pytest.mark.parametrize("name", PROGRAMS)
def test_an_image_has_the_code_of_the_modules(name: str, launchers: Path) -> None:
    for _, file, code in entries(launchers, name):
        path = Path(f"{PACKAGE}{file}")
        expected = compile(path.read_bytes(), path, "exec", dont_inherit=True, optimize=2)
        assert list(functions(code)) == list(functions(expected))


@pytest.mark.parametrize("name", PROGRAMS)
def test_an_image_has_all_modules_that_the_program_starts_with(name: str, launchers: Path) -> None:
    program = PROGRAMS[name]
    wanted = ", ".join((program.main, *program.late, *program.soon))
    code = f"import sys; from qmail_smtpd_py import {wanted}; print(*sys.modules)"
    command = [sys.executable, "-IS", "-c", f"import sys; sys.path.append({str(ROOT)!r}); {code}"]
    loaded = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    names = {module for module in loaded if module.startswith("qmail_smtpd_py")}
    assert {module for module, _, _ in entries(launchers, name)} == names


LOADED = """
import marshal, sys
image = open(sys.argv[1], "rb")
image.seek(int(sys.argv[2]))
sources = sys.argv[3]
""" + launcher._LOAD


def loaded(launchers: Path, name: str, code: str) -> str:
    """What some code prints where a program's modules have just been loaded from its image."""
    given = [launchers / f"{name}.image", str(start_size(launchers, name)), str(PACKAGE)]
    command = [sys.executable, "-IS", "-c", LOADED + code, *given]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("name", PROGRAMS)
def test_what_not_every_run_needs_does_not_run_at_once(name: str, launchers: Path) -> None:
    code = "print(*(name for name in sys.modules if type(sys.modules[name]) is Late))"
    late = {f"qmail_smtpd_py.{late}" for late in PROGRAMS[name].late}
    assert set(loaded(launchers, name, code).split()) == late


@pytest.mark.parametrize("name", PROGRAMS)
def test_what_was_loaded_is_left_alone_by_the_collector_and_the_rest_is_not(
    name: str, launchers: Path
) -> None:
    code = "import gc; print(gc.isenabled(), gc.get_freeze_count() > 1000)"
    assert loaded(launchers, name, code) == "True True\n"


def test_what_can_not_run_says_why_whenever_it_is_asked(launchers: Path) -> None:
    code = """
module = sys.modules["qmail_smtpd_py.cdb"]
del sys.modules["posix"]
sys.meta_path.clear()
for _ in range(2):
    try:
        module.has
    except ImportError as error:
        print(error.name)
"""
    assert loaded(launchers, "qmail-smtpd", code) == "posix\nposix\n"


def test_an_image_is_read_without_docstrings_and_assertions(launchers: Path) -> None:
    for _, _, code in entries(launchers, "qmail-smtpd"):
        assert all("AssertionError" not in names for _, _, names, _ in functions(code))
    assert b"Theory of operation" in (PACKAGE / "session.py").read_bytes()
    assert b"Theory of operation" not in (launchers / "qmail-smtpd.image").read_bytes()


@pytest.mark.parametrize("name", [*PROGRAMS, *TOOLS])
def test_a_launcher_names_the_interpreter_itself(name: str, launchers: Path) -> None:
    first = (launchers / name).read_text().splitlines()[0]
    interpreter, flags = first[2:].split(" ")
    assert flags == ("-ISXutf8" if name in PROGRAMS else "-IS")
    assert not os.path.islink(interpreter)
    assert os.path.samefile(interpreter, sys.executable)


def test_every_program_of_the_checkout_has_a_launcher(launchers: Path) -> None:
    programs = {path.name for path in (ROOT / "bin").iterdir()}
    assert {path.name for path in launchers.iterdir() if path.suffix != ".image"} == programs


@pytest.mark.parametrize("name", [*PROGRAMS, *TOOLS])
def test_a_program_of_the_checkout_is_the_same_as_its_launcher(name: str) -> None:
    main = PROGRAMS[name].main if name in PROGRAMS else TOOLS[name]
    source = (ROOT / "bin" / name).read_text()
    assert re.search(rf"^ *from qmail_smtpd_py.{main} import main$", source, re.M)
    assert re.search(rf'^"""{name}\b', source, re.M)


def imported(stage: Stage, launcher: Path, dialogue: bytes = b"EHLO a\r\n") -> set[str]:
    """What a session looks for and imports, beyond what every interpreter has."""
    interpreter = launcher.read_text().split()[0][2:]
    stage.control({"me": "mx.example.org\n"})
    command = [interpreter, "-X", "importtime", "-IS", str(launcher)]
    with Program(stage, command=command) as program:
        program.client.send(dialogue + b"QUIT\r\n")
        assert program.client.read_to_end().endswith(b"221 mx.example.org\r\n")
        assert program.wait() == 0
    bare = subprocess.run(
        [interpreter, "-X", "importtime", "-IS", "-c", "pass"], capture_output=True, check=True
    )
    return modules(program.log) - modules(bare.stderr)


def modules(importtime: bytes) -> set[str]:
    return set(re.findall(r"\|\s+([\w.]+)$", importtime.decode(), re.M))


def test_a_plain_session_imports_nothing_but_its_image(stage: Stage, launchers: Path) -> None:
    assert imported(stage, launchers / "qmail-smtpd") == PLAIN


def test_a_message_imports_no_more(stage: Stage, launchers: Path) -> None:
    mail = b"MAIL FROM:<>\r\nRCPT TO:<u@example.org>\r\nDATA\r\n\r\nx\r\n.\r\n"
    assert imported(stage, launchers / "qmail-smtpd", mail) == PLAIN
    assert len(stage.deliveries()) == 1


def test_a_module_that_is_not_in_the_image_is_imported(stage: Stage, launchers: Path) -> None:
    found = imported(stage, launchers / "qmail-smtpd", b"MAIL FROM:<u@[127.0.0.1]>\r\n")
    assert {name for name in found if name.startswith("qmail_")} == {"qmail_smtpd_py.localip"}


@pytest.mark.parametrize("damage", ["gone", "of another interpreter", "cut off at its start"])
def test_without_a_good_image_modules_are_imported(
    damage: str, stage: Stage, launchers: Path, copied: Path
) -> None:
    image = copied / "qmail-smtpd.image"
    if damage == "gone":
        image.unlink()
    elif damage == "of another interpreter":
        make_foreign(copied, "qmail-smtpd")
    else:
        image.write_bytes(image.read_bytes()[: start_size(copied, "qmail-smtpd") - 1])
    found = imported(stage, copied / "qmail-smtpd")
    in_image = {name for name, _, _ in entries(launchers, "qmail-smtpd")}
    not_at_once = {"qmail_smtpd_py.qmail_queue"}
    assert {name for name in found if name.startswith("qmail_")} == in_image - not_at_once


def make_foreign(launchers: Path, name: str) -> None:
    """Have a program's image be that of another interpreter."""
    image, size = launchers / f"{name}.image", start_size(launchers, name)
    octets = image.read_bytes()
    assert octets[:size].endswith(MAGIC)
    image.write_bytes(octets[: size - len(MAGIC)] + b"\0" * len(MAGIC) + octets[size:])


@pytest.mark.parametrize(("name", "status"), [("qmail-smtpd", 1), ("qmail-queue-maildir", 54)])
def test_an_image_that_is_not_used_does_not_take_the_place_of_a_descriptor(
    name: str, status: int, copied: Path, stage: Stage
) -> None:
    stage.control({"me": "mx.example.org\n"})
    make_foreign(copied, name)
    done = subprocess.run(
        ["sh", "-c", 'exec "$0" <&-', copied / name],
        capture_output=True,
        env=stage.env,
        check=False,
    )
    assert (done.returncode, done.stdout.count(b"\n")) == (status, name == "qmail-smtpd")


def test_there_are_words_even_where_none_can_be_compiled(copied: Path, stage: Stage) -> None:
    program = copied / "qmail-smtpd"
    program.write_text(re.sub(r'(?s)run = r""".*?"""', "run = '('", program.read_text()))
    (copied / "qmail-smtpd.image").unlink()
    done = subprocess.run([program], capture_output=True, env=stage.env, check=False)
    assert (done.returncode, done.stdout) == (1, b"421 out of memory (#4.3.0)\r\n")
    assert b"is the memory limit too low?" in done.stderr


def cut_off(image: Path) -> None:
    """Leave an image half of what it has."""
    octets = image.read_bytes()
    image.write_bytes(octets[: len(octets) // 2])


@pytest.mark.parametrize(
    ("name", "status", "reply"),
    [
        ("qmail-smtpd", 1, b"421 out of memory (#4.3.0)\r\n"),
        ("qmail-queue-maildir", 51, b""),
        ("checkpassword-users", 111, b""),
    ],
)
def test_a_program_that_can_not_be_loaded_is_a_temporary_problem(
    name: str, status: int, reply: bytes, copied: Path
) -> None:
    cut_off(copied / f"{name}.image")
    done = subprocess.run(
        [copied / name], stdin=subprocess.DEVNULL, capture_output=True, check=False
    )
    assert (done.returncode, done.stdout) == (status, reply)
    why = rb"\w+ \(uid \d+\): .* is the memory limit too low\?"
    line = rb'%s\[\d+\]: error why="%s"\n' % (name.encode(), why)
    assert re.fullmatch(line, done.stderr)


def test_a_log_that_nobody_reads_does_not_hold_up_what_can_not_be_loaded(copied: Path) -> None:
    cut_off(copied / "qmail-smtpd.image")
    with nobody_reads() as log:
        done = subprocess.run(
            [copied / "qmail-smtpd"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log,
            timeout=30,
            check=False,
        )
    assert done.stdout == b"421 out of memory (#4.3.0)\r\n"


@pytest.mark.parametrize(
    "error", ["MemoryError", "ImportError", "OSError(12, 'Cannot allocate memory')"]
)
def test_a_tool_that_can_not_be_loaded_says_why(
    error: str, launchers: Path, tmp_path: Path
) -> None:
    package = tmp_path / "qmail_smtpd_py"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "listener.py").write_text(f"raise {error}\n")
    text = (launchers / "qmail-smtpd-listen").read_text()
    tool = tmp_path / "qmail-smtpd-listen"
    tool.write_text(re.sub(r"(?m)^sys.path .*", f"sys.path += [{str(tmp_path)!r}]", text))
    tool.chmod(0o755)
    done = subprocess.run([tool], capture_output=True, text=True, check=False)
    assert done.returncode == 111
    assert re.fullmatch(
        r"qmail-smtpd-listen: fatal: .+ is the memory limit too low\?\n", done.stderr
    )


def test_a_memory_limit_that_is_too_low_is_a_temporary_problem(
    stage: Stage, launchers: Path
) -> None:
    """From far too little to enough: a signal, then the interpreter's word, and ours the last."""
    stage.control({"me": "mx.example.org\n"})
    done, has_begun = None, False
    for limit in range(4_000_000, 200_000_000, 250_000):
        before, done = done, run_limited(launchers / "qmail-smtpd", limit, stage.env)
        if done.returncode == 0:
            break
        assert done.stdout in (b"", b"421 out of memory (#4.3.0)\r\n")
        has_begun = has_begun or b"memory limit too low?" in done.stderr
        assert done.stderr or done.returncode < 0 or not has_begun
    assert done and done.stdout == b"220 mx.example.org ESMTP\r\n221 mx.example.org\r\n"
    assert before and b"memory limit too low?" in before.stderr


def run_limited(
    program: Path, limit: int, environ: dict[str, str]
) -> subprocess.CompletedProcess[bytes]:
    """Run it with this much address space, in octets."""
    return subprocess.run(
        [program],
        input=b"QUIT\r\n",
        capture_output=True,
        env=environ,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)),
        check=False,
    )


def test_what_the_system_has_is_found_where_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "of_the_system").mkdir()
    (tmp_path / "of_the_system" / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(launcher, "NEEDED", ("of_the_system", "not_there"))
    text = launcher.tool("qmail-smtpd-listen").decode()
    assert re.search(rf"(?m)^sys.path \+= \[.*'{tmp_path}'\]$", text)


def test_installed_launchers_can_be_moved(stage: Stage, copied: Path, tmp_path: Path) -> None:
    moved = tmp_path / "qmail-smtpd"
    shutil.move(copied / "qmail-smtpd", moved)
    assert imported(stage, moved) == PLAIN


def test_the_tool_prints_what_it_has_to_say(launchers: Path) -> None:
    done = subprocess.run(
        [launchers / "qmail-smtpd-users", "--help"], capture_output=True, check=True
    )
    assert done.stdout.startswith(b"usage: qmail-smtpd-users")
