"""The fixtures of the listener's tests; a test module names this one in `pytest_plugins`."""

from __future__ import annotations
