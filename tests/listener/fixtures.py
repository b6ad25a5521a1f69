"""The fixtures of the listener's tests; a test module names this one in `pytest_plugins`."""

from __future__ import annotations

import pytest
from conformance.stage import Stage


@pytest.fixture
def mx(stage: Stage) -> Stage:
    """A host that takes mail for example.org, with TLS, and AUTH in clear as well."""
    stage.control(
        {
            "me": "mx.example.org\n",
            "rcpthosts": "example.org\n",
            "servercert.pem": "@server-rsa.pem",
        }
    )
    stage.environment({"SMTPAUTH": "", "FORCETLS": "0"})
    stage.arguments("@checkpassword", "@true")
    return stage
