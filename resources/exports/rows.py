"""Rows on their way into a table of a database, whatever they tell of."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import pyarrow as pa

REVISION = pa.field("revision", pa.int64(), nullable=False)
"""The column that every such table has: later rows have a greater one."""


@dataclass(frozen=True)
class Rows:
    """All rows that a table is to hold of one scope: such as those of one batch, or all there are.

    `schema` has the columns of `keys` and `scope`, and `revision`. A key stands once. `batches` reads them anew at each
    call, a piece at a time. `scope` is column to value; an empty one is the whole table.
    """

    schema: pa.Schema
    keys: tuple[str, ...]
    scope: Mapping[str, str]
    revision: int
    count: int
    batches: Callable[[], Iterator[pa.RecordBatch]]


@dataclass(frozen=True)
class Written:
    """`there` is how many rows of this revision the target has, asked of it afterwards; `changed`, whether anything was
    written. `where` is for people and holds no secret."""

    where: str
    rows: int
    there: int
    changed: bool
