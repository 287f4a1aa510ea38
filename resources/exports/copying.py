"""Rows into PostgreSQL by COPY in its binary format, made of Arrow's columns without a Python object a value.

Binary, since text would have every answer searched for what it must escape, and CSV ends at a line of `\\.` within an
answer on servers before 18. The format: https://www.postgresql.org/docs/current/sql-copy.html (Binary Format).
"""

from collections.abc import Generator, Iterable, Iterator
from contextlib import closing
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from sqlalchemy import Column, Connection, MetaData, Table, and_, delete
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.sql.compiler import IdentifierPreparer

from resources.ahead import one_ahead
from resources.exports.rows import REVISION, Rows

_SIGNATURE = b"PGCOPY\n\xff\r\n\0" + bytes(8)
_TRAILER = b"\xff\xff"
_NULL = b"\xff\xff\xff\xff"
_EPOCH_MICROSECONDS = 946_684_800_000_000
"""PostgreSQL counts from 2000, Arrow from 1970."""
_BLOCK = 256 * 1024
_INCOMING = "vllm_batch_incoming"


def copy_rows(
    connection: Connection, table: Table, rows: Rows, pieces: Iterable[pa.RecordBatch], *, is_empty: bool
) -> None:
    """Have the table hold these rows of their scope. `is_empty`: it has none yet, and nobody else adds any."""
    quoting = connection.dialect.identifier_preparer
    columns = ", ".join(quoting.quote(column.name) for column in table.columns)
    if is_empty:
        _copy(connection, quoting.format_table(table), columns, pieces)
        return
    connection.exec_driver_sql(
        f"CREATE TEMPORARY TABLE {_INCOMING} (LIKE {quoting.format_table(table)}) ON COMMIT DROP"
    )
    _copy(connection, _INCOMING, columns, pieces)
    _merge(connection, table, rows, quoting)


def _merge(connection: Connection, table: Table, rows: Rows, quoting: IdentifierPreparer) -> None:
    incoming = Table(_INCOMING, MetaData(), *[Column(column.name, column.type) for column in table.columns])
    statement = insert(table).from_select([column.name for column in table.columns], incoming.select())
    updated = {column.name: statement.excluded[column.name] for column in table.columns if column.name not in rows.keys}
    connection.execute(statement.on_conflict_do_update(index_elements=[*rows.keys], set_=updated))
    scope = [table.c[name] == value for name, value in rows.scope.items()]
    connection.execute(delete(table).where(and_(table.c[REVISION.name] != rows.revision, *scope)))


def _copy(connection: Connection, table: str, columns: str, pieces: Iterable[pa.RecordBatch]) -> None:
    driver: Any = connection.connection
    # The next piece is made while the server takes this one.
    with driver.cursor() as cursor, closing(one_ahead(encoded(pieces))) as made:
        stream = _Stream(made)
        try:
            cursor.copy_expert(f"COPY {table} ({columns}) FROM STDIN (FORMAT binary)", stream, _BLOCK)
        except Exception:
            if stream.failure is not None:  # psycopg2 makes a text of it
                raise stream.failure from None
            raise


class _Stream:
    """A file that is read from, for pieces that are made as they are asked for."""

    def __init__(self, pieces: Iterator[memoryview | bytes]) -> None:
        self._pieces = pieces
        self._held = memoryview(b"")
        self.failure: Exception | None = None

    def read(self, size: int = -1) -> bytes:
        while not self._held:
            try:
                piece = next(self._pieces, None)
            except Exception as failure:
                self.failure = failure
                raise
            if piece is None:
                return b""
            self._held = memoryview(piece)
        found, self._held = self._held[:size], self._held[size:]
        return bytes(found)


def encoded(pieces: Iterable[pa.RecordBatch]) -> Generator[memoryview | bytes, None, None]:
    """The stream that COPY reads."""
    yield _SIGNATURE
    for piece in pieces:
        if len(piece):
            yield _tuples(piece)
    yield _TRAILER


def _tuples(piece: pa.RecordBatch) -> memoryview:
    """The tuples of a piece, one behind the other: number of fields, and for each its length and its bytes."""
    count = len(piece.columns).to_bytes(2, "big")
    parts: list[pa.Array | pa.Scalar] = [pa.scalar(count, pa.large_binary())]
    for column in piece.columns:
        parts += _field(column)
    joined = pc.binary_join_element_wise(*parts, pa.scalar(b"", pa.large_binary()))
    _, offsets, data = joined.buffers()
    ends = np.frombuffer(offsets, np.int64)
    return memoryview(data)[ends[joined.offset] : ends[joined.offset + len(joined)]]


def _field(column: pa.Array) -> list[pa.Array]:
    """A column as it stands in the tuples: length and bytes, or the length that stands for NULL."""
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        values = column.cast(pa.large_binary())
        lengths = pc.binary_length(values).fill_null(-1).to_numpy(zero_copy_only=False)
        return [_fixed(lengths.astype(">i4")), values.fill_null(b"")]
    return [_numbers(column)]


def _numbers(column: pa.Array) -> pa.Array:
    kind: np.dtype[Any] | None = _NUMBERS.get(column.type)
    if kind is None:  # a timestamp: of microseconds in UTC, as `columns.py` has it
        kind, column = np.dtype(">i8"), column.cast(pa.int64())
        column = pc.subtract(column, _EPOCH_MICROSECONDS)
    plain = column.fill_null(False if pa.types.is_boolean(column.type) else 0).to_numpy(zero_copy_only=False)
    framed = np.empty(len(plain), np.dtype([("length", ">i4"), ("value", kind)]))
    framed["length"] = kind.itemsize
    framed["value"] = plain
    found = _fixed(framed)
    return pc.if_else(column.is_valid(), found, pa.scalar(_NULL, pa.large_binary())) if column.null_count else found


def _fixed(values: np.ndarray) -> pa.Array:
    """The bytes of an array's items, as binary values."""
    count, size = len(values), values.dtype.itemsize
    offsets = np.arange(0, (count + 1) * size, size, dtype=np.int64)
    buffers = [None, pa.py_buffer(offsets), pa.py_buffer(np.ascontiguousarray(values))]
    return pa.Array.from_buffers(pa.large_binary(), count, buffers)


_NUMBERS: dict[pa.DataType, np.dtype[Any]] = {
    pa.int8(): np.dtype(">i2"),
    pa.int16(): np.dtype(">i2"),
    pa.int32(): np.dtype(">i4"),
    pa.int64(): np.dtype(">i8"),
    pa.float64(): np.dtype(">f8"),
    pa.bool_(): np.dtype("?"),
}
