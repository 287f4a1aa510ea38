"""What tests of every kind share."""

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def wait_until(condition: Callable[[], T], seconds: float = 10.0) -> T:
    """The condition's value as soon as it is true.

    Raises:
        AssertionError: it was not within that time.
    """
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"not within {seconds:g} s: {getattr(condition, '__qualname__', condition)}"
        time.sleep(0.02)
    return value
