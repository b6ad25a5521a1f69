"""The listener: qmail-smtpd-listen as a process, and what stands around it.

    listening   a running listener, its workers and its log; also as the helper of other programs
    world       names, ident answers and addresses of this test's own; a private view of /etc
    mail        pieces of a session
    peers       the real tcpserver, and haproxy, each as a process
    fixtures    the fixtures of all tests/test_listener_*.py

What is missing on this host is named, and skips the tests that need it; where CI is set, they fail.
"""

import pytest

_ASSERTING = ("listening", "world", "mail", "peers", "fixtures")
pytest.register_assert_rewrite(*(f"{__name__}.{module}" for module in _ASSERTING))
