"""A pytest plugin for CI: a test that is skipped has failed, as nobody would see it there."""

from __future__ import annotations

import pytest


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport() -> object:
    """Make of a test that was skipped, but for one that is known to fail, a failure."""
    outcome = yield
    _forbid(outcome.get_result())


@pytest.hookimpl(hookwrapper=True)
def pytest_make_collect_report() -> object:
    """The same for a module that was skipped as a whole."""
    outcome = yield
    _forbid(outcome.get_result())


def _forbid(report: pytest.TestReport | pytest.CollectReport) -> None:
    if report.skipped and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        where, line, why = report.longrepr
        report.longrepr = f"{where}:{line}: {why}; in CI no test is skipped"
