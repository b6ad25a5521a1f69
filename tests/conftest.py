"""What all tests share.

    test_core_*      no process of ours, no pyOpenSSL: the session, and the edges as functions
    test_program_*   programs and descriptors: qmail-smtpd itself, its children, its connection
    test_listener_*  qmail-smtpd-listen: its processes, and what clients see of them
    test_e2e_*       the programs as installed, with real clients, launchers and supervisors
    others           a tool, a directory or a target of the Makefile: the one in the name

QMAIL_SMTPD names the program to test, with its arguments; without it, it is that of this checkout,
run by the interpreter that runs the tests.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from conformance.stage import Stage, install_recorder  # noqa: E402
from examples import PROFILE  # noqa: E402

# The same examples in every run, so that a failure can be seen again; HYPOTHESIS_PROFILE=explore
# looks for new ones.
_COMMON = {
    "deadline": None,
    "database": None,
    "suppress_health_check": [HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
}
settings.register_profile("repeat", derandomize=True, **_COMMON)
settings.register_profile("again", max_examples=20, derandomize=True, **_COMMON)
settings.register_profile("explore", max_examples=2000, **_COMMON)
settings.load_profile(PROFILE)

HAS_TLS = "QMAIL_SMTPD" in os.environ or importlib.util.find_spec("OpenSSL") is not None


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "tls: the program needs pyOpenSSL")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("tls") and not HAS_TLS:
        pytest.skip("pyOpenSSL is not installed")


@pytest.fixture(scope="session")
def recorder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The stand-in for qmail-queue and checkpassword."""
    return install_recorder(tmp_path_factory.mktemp("recorder"))


@pytest.fixture
def stage(tmp_path: Path, recorder: Path) -> Stage:
    """An empty stage, for tests that are no cases."""
    return Stage(tmp_path, recorder)


@pytest.fixture
def host(stage: Stage) -> Stage:
    """A mail host: takes mail for example.org, has TLS, and AUTH in clear as well."""
    stage.control(
        {
            "me": "mx.example.org\n",
            "rcpthosts": "example.org\n",
            "servercert.pem": "@server-rsa.pem",
        }
    )
    stage.environment(
        {
            "TCPREMOTEIP": "192.0.2.25",
            "TCPREMOTEHOST": "client.example.com",
            "TCPLOCALHOST": "mx.example.org",
            "SMTPAUTH": "+cram",
            "FORCETLS": "0",
        }
    )
    stage.arguments("@checkpassword", "@true")
    return stage
