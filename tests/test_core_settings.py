"""What SMTPAUTH stands for."""

from __future__ import annotations

import pytest

from qmail_smtpd_py.settings import auth_policy

LOGIN_PLAIN = (b"LOGIN", b"PLAIN")
ALL = (b"LOGIN", b"PLAIN", b"CRAM-MD5")
CRAM = (b"CRAM-MD5",)


@pytest.mark.parametrize(
    ("smtpauth", "mechanisms", "required"),
    [
        (None, (), False),
        (b"-", (), False),
        (b"-anything", (), False),
        (b"-!", (), False),
        (b"0", (), False),
        (b"", LOGIN_PLAIN, False),
        (b"yes", LOGIN_PLAIN, False),
        (b"00", LOGIN_PLAIN, False),
        (b"cram", CRAM, False),
        (b"CRAM-md5", CRAM, False),
        (b"+cram", ALL, False),
        (b"+CraM", ALL, False),
        (b"+", LOGIN_PLAIN, False),
        (b"!", LOGIN_PLAIN, True),
        (b"!-", LOGIN_PLAIN, True),
        (b"!0", LOGIN_PLAIN, True),
        (b"!!", LOGIN_PLAIN, True),
        (b"!cram", CRAM, True),
        (b"!CRAM", CRAM, True),
        (b"!+cram", ALL, True),
        (b"!+", LOGIN_PLAIN, True),
        (b" !", LOGIN_PLAIN, False),
    ],
)
def test_smtpauth(smtpauth: bytes | None, mechanisms: tuple, required: bool) -> None:
    policy = auth_policy(smtpauth)
    assert policy.mechanisms == mechanisms
    assert policy.required == required
    assert policy.challenge_field == (b"CRAM-MD5" in mechanisms)
