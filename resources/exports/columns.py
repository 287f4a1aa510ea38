"""The columns of an exported table: what Arrow's types are in a database, made and checked."""

from typing import Any

import pyarrow as pa
from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Connection,
    DateTime,
    Double,
    Integer,
    MetaData,
    SmallInteger,
    String,
    Table,
    Text,
    inspect,
)
from sqlalchemy.types import TypeEngine

from resources.errors import ExportFailed
from resources.exports.rows import Rows

_KEY_CHARACTERS = 255
"""Several databases have no keys of texts without a limit."""


def table_of(rows: Rows, name: str, schema: str | None, dialect: str) -> Table:
    """The table that these rows need."""
    columns = []
    for field in rows.schema:
        is_key = field.name in rows.keys
        kind: TypeEngine[Any] = _sql_type(field.type)
        if is_key and isinstance(kind, Text) and dialect not in ("postgresql", "sqlite"):
            kind = String(_KEY_CHARACTERS)
        columns.append(
            Column(field.name, kind, primary_key=is_key, nullable=field.nullable and not is_key, autoincrement=False)
        )
    return Table(name, MetaData(), *columns, schema=schema)


def make_and_check(connection: Connection, table: Table) -> None:
    """Make the table where it is missing.

    Raises:
        ExportFailed: there is one with other columns; names the column.
    """
    table.create(connection, checkfirst=True)
    found = inspect(connection)
    present = {column["name"]: column["type"] for column in found.get_columns(table.name, table.schema)}
    for column in table.columns:
        if column.name not in present:
            raise ExportFailed(_refusal(table, f"has no column `{column.name}` ({_named(connection, column.type)})"))
        wanted, there = _named(connection, column.type), _named(connection, present[column.name])
        is_other = wanted != there if connection.dialect.name == "postgresql" else _differ(column, present[column.name])
        if is_other:
            raise ExportFailed(_refusal(table, f"has column `{column.name}` as {there}, not {wanted}"))
    for name in present:
        if name not in table.columns:
            raise ExportFailed(_refusal(table, f"has a column `{name}`, which is none of ours"))
    key = found.get_pk_constraint(table.name, table.schema)["constrained_columns"]
    if set(key) != {column.name for column in table.primary_key}:
        raise ExportFailed(_refusal(table, f"has the primary key ({', '.join(key) or 'none'})"))


def _refusal(table: Table, what: str) -> str:
    return f"table `{table.fullname}` {what}; name another table, or rename that one, and a new one is made"


def _named(connection: Connection, kind: TypeEngine[Any]) -> str:
    return kind.compile(connection.dialect)


def _differ(column: Column[Any], there: TypeEngine[Any]) -> bool:
    """Other databases name types after their own fashion: only what they can hold is compared."""
    return column.type._type_affinity is not there._type_affinity


def _sql_type(kind: pa.DataType) -> TypeEngine[Any]:
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return Text()
    if pa.types.is_int8(kind) or pa.types.is_int16(kind):
        return SmallInteger()
    if pa.types.is_int32(kind):
        return Integer()
    if pa.types.is_int64(kind):
        return BigInteger()
    if pa.types.is_float64(kind):
        return Double()
    if pa.types.is_boolean(kind):
        return Boolean()
    if pa.types.is_timestamp(kind) and kind.unit == "us" and kind.tz == "UTC":
        return DateTime(timezone=True)
    raise ExportFailed(f"there is no way to put {kind} into a table")
