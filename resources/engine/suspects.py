"""Which request kills the engine: found by halving those that were in flight when it died."""

from collections import Counter
from collections.abc import Sequence
from typing import Generic, Protocol, TypeVar

KILLS_TO_BE_SURE = 2


class _Numbered(Protocol):
    @property
    def line(self) -> int: ...


R = TypeVar("R", bound=_Numbered)


class Suspects(Generic[R]):
    """The requests to be asked again in groups, each group alone, before anything else is asked.

    For n requests in flight, one that kills the engine every time is found within 2 + log2(n) deaths, the first one
    included: a group that dies is halved, one that is answered is cleared, and a request that died alone twice is the
    cause.
    """

    def __init__(self) -> None:
        self._groups: list[list[R]] = []
        self._asked: list[R] = []
        self._kills: Counter[int] = Counter()

    def __bool__(self) -> bool:
        return bool(self._groups)

    def any(self) -> R:
        """One of them."""
        return self._groups[-1][0]

    def next(self) -> Sequence[R]:
        """The group to be asked now, alone."""
        self._asked = self._groups.pop()
        return self._asked

    def cleared(self) -> None:
        """The group was answered."""
        self._asked = []

    def engine_died(self, in_flight: list[R]) -> R | None:
        """Note a death with these without an answer. Returns the request that is proven to be its cause."""
        alone, self._asked = len(self._asked) == 1, []
        if not in_flight:
            return None
        if alone:
            (request,) = in_flight
            self._kills[request.line] += 1
            if self._kills[request.line] >= KILLS_TO_BE_SURE:
                return request
        middle = len(in_flight) // 2
        self._groups += [half for half in (in_flight[middle:], in_flight[:middle]) if half]
        return None
