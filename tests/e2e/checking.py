"""qmail-smtpd-check as an administrator starts it, on a home and a run file of the test's own."""

from __future__ import annotations

import json
import os
import shlex
import subprocess

from .programs import find, mail_user
from .service import NAME

FINE, WARNED, FAILED = 0, 1, 2


class Found:
    """What the check printed with --json; `arguments` are what it was started with."""

    def __init__(self, status, report, arguments):
        self.status = status
        self.report = report
        self.arguments = arguments

    @property
    def codes(self):
        """The codes of all problems."""
        return [problem["code"] for problem in self.report["problems"]]

    def problem(self, code):
        """The one problem of this code."""
        problems = [problem for problem in self.report["problems"] if problem["code"] == code]
        assert len(problems) == 1, self
        return problems[0]

    def only(self, code, level):
        """The same, where there is no other problem; the status is that of the level."""
        assert self.codes == [code], self
        problem = self.problem(code)
        assert problem["level"] == level
        assert self.status == {"warning": WARNED, "error": FAILED}[level]
        return problem

    def fact(self, name):
        """The one fact of this name."""
        facts = [fact for fact in self.report["facts"] if fact["name"] == name]
        assert len(facts) == 1, self
        return facts[0]

    def __repr__(self):
        return json.dumps(self.report, indent=2)


class Checked:
    """A home, a run file for it, and the check."""

    def __init__(self, home):
        self.home = home
        self.program = home.programs / "qmail-smtpd-check"

    def run_file(
        self,
        port=25,
        exports=(),
        script="",
        check=(),
        host="0",
        memory=64_000_000,
        options=(),
        end="2>&1",
        program=None,
    ):
        """Write a run file: the variables that it exports, lines before the last, and that one."""
        user = mail_user()
        ids = ["-u", user.pw_uid, "-g", user.pw_gid] if os.getuid() == 0 else []
        command = ["softlimit", "-m", memory, "tcpserver", "-v", "-R", "-l", NAME, *options]
        command += [*ids, host, port, program or self.home.programs / "qmail-smtpd", *check]
        variables = {"QMAILHOME": self.home.path, **dict(exports)}
        lines = [f"export {name}={shlex.quote(str(text))}" for name, text in variables.items()]
        last = f"exec {shlex.join(map(str, command))} {end}"
        return self.write_run("\n".join(["#!/bin/sh", *lines, script, last, ""]))

    def write_run(self, text):
        """Write a run file that says this; its path."""
        path = self.home.path / "run"
        path.write_text(text)
        path.chmod(0o755)
        return path

    def find(self, *arguments, environ=None, **service):
        """Check a service, by default that of a run file that is made of `service`."""
        if not arguments:
            arguments = ["--env-from", self.run_file(**service)]
        printed = self.run("--json", *arguments, environ=environ)
        report = json.loads(printed.stdout)
        assert report["status"] == printed.returncode
        counts = {"error": 0, "warning": 0}
        for problem in report["problems"]:
            counts[problem["level"]] += 1
            assert problem["what"] and problem["remedy"]
        assert (report["errors"], report["warnings"]) == tuple(counts.values())
        assert printed.stderr == ""
        return Found(printed.returncode, report, arguments)

    def text(self, found):
        """What is printed for people, of what was found."""
        printed = self.run(*found.arguments)
        assert printed.returncode == found.status
        return printed.stdout

    def run(self, *arguments, environ=None):
        """Start it; what came of it."""
        command = [str(word) for word in (self.program, *arguments)]
        env = {"PATH": os.environ["PATH"], **(environ or {})}
        return subprocess.run(
            command, check=False, capture_output=True, text=True, timeout=120, env=env
        )


def compile_rules(path, rules):
    """Have tcprules compile rules into PATH.cdb, from the source at PATH; the cdb."""
    path.write_text(rules)
    cdb = path.with_name(path.name + ".cdb")
    command = [find("tcprules"), cdb, f"{cdb}.tmp"]
    subprocess.run(command, input=rules.encode(), check=True, timeout=30)
    cdb.chmod(0o644)
    return cdb
