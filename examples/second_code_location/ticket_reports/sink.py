"""A table of one's own, in whatever database TICKETS_DB names."""

import os
from collections.abc import Iterable
from itertools import islice
from typing import NamedTuple

from sqlalchemy import BigInteger, Column, Integer, MetaData, String, Table, Text, create_engine, delete, func, select

_ROWS_AT_ONCE = 1000

TICKETS = Table(
    "tickets",
    MetaData(),
    Column("batch", String(100), primary_key=True),
    Column("line", BigInteger, primary_key=True),
    Column("team", String(100)),
    Column("number", Integer),
    Column("language", String(2)),
    Column("answer", Text),
    Column("error", Text),
)


class Ticket(NamedTuple):
    batch: str
    line: int
    team: str
    number: int | None
    language: str | None
    answer: str | None
    error: str | None


def database_url() -> str:
    return os.environ["TICKETS_DB"]


def write_tickets(url: str, batch: str, tickets: Iterable[Ticket]) -> int:
    """Have the table hold these rows of the batch, all or none; how many."""
    rows, written = iter(tickets), 0
    with create_engine(url, hide_parameters=True).begin() as connection:
        TICKETS.create(connection, checkfirst=True)
        connection.execute(delete(TICKETS).where(TICKETS.c.batch == batch))
        while piece := [row._asdict() for row in islice(rows, _ROWS_AT_ONCE)]:
            connection.execute(TICKETS.insert(), piece)
            written += len(piece)
    return written


def count_tickets(url: str, batch: str) -> tuple[int, int]:
    """How many tickets of a batch have an answer, and how many do not."""
    query = select(func.count(), func.count(TICKETS.c.error)).where(TICKETS.c.batch == batch)
    with create_engine(url).connect() as connection:
        rows, failed = connection.execute(query).one()
    return rows - failed, failed
