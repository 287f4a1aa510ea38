"""Exports to PostgreSQL against a plain COPY of the same rows, in turn, on one embedded server.

Ours is the whole export: the published Parquet files read, the table checked, the rows written, counted and committed.
Plain COPY is psycopg2's `copy_expert` of a file that the server has written before, into an empty table of the same
columns and key: in PostgreSQL's text format, which is what people mean by COPY, and in the binary one, which is faster.
"""

import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psycopg2
import pyarrow as pa
import pyarrow.parquet as pq
from psycopg2.extensions import connection as Connection
from pydantic import SecretStr

from benchmarks.common import Figure, Report, Side, alternate, held, ratio, say
from resources.chunk_store.schema import RESULTS
from resources.exports.export import export_published
from resources.exports.published import Published
from resources.exports.targets import SqlTarget
from resources.postgres import EmbeddedPostgres

PART_ROWS = 65_536
GOAL = 0.7
TEXT, BINARY = "plain COPY, text", "plain COPY, binary"
EXPORT, AGAIN = "export", "export again"
_BLOCK = 256 * 1024


@dataclass(frozen=True)
class Size:
    rows: int = 1_000_000
    rounds: int = 4


QUICK = Size(rows=20_000, rounds=3)


def run(quick: bool, budget_seconds: float) -> Report:
    size = QUICK if quick else Size()
    with tempfile.TemporaryDirectory(prefix="vb-", dir="/tmp") as folder:
        work = Path(folder)
        say(f"  writing {size.rows:,} rows, twice")
        first, second = published(work, size.rows, 1), published(work, size.rows, 2)
        with EmbeddedPostgres(work / "data", work / "run") as server:
            times = measure(server, first, second, work, size.rounds, budget_seconds)
        if server.socket_dir.exists():
            shutil.rmtree(server.socket_dir)
    report = Report(
        "exports",
        "Exports to PostgreSQL",
        f"{size.rows:,} rows of about 700 bytes into an embedded PostgreSQL 18: the whole export, table check, count "
        "and commit included, against a plain COPY of the same rows from a file into an empty table of the same "
        f"columns and key. `{AGAIN}` replaces all rows by those of a later revision.",
        raw={"rows": size.rows, "seconds": times},
    )
    for name, seconds in times.items():
        median = statistics.median(seconds)
        report.figures.append(Figure(name, f"{median:.1f} s, {size.rows / median:,.0f} rows/s"))
    found = ratio(times[TEXT], times[EXPORT])
    report.figures.append(held(found, f"rows/s, {EXPORT} / {TEXT}", at_least=GOAL))
    return report


def published(work: Path, rows: int, revision: int) -> Published:
    """Rows as a batch publishes them."""
    folder = work / f"{revision}-{revision:016x}"
    (folder / "results").mkdir(parents=True)
    (folder / "summary.json").write_text(json.dumps({"lines": rows}))
    for part, start in enumerate(range(0, rows, PART_ROWS)):
        lines = range(start + 1, min(start + PART_ROWS, rows) + 1)
        table = pa.Table.from_pylist([_row(line) for line in lines], schema=RESULTS)
        pq.write_table(table, folder / "results" / f"part-{part:05d}.parquet", compression="zstd")
    return Published("bench-00000000", folder)


def _row(line: int) -> dict[str, Any]:
    text = f'Answer {line}: the quick brown fox jumps over the "lazy" dog.\nIt does so again and again. ' * 2
    body = {"id": f"chatcmpl-{line:020d}", "choices": [{"message": {"role": "assistant", "content": text}}]}
    moment = datetime.fromtimestamp(1_790_000_000 + line / 1000, UTC)
    return {
        "line": line,
        "custom_id": f"request-{line:09d}",
        "url": "/v1/chat/completions",
        "model": "smollm2-135m",
        "status_code": 200,
        "response": json.dumps(body),
        "text": text,
        "finish_reason": "stop",
        "prompt_tokens": 31,
        "completion_tokens": 48,
        "started_at": moment,
        "finished_at": moment,
        "attempt": 1,
    }


def measure(
    server: EmbeddedPostgres, first: Published, second: Published, work: Path, rounds: int, budget_seconds: float
) -> dict[str, list[float]]:
    target = SqlTarget(name="bench", url=SecretStr(server.url), table="results", timeout=3600)
    connection = psycopg2.connect(server.url)
    export_published(target, first, _quiet)
    files = {kind: work / f"rows.{kind}" for kind in ("text", "binary")}
    with connection, connection.cursor() as cursor:
        cursor.execute("CREATE TABLE plain (LIKE results INCLUDING ALL)")
        for kind, path in files.items():
            with path.open("wb") as stream:
                cursor.copy_expert(f"COPY results TO STDOUT (FORMAT {kind})", stream)

    def plain(kind: str) -> float:
        _settle(connection, "plain")
        return _seconds(lambda: _plain(connection, files[kind], kind))

    def export() -> float:
        _settle(connection, "results")
        return _seconds(lambda: export_published(target, first, _quiet))

    def again() -> float:
        export()
        _settle(connection)
        return _seconds(lambda: export_published(target, second, _quiet))

    sides: dict[str, Side] = {
        TEXT: lambda _: plain("text"),
        EXPORT: lambda _: export(),
        BINARY: lambda _: plain("binary"),
        AGAIN: lambda _: again(),
    }
    try:
        return alternate(sides, rounds, budget_seconds=budget_seconds)
    finally:
        connection.close()


def _seconds(work: Callable[[], object]) -> float:
    started = time.monotonic()
    work()
    return time.monotonic() - started


def _settle(connection: Connection, emptied: str | None = None) -> None:
    """An empty table, and a server that has written down what came before."""
    connection.rollback()
    connection.autocommit = True
    with connection.cursor() as cursor:
        if emptied:
            cursor.execute(f"TRUNCATE {emptied}")
        cursor.execute("CHECKPOINT")
    connection.autocommit = False


def _plain(connection: Connection, path: Path, kind: str) -> None:
    with connection, connection.cursor() as cursor, path.open("rb") as stream:
        cursor.copy_expert(f"COPY plain FROM STDIN (FORMAT {kind})", stream, _BLOCK)


def _quiet(_message: object) -> None:
    pass
