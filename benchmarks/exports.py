"""Exports to PostgreSQL against a plain COPY of the same rows, in turn, on one embedded server.

    python -m benchmarks.exports [--rows 1000000] [--runs 3] [--out FILE]

Ours is the whole export: the published Parquet files read, the table checked, the rows written, counted and committed.
Plain COPY is psycopg2's `copy_expert` of a file that the server has written before, into an empty table of the same
columns and key: in PostgreSQL's text format, which is what people mean by COPY, and in the binary one, which is faster.
`again` is the export of a later revision over the rows that are there.
"""

import json
import platform
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import psycopg2
import pyarrow as pa
import pyarrow.parquet as pq
import typer
from psycopg2.extensions import connection as Connection
from pydantic import SecretStr

from benchmarks.common import machine
from resources.chunk_store.schema import RESULTS
from resources.exports.export import export_published
from resources.exports.published import Published
from resources.exports.targets import SqlTarget
from resources.postgres import EmbeddedPostgres

PART_ROWS = 65_536
GOAL = 0.7
_BLOCK = 256 * 1024


def main(
    rows: Annotated[int, typer.Option(help="Rows, about 700 bytes each.")] = 1_000_000,
    runs: Annotated[int, typer.Option(help="Runs of each kind, in turn; medians are shown.")] = 3,
    out: Annotated[Path | None, typer.Option(help="Where to write the figures as JSON.")] = None,
) -> None:
    """Measure exports to PostgreSQL."""
    with tempfile.TemporaryDirectory(prefix="vb-", dir="/tmp") as folder:
        work = Path(folder)
        print(f"writing {rows} rows ...", file=sys.stderr)
        first, second = published(work, rows, 1), published(work, rows, 2)
        with EmbeddedPostgres(work / "data", work / "run") as server:
            figures = measure(server, first, second, work, runs)
        if server.socket_dir.exists():
            shutil.rmtree(server.socket_dir)
    report = {
        "benchmark": "exports",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "python": platform.python_version(),
        "rows": rows,
        "seconds": figures,
    }
    if out is not None:
        out.write_text(json.dumps(report, indent=1))
    show(report)


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
    server: EmbeddedPostgres, first: Published, second: Published, work: Path, runs: int
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
    kinds: dict[str, Callable[[], object]] = {
        "plain COPY, text": lambda: _plain(connection, files["text"], "text"),
        "export": lambda: export_published(target, first, _quiet),
        "plain COPY, binary": lambda: _plain(connection, files["binary"], "binary"),
        "export again": lambda: export_published(target, second, _quiet),
    }
    seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
    for run in range(runs):
        for kind, work_of in kinds.items():
            _settle(connection, "plain" if kind.startswith("plain") else None if kind.endswith("again") else "results")
            started = time.monotonic()
            work_of()
            seconds[kind].append(time.monotonic() - started)
            print(f"run {run + 1}, {kind}: {seconds[kind][-1]:.1f} s", file=sys.stderr)
    connection.close()
    return seconds


def _settle(connection: Connection, emptied: str | None) -> None:
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


def show(report: dict[str, Any]) -> None:
    plain = report["seconds"]["plain COPY, text"]
    print(f"{report['rows']} rows, {report['machine']}, {report['date']}\n")
    print("| into PostgreSQL | seconds | rows/s | of plain COPY |")
    print("|---|---|---|---|")
    for kind, seconds in report["seconds"].items():
        median = statistics.median(seconds)
        # Of the same run, since the machine drifts between runs.
        share = statistics.median(one / other for one, other in zip(plain, seconds, strict=True))
        print(f"| {kind} | {median:.1f} | {report['rows'] / median:,.0f} | {share:.2f} |")
    print(f"\nThe goal is an export at {GOAL} of plain COPY (text).")


if __name__ == "__main__":
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(main)
    app()
