"""One item ahead: same items, same errors, never more than one made before it is asked for."""

import threading
from collections.abc import Generator
from contextlib import closing

import pytest

from resources.ahead import one_ahead


class Counting:
    """Items 0, 1, 2, ..., and what became of them."""

    def __init__(self, count: int, error: BaseException | None = None) -> None:
        self.count, self.error = count, error
        self.made = 0
        self.closed = False
        self.threads: set[int] = set()

    def items(self) -> Generator[int, None, None]:
        try:
            while self.made < self.count:
                self.threads.add(threading.get_ident())
                self.made += 1
                yield self.made - 1
            if self.error is not None:
                raise self.error
        finally:
            self.closed = True


def test_items_come_in_order_and_from_another_thread() -> None:
    source = Counting(100)
    assert list(one_ahead(source.items())) == list(range(100))
    assert len(source.threads) == 1
    assert threading.get_ident() not in source.threads
    assert list(one_ahead(Counting(0).items())) == []


def test_at_most_one_item_is_made_ahead() -> None:
    source = Counting(100)
    for item in one_ahead(source.items()):
        assert source.made <= item + 2


@pytest.mark.parametrize("error", [ValueError("bad"), KeyboardInterrupt()])
def test_error_comes_up_after_the_items_before_it(error: BaseException) -> None:
    source, seen = Counting(3, error), []
    with pytest.raises(type(error)), closing(one_ahead(source.items())) as items:
        seen.extend(items)
    assert seen == [0, 1, 2]


def test_leaving_early_ends_the_thread_and_closes_the_source() -> None:
    source, before = Counting(100), threading.active_count()
    with closing(one_ahead(source.items())) as items:
        assert next(items) == 0
    assert source.closed
    assert source.made <= 2
    assert threading.active_count() == before
