"""Work in two threads that reads like work in one."""

from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


def one_ahead(items: Generator[T, None, None]) -> Generator[T, None, None]:
    """The same items, each made in a thread while the caller works on the one before; errors come up in their place.

    Close it (`contextlib.closing`) to be sure that the thread has ended: it finishes the item that it is making.
    """
    end = object()
    with ThreadPoolExecutor(1, "one-ahead") as thread:
        try:
            coming = thread.submit(next, items, end)
            while (item := coming.result()) is not end:
                coming = thread.submit(next, items, end)
                yield item  # type: ignore[misc]
        finally:
            thread.submit(items.close).result()
