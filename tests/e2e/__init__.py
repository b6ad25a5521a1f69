"""End to end: the program as it is installed, under the tcpserver and with the clients of others.

    programs.py      which program is tested, and with whose rights it runs
    service.py       a qmail home, and tcpserver in front of it, started by a run file
    log.py           what came out of the service on descriptor 2, and the grammar of its lines
    certificates.py  authorities and certificates, made when a test asks for them
    clients.py       swaks, curl, msmtp, smtplib, openssl and so on, each as one call
    conversation.py  a client that is typed into, line by line
    maildir.py       what was delivered
    transcript.py    recorded dialogues that are replayed
    fixtures.py      the fixtures of all tests/test_e2e_*.py

Nothing here stands in for a client or for tcpserver.  What is missing on this host is named, and
skips the tests that need it; where CI is set, they fail.
"""

import pytest

_ASSERTING = ("conversation", "fixtures", "log", "maildir", "clients", "service", "transcript")
pytest.register_assert_rewrite(*(f"{__name__}.{module}" for module in _ASSERTING))
