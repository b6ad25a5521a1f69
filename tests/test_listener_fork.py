"""What workers share by the fork, and what they must not share."""

from __future__ import annotations

import subprocess
import sys

import pytest

NUMBERS = """
import os, sys
from qmail_smtpd_py import afterfork
afterfork.leave_out()
import random, threading
from OpenSSL import SSL
for _ in range(3):
    hear, tell = os.pipe()
    pid = os.fork()
    if not pid:
        thread = threading.Thread(target=lambda: os.write(tell, %s))
        thread.start()
        thread.join()
        os._exit(0)
    os.close(tell)
    print(os.read(hear, 100).hex())
    os.waitpid(pid, 0)
"""


@pytest.mark.parametrize(
    "draw",
    [
        "str(random.random()).encode()",
        "str(random.getrandbits(64)).encode()",
        "str(random.Random().random()).encode()",
    ],
)
def test_no_two_workers_have_random_numbers_in_common(draw: str) -> None:
    found = subprocess.run(
        [sys.executable, "-c", NUMBERS % draw], stdout=subprocess.PIPE, check=True, text=True
    )
    numbers = found.stdout.split()
    assert len(numbers) == len(set(numbers)) == 3


def test_what_forks_anew_costs_no_hook() -> None:
    program = """
import os
registered = []
os.register_at_fork = lambda **hooks: registered.append(hooks)
from qmail_smtpd_py import afterfork
afterfork.leave_out()
from OpenSSL import SSL
print(registered)
"""
    found = subprocess.run(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, check=True, text=True
    )
    assert found.stdout == "[]\n"
