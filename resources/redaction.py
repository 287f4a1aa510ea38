"""Secrets taken out of a text before anybody sees it."""

import re
from collections.abc import Iterable

_USER_INFO = re.compile(r"(?P<scheme>[A-Za-z][\w+.-]*://)[^/@\s]*@")
_SHOWN = "***"


def redact(text: str, secrets: Iterable[str] = ()) -> str:
    """The text without these secrets, and without user and password in any URL."""
    for secret in sorted({s for s in secrets if s}, key=len, reverse=True):
        text = text.replace(secret, _SHOWN)
    return _USER_INFO.sub(rf"\g<scheme>{_SHOWN}@", text)
