"""Access rules, compared with what tcprulescheck says of the same file and the same client."""

from __future__ import annotations

import os
import random
import subprocess
from pathlib import Path
from typing import Optional

import pytest
from e2e.programs import need
from listener.listening import PATIENCE
from listener.peers import compile_rules

from qmail_smtpd_py.tcprules import Rules, RulesError, addresses, instructions

Client = tuple[str, Optional[str], Optional[str]]
"""Its address, its name and its user; None for what is not known."""


def some_ip(chance: random.Random) -> str:
    return ".".join(str(chance.randint(1, 3)) for _ in range(4))


def some_name(chance: random.Random) -> str:
    return ".".join(chance.choice("abc") for _ in range(chance.randint(1, 4)))


def some_client(chance: random.Random) -> Client:
    name = some_name(chance) if chance.random() < 0.7 else None
    return some_ip(chance), name, chance.choice([None, "x", "y", ""])


def some_address(chance: random.Random) -> str:
    ip, name = some_ip(chance), some_name(chance)
    prefix = ".".join(ip.split(".")[: chance.randint(1, 3)]) + "."
    ranged = f"{prefix}1-2" + chance.choice([".", ""])
    return chance.choice(
        [
            ip,
            prefix,
            ranged,
            f"={name}",
            f"=.{name}",
            "=",
            "=.",
            "",
            f"x@{ip}",
            f"y@={name}",
            f"@{ip}",
        ]
    )


def some_rules(chance: random.Random) -> str:
    lines = []
    for number in range(chance.randint(1, 40)):
        variables = [f',V{chance.randint(1, 3)}="{number}"' for _ in range(chance.randint(0, 3))]
        what = chance.choice(["deny", 'allow,EMPTY=""', "allow,SIGN=/a=b,c:d/", "allow"])
        lines.append(f"{some_address(chance)}:{what}{''.join(variables)}\n")
    return "".join(lines)


def tcprulescheck(path: Path, client: Client) -> dict[str, str] | None:
    """What the real thing says: the variables to set, or None for a client that is turned away."""
    (program,) = need("tcprulescheck")
    names = ("TCPREMOTEIP", "TCPREMOTEHOST", "TCPREMOTEINFO")
    env = {name: value for name, value in zip(names, client) if value is not None}
    said = subprocess.run(
        [program, path], env=env, capture_output=True, timeout=PATIENCE, check=True
    )
    *lines, verdict = said.stdout.decode().splitlines()
    if verdict == "deny connection":
        return None
    assert verdict == "allow connection"
    found = [line.partition("set environment variable ")[2] for line in lines[1:]]
    variables: dict[str, str] = {}
    for name, _, value in (line.partition("=") for line in found):
        variables[name] = value  # the last one counts, as in tcpserver
    return variables


def ours(rules: Rules, client: Client) -> dict[str, str] | None:
    ip, name, user = client
    octets = [None if text is None else text.encode() for text in (name, user)]
    found = rules.find(ip.encode(), *octets)
    return found and {name.decode(): value.decode() for name, value in found.items()}


@pytest.mark.parametrize("seed", range(12))
def test_any_rules_and_clients(seed: int, tmp_path: Path) -> None:
    chance = random.Random(seed)
    text = some_rules(chance)
    path = compile_rules(tmp_path / "rules.cdb", text)
    rules = Rules(str(path))
    for _ in range(25):
        client = some_client(chance)
        expected = tcprulescheck(path, client)
        assert ours(rules, client) == expected, f"{client} under\n{text}"


def test_order_of_addresses() -> None:
    """As tcprules(1) has it, the most special first."""
    assert addresses(b"192.0.2.25", b"mail.example.net", b"joe") == [
        *(b"joe@192.0.2.25", b"joe@=mail.example.net", b"192.0.2.25", b"=mail.example.net"),
        *(b"192.0.2.", b"192.0.", b"192."),
        *(b"=.example.net", b"=.net", b"=", b""),
    ]
    assert addresses(b"192.0.2.25", None, None) == [
        b"192.0.2.25",
        b"192.0.2.",
        b"192.0.",
        b"192.",
        b"",
    ]
    assert addresses(b"2001:db8::1", None, None) == [
        *(b"2001:db8::1", b"2001:db8::", b"2001:db8:", b"2001:", b""),
    ]


def test_rules_that_are_replaced_are_the_next_ones(tmp_path: Path) -> None:
    path = tmp_path / "rules.cdb"
    rules = Rules(str(path))
    client: Client = ("192.0.2.25", None, None)
    for number in range(3):
        compile_rules(path, f':allow,N="{number}"\n')
        assert ours(rules, client) == {"N": str(number)}
    path.unlink()
    with pytest.raises(RulesError, match="No such file"):
        ours(rules, client)
    compile_rules(path, ":deny\n")
    assert ours(rules, client) is None


def test_a_file_that_may_be_missing(tmp_path: Path) -> None:
    path = tmp_path / "rules.cdb"
    rules = Rules(str(path), optional=True)
    client: Client = ("192.0.2.25", None, None)
    assert ours(rules, client) == {}
    compile_rules(path, ":deny\n")
    assert ours(rules, client) is None
    path.unlink()
    assert ours(rules, client) == {}
    path.symlink_to(path)
    with pytest.raises(RulesError, match="symbolic links"):
        ours(rules, client)


def test_a_named_pipe_turns_away_and_holds_nobody_up(tmp_path: Path) -> None:
    path = tmp_path / "rules.cdb"
    os.mkfifo(path)
    with pytest.raises(RulesError, match=r"cannot use .*rules\.cdb"):
        ours(Rules(str(path)), ("192.0.2.25", None, None))


def test_a_variable_without_a_name_is_none() -> None:
    assert instructions(b"+=x\0+NAME=y\0+\0") == {b"NAME": b"y"}


def test_instructions_that_tcprules_never_writes() -> None:
    assert instructions(b"+NAME=y\0D\0") is None
    assert instructions(b"+NAME\0-OTHER=x\0+D=y\0") == {b"D": b"y"}


def test_the_rules_before_are_not_left_open(tmp_path: Path) -> None:
    path = tmp_path / "rules.cdb"
    rules = Rules(str(path))
    client: Client = ("192.0.2.25", None, None)
    compile_rules(path, ":allow\n")
    assert ours(rules, client) == {}
    open_before = os.listdir("/proc/self/fd")
    for _ in range(3):
        compile_rules(path, ":allow\n")
        assert ours(rules, client) == {}
    assert len(os.listdir("/proc/self/fd")) == len(open_before)


@pytest.mark.parametrize("size", [1, 2047, 2048, 2060, 2071])
def test_a_file_that_is_cut_off(tmp_path: Path, size: int) -> None:
    path = compile_rules(tmp_path / "rules.cdb", ":allow\n")
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(RulesError, match="cut off"):
        ours(Rules(str(path)), ("192.0.2.25", None, None))
