"""systemd as the launcher of our units: its socket-activate in the place of it, and the real one.

The units are those that `make install` copies.  Only what belongs to the host is exchanged: users,
ports, the places of qmail, and where the log goes.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from .log import PATIENCE, parse
from .programs import CHECKOUT, lack, mail_user, need
from .service import ADDRESS, Service

UNITS = CHECKOUT / "systemd"
PORTS = {"smtpd": 25, "submission": 587, "smtps": 465}

PROGRAMS = "/usr/local/qmail-smtpd-py/bin"
"""Where the units have our programs."""


def free_port(address=ADDRESS):
    """A port that nobody listens on."""
    with socket.create_server(
        (address, 0), family=socket.AF_INET6 if ":" in address else socket.AF_INET
    ) as server:
        return server.getsockname()[1]


def values(unit, name):
    """The values of a setting in the text of a unit, as words."""
    return [shlex.split(value) for value in re.findall(rf"^{name}=(.*)$", unit, re.M)]


class Activated(Service):
    """A unit's environment and command under systemd-socket-activate, which knows no units.

    What systemd would say of the client comes from `environ`, as this does not say it.
    """

    def __init__(self, home, name, environ=None, address=ADDRESS):
        super().__init__(home, environ)
        self._unit = (UNITS / f"qmail-{name}@.service").read_text()
        self._address = address

    def run_file(self):
        activate, setpriv = need("systemd-socket-activate", "setpriv")
        words = [word for line in values(self._unit, "Environment") for word in line]
        variables = dict(word.replace("%H", "mx.example.org").split("=", 1) for word in words)
        check = shlex.split(variables.get("CHECK", ""))
        variables.update(self.environ)
        (command,) = values(self._unit, "ExecStart")
        command = [*command[:-1], *check]
        where = f"[{self._address}]" if ":" in self._address else self._address
        line = [activate, "--accept", "--inetd", f"--listen={where}:{free_port(self._address)}"]
        line += [f"--setenv={name}={value}" for name, value in variables.items()]
        line += [word.replace(PROGRAMS, str(self.home.programs)) for word in command]
        if os.getuid() == 0:
            user = mail_user()
            ids = [f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups"]
            line = [setpriv, *ids, "--", *line]
        return f"#!/bin/sh\nexec {shlex.join(map(str, line))} 2>&1\n"

    def _read_log(self, process):
        super()._read_log(process, r"^Listening on .*:(\d+) as \d+\.$")

    def events(self, name=None, sessions=1):
        return super().events(name, sessions, r"^Child \d+ died with code")


class Manager:
    """A real systemd, as of a user, with the sockets of our units; `ports` is where they listen.

    It believes that it is on a host that was booted with systemd: its /run is one of its own.
    RELAYCLIENT, empty, is in the environment file of port 25.
    """

    def __init__(self, home):
        self.home = home
        self.ports = {name: free_port() for name in PORTS}
        self._place = home.path / "manager"
        self._logs = home.writable("logs")
        self._units = self._place / "config/systemd/user"
        self._units.mkdir(parents=True)
        (self._place / "run").mkdir(mode=0o700)
        wanted = " ".join(self._put_all())
        (self._units / "ours.target").write_text(f"[Unit]\nWants={wanted}\n")

    def _put_all(self):
        """Write all units; the names of those that are to be started."""
        for name in PORTS:
            self._put(name)
        return [f"qmail-{name}.socket" for name in PORTS]

    def _put(self, name):
        """Write the units for a port, with what this host has."""
        variables = self._place / name
        more = "RELAYCLIENT=\n" if name == "smtpd" else ""
        variables.write_text(f"QMAILHOME={self.home.path}\nTCPLOCALHOST=mx.example.org\n{more}")
        service = (UNITS / f"qmail-{name}@.service").read_text()
        listening = (UNITS / f"qmail-{name}.socket").read_text()
        for old, new in {
            PROGRAMS: self.home.programs,
            "User=qmaild": f"User={mail_user().pw_name}",
            "Group=nofiles": f"Group={mail_user().pw_gid}",
            f"-/etc/qmail-smtpd/{PORTS[name]}": variables,
            "=journal": f"=append:{self._logs / name}",
            "PrivateTmp=yes": "",  # the home is there
        }.items():
            assert old in service, old
            service = service.replace(old, str(new))
        (self._units / f"qmail-{name}@.service").write_text(service)
        old = f"ListenStream={PORTS[name]}\n"
        assert old in listening
        listening = listening.replace(old, f"ListenStream={ADDRESS}:{self.ports[name]}\n")
        (self._units / f"qmail-{name}.socket").write_text(listening)

    def __enter__(self):
        unshare, systemd = need("unshare", "/lib/systemd/systemd")
        own_run = 'mount -t tmpfs none /run && mkdir -p /run/systemd/system && exec "$@"'
        self._process = subprocess.Popen(
            [
                *(unshare, "--mount", "sh", "-c", own_run, "sh"),
                *(systemd, "--user", "--unit=ours.target", "--log-target=console"),
            ],
            env={
                "PATH": os.environ.get("PATH", os.defpath),
                "HOME": str(self._place),
                "XDG_CONFIG_HOME": str(self._place / "config"),
                "XDG_RUNTIME_DIR": str(self._place / "run"),
            },
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        deadline = time.monotonic() + PATIENCE
        while not all(_is_listening(port) for port in self.ports.values()):
            if self._process.poll() is not None or time.monotonic() > deadline:
                self._process.kill()
                lack(f"no systemd here: {self._process.stderr.read().decode()}")
            time.sleep(0.02)
        return self

    def __exit__(self, *_):
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            raise
        finally:
            self._process.stderr.close()

    def log(self, name):
        """The lines of the log of a port so far."""
        path = self._logs / name
        return path.read_text().splitlines() if path.exists() else []

    def wait_for_disconnect(self, name):
        """The events of a session, once it is over."""
        deadline = time.monotonic() + PATIENCE
        while not any(": disconnect " in line for line in self.log(name)):
            if time.monotonic() > deadline:
                pytest.fail(f"no end of a session: {self.log(name)}", pytrace=False)
            time.sleep(0.02)
        return [event for event in map(parse, self.log(name)) if event]

    def wait_until_gone(self, pattern):
        """Wait until there are no units of this name, failed ones among them."""
        deadline = time.monotonic() + PATIENCE
        while left := self.control("list-units", "--all", "--plain", "--no-legend", pattern):
            if time.monotonic() > deadline:
                pytest.fail(f"still there:\n{left}", pytrace=False)
            time.sleep(0.02)

    def control(self, *words):
        """What systemctl says."""
        (systemctl,) = need("systemctl")
        environ = {"XDG_RUNTIME_DIR": str(self._place / "run"), "PATH": os.defpath}
        return subprocess.run(
            [systemctl, "--user", *words], env=environ, capture_output=True, text=True, check=False
        ).stdout


class ListenManager(Manager):
    """The same with the units of the listener, whose instance is a port of this host."""

    def _put_all(self):
        self.port = free_port()
        self.ports = {"listen": self.port}
        variables = self._place / str(self.port)
        options = "-v -R -H -l mx.example.org"
        variables.write_text(f"QMAILHOME={self.home.path}\nOPTIONS={options}\n")
        text = (UNITS / "qmail-smtpd-listen@.service").read_text()
        for old, new in {
            PROGRAMS: self.home.programs,
            "User=qmaild": f"User={mail_user().pw_name}",
            "Group=nofiles": f"Group={mail_user().pw_gid}",
            "/etc/qmail-smtpd/%i": variables,
            "SyslogIdentifier=smtpd": f"StandardError=append:{self._logs / 'listen'}",
            "PrivateTmp=yes": "",  # the home is there
        }.items():
            assert old in text, old
            text = text.replace(old, str(new))
        (self._units / "qmail-smtpd-listen@.service").write_text(text)
        text = (UNITS / "qmail-smtpd-listen@.socket").read_text()
        text = text.replace("ListenStream=0.0.0.0:%i", f"ListenStream={ADDRESS}:%i")
        (self._units / "qmail-smtpd-listen@.socket").write_text(text)
        return [f"{self.unit}.socket", f"{self.unit}.service"]

    @property
    def unit(self):
        """The name of both units."""
        return f"qmail-smtpd-listen@{self.port}"

    @property
    def pid(self):
        """The main process of the service, as systemd knows it."""
        return int(self.control("show", "--property=MainPID", "--value", f"{self.unit}.service"))

    def wait_for_status(self, count):
        """Wait until so many listeners, one after the other, have said that they serve."""
        deadline = time.monotonic() + PATIENCE
        while sum(": status: 0/40" in line for line in self.log("listen")) < count:
            if time.monotonic() > deadline:
                pytest.fail(f"it does not serve: {self.log('listen')}", pytrace=False)
            time.sleep(0.02)


def _is_listening(port):
    """Whether somebody listens, as the kernel's table has it: to connect would start a session."""
    word = int.from_bytes(socket.inet_aton("127.0.0.1"), sys.byteorder)
    local = f"{word:08X}:{port:04X}"
    lines = Path("/proc/net/tcp").read_text().splitlines()[1:]
    return any(line.split()[1] == local and line.split()[3] == "0A" for line in lines)
