"""Rows into a table of a database, in one transaction: what the table holds of their scope is these rows, or what it
held before.

PostgreSQL takes them by COPY (`copying.py`); every other database that SQLAlchemy speaks to by a delete of what is
there of the scope and inserts in batches. Memory holds a batch of rows. A text loses U+0000 to U+FFFD, the replacement
character: PostgreSQL has no place for it. (A response's JSON writes it as an escape and stays as it is.)

A scope is written by one process at a time. An older revision never takes the place of a newer one.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import quote, quote_plus

import numpy as np
import psycopg2
import pyarrow as pa
import pyarrow.compute as pc
from sqlalchemy import URL, Connection, Engine, Table, create_engine, delete, func, insert, make_url, select, text
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from sqlalchemy.pool import NullPool
from sqlalchemy.sql.elements import ColumnElement

from resources.child import Tell
from resources.errors import ExportFailed
from resources.exports.columns import make_and_check, table_of
from resources.exports.copying import copy_rows
from resources.exports.rows import REVISION, Rows, Written
from resources.exports.targets import SqlTarget
from resources.redaction import redact

_CONNECT_SECONDS = 20
_KEEPALIVE = {"keepalives": 1, "keepalives_idle": 30, "keepalives_interval": 10, "keepalives_count": 3}
_SECRET_PARAMETERS = ("password", "sslpassword", "passwd")


def export_rows(target: SqlTarget, rows: Rows, tell: Tell) -> Written:
    """Have the table hold these rows of their scope. Where it does already, nothing is written.

    Raises:
        ExportFailed: the table has other columns, a newer revision is there, or the database failed; nothing changed.
    """
    url = make_url(target.url.get_secret_value())
    where = f"{url.get_backend_name()}://{url.host or ''}/{url.database or ''} table {_full_name(target)}"
    with _errors_for_people(where, url):
        engine = _engine(url)
        table = table_of(rows, target.table, target.table_schema, engine.dialect.name)
        with _transaction(engine, target, f"table {table.fullname}") as connection:
            make_and_check(connection, table)
        what = f"table {table.fullname} {sorted(rows.scope.items())}"
        with _transaction(engine, target, what) as connection:
            changed = _write(connection, table, rows, tell)
        with engine.connect() as connection:
            there = _revisions(connection, table, rows).get(rows.revision, 0)
        return Written(where, rows.count, there, changed)


def _write(connection: Connection, table: Table, rows: Rows, tell: Tell) -> bool:
    present = _revisions(connection, table, rows)
    if present == {rows.revision: rows.count}:
        return False
    newer = [revision for revision in present if revision > rows.revision]
    if newer:
        raise ExportFailed(f"the table holds revision {max(newer)} of these rows, which is newer than {rows.revision}")
    pieces = _told(rows, tell)
    if connection.dialect.name == "postgresql" and connection.dialect.driver == "psycopg2":
        copy_rows(connection, table, rows, pieces, is_empty=not present)
    else:
        if present:
            connection.execute(delete(table).where(*_in_scope(table, rows)))
        for piece in pieces:
            connection.execute(insert(table), piece.to_pylist())
    return True


def _told(rows: Rows, tell: Tell) -> Iterator[pa.RecordBatch]:
    """The rows, with what no database takes replaced; says after each piece how many there were."""
    done = 0
    for piece in rows.batches():
        columns = [_without_zero(column) for column in piece.columns]
        yield pa.RecordBatch.from_arrays(columns, schema=rows.schema)
        done += len(piece)
        tell({"rows": done, "of": rows.count})
    if done != rows.count:
        raise ExportFailed(f"{done} rows were read where {rows.count} should be; nothing was written")


def _without_zero(column: pa.Array) -> pa.Array:
    if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
        return column
    if not _has_zero(column):
        return column
    return pc.replace_substring(column, "\0", "\N{REPLACEMENT CHARACTER}")


def _has_zero(column: pa.Array) -> bool:
    """By a search through all texts at once, as they lie one behind the other in memory."""
    _, offsets, data = column.buffers()
    if data is None:
        return False
    ends = np.frombuffer(offsets, np.int32 if pa.types.is_string(column.type) else np.int64)
    start, end = int(ends[column.offset]), int(ends[column.offset + len(column)])
    return b"\0" in data.slice(start, end - start).to_pybytes()


def _revisions(connection: Connection, table: Table, rows: Rows) -> dict[int, int]:
    """How many rows of the scope the table holds, by revision."""
    revision = table.c[REVISION.name]
    found = connection.execute(select(revision, func.count()).where(*_in_scope(table, rows)).group_by(revision))
    return {int(number): int(count) for number, count in found}


def _in_scope(table: Table, rows: Rows) -> list[ColumnElement[bool]]:
    return [table.c[name] == value for name, value in rows.scope.items()]


def _engine(url: URL) -> Engine:
    arguments: dict[str, Any] = {}
    if url.get_driver_name() == "psycopg2":
        arguments = {"connect_timeout": _CONNECT_SECONDS, "application_name": "vllm-batch exports", **_KEEPALIVE}
        arguments = {name: value for name, value in arguments.items() if name not in url.query}
    # Without parameters in messages: they are rows, which are other people's words.
    return create_engine(url, poolclass=NullPool, hide_parameters=True, connect_args=arguments)


@contextmanager
def _transaction(engine: Engine, target: SqlTarget, what: str) -> Iterator[Connection]:
    """One at a time over the same thing, where the database can say so."""
    with engine.begin() as connection:
        if engine.dialect.name == "postgresql":
            connection.execute(text(f"SET LOCAL lock_timeout = {int(target.timeout * 1000)}"))
            connection.execute(text("SELECT pg_advisory_xact_lock(hashtextextended(:what, 0))"), {"what": what})
        yield connection


@contextmanager
def _errors_for_people(where: str, url: URL) -> Iterator[None]:
    try:
        yield
    except ExportFailed as error:
        raise ExportFailed(f"{where}: {error}") from None
    except (SQLAlchemyError, psycopg2.Error) as error:  # of COPY, which goes past SQLAlchemy, the driver's own
        # The first line alone: the others may quote rows.
        cause = error.orig if isinstance(error, DBAPIError) and error.orig is not None else error
        first = (str(cause).strip().splitlines() or [type(cause).__name__])[0]
        raise ExportFailed(redact(f"{where}: {type(cause).__name__}: {first}", _secrets(url))) from None


def _secrets(url: URL) -> list[str]:
    plain = [url.password] if url.password else []
    for name in _SECRET_PARAMETERS:
        value = url.query.get(name, ())
        plain += [value] if isinstance(value, str) else [*value]
    return [form for secret in plain for form in (secret, quote(secret), quote_plus(secret))]


def _full_name(target: SqlTarget) -> str:
    return f"{target.table_schema}.{target.table}" if target.table_schema else target.table
