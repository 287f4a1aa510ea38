"""The import of 10,000 rows into a real Label Studio against the bare SDK, and the sensor's look at 10,000 annotations.

    python -m benchmarks.curation [--rows 10000] [--rounds 2] [--out FILE]

Both imports send the same tasks in pages of 500 to the same server, into projects of their own, in turn. Ours also
makes the tasks from the batch's files, keeps the journal, and asks the server before and after.
"""

import json
import platform
import statistics
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import SecretStr

from resources import pipeline
from resources.batch_store.batch import Batch
from resources.batch_store.store import BatchStore
from resources.engine.catalog import Catalog, EngineKind, ModelEntry
from resources.engine.factory import EngineStarter
from resources.label_studio import local_server
from resources.label_studio.client import LabelStudioClient
from resources.label_studio.connection import Connection
from resources.label_studio.importing import PAGE_ROWS, import_batch
from resources.label_studio.label_config import make_label_config
from resources.label_studio.project import open_project
from resources.label_studio.reviews import Reviews, has_news, sync_reviews
from resources.label_studio.schema import load_schema
from resources.label_studio.tasks import fill_in, make_task, review_rows

SCHEMA = load_schema("generic")


def main(
    rows: Annotated[int, typer.Option(help="Rows of the batch.")] = 10_000,
    rounds: Annotated[int, typer.Option(help="Rounds of both imports, in turn.")] = 2,
    out: Annotated[Path | None, typer.Option(help="Where to write the figures as JSON.")] = None,
) -> None:
    """Measure the import and the sensor's look."""
    local_server.install()
    with tempfile.TemporaryDirectory(prefix="vb-bench-", dir="/tmp") as made:
        work = Path(made)
        local_server.copy_of_empty(work / "server")
        with local_server.running(work / "server") as server:
            batch = finished_batch(work, rows)
            figures: dict[str, list[float]] = {"sdk": [], "ours": []}
            for number in range(rounds):
                figures["sdk"].append(rows / sdk_import(server, batch, f"sdk {number}"))
                figures["ours"].append(rows / our_import(server, batch, work, f"ours {number}"))
                print(f"round {number + 1}: {figures}", file=sys.stderr)
            again = our_import(server, batch, work, f"ours {rounds - 1}")
            looks = annotations(server, batch, work)
    share = statistics.median(figures["ours"]) / statistics.median(figures["sdk"])
    report: dict[str, Any] = {
        "machine": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "date": datetime.now(UTC).date().isoformat(),
        "rows": rows,
        "tasks_per_second": figures,
        "share_of_sdk": round(share, 3),
        "import_of_what_is_there_seconds": round(again, 2),
        **looks,
    }
    if out is not None:
        out.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))


def finished_batch(work: Path, rows: int) -> Batch:
    with (work / "in.jsonl").open("w") as file:
        for number in range(rows):
            text = f"Question {number}: " + "what would the quick brown fox say to the lazy dog? " * 6
            body = {"model": "dry-run", "messages": [{"role": "user", "content": text}]}
            line = {"custom_id": f"r{number}", "method": "POST", "url": "/v1/chat/completions", "body": body}
            file.write(json.dumps(line) + "\n")
    batch = BatchStore(work / "data").register(work / "in.jsonl").batch
    catalog = Catalog([ModelEntry(name="dry-run", engine=EngineKind.NULL)])
    with batch.lock("a benchmark"):
        pipeline.check(batch, catalog)
        pipeline.answer(batch, catalog, EngineStarter(work / "runtime", work / "logs"))
        pipeline.publish(batch)
    return batch


def sdk_import(server: local_server.Server, batch: Batch, title: str) -> float:
    """The same tasks through the SDK's own call; making them is not counted."""
    from label_studio_sdk import LabelStudio

    tasks: list[Any] = [make_task(batch, SCHEMA, row, fill_in(SCHEMA, row)) for row in review_rows(batch)]
    sdk: Any = LabelStudio(base_url=server.url, api_key=server.account.token, timeout=120)
    project = sdk.projects.create(title=title, label_config=make_label_config(SCHEMA)).id
    started = time.perf_counter()
    for start in range(0, len(tasks), PAGE_ROWS):
        sdk.projects.import_tasks(id=project, request=tasks[start : start + PAGE_ROWS], return_task_ids=True)
    return time.perf_counter() - started


def our_import(server: local_server.Server, batch: Batch, work: Path, title: str) -> float:
    connection = _connection(server, title)
    with batch.lock("a benchmark"), LabelStudioClient(connection) as client:
        started = time.perf_counter()
        report = import_batch(batch, client, connection, work / "curation" / title)
        took = time.perf_counter() - started
    if not report.is_complete:
        raise SystemExit(f"incomplete: {report}")
    return took


def annotations(server: local_server.Server, batch: Batch, work: Path) -> dict[str, Any]:
    """A project where every task is annotated: look as the sensor does, read all, and look again."""
    connection = _connection(server, "annotated")
    reviews = Reviews(work / "curation", "annotated")
    value = {"choices": ["Gold star"]}
    region = {"from_name": "gold_star", "to_name": "response_shown", "type": "choices", "value": value}
    annotation = {"result": [region], "completed_by": 1}
    tasks = [
        {**make_task(batch, SCHEMA, row, fill_in(SCHEMA, row)), "annotations": [annotation]}
        for row in review_rows(batch)
    ]
    with LabelStudioClient(connection) as client:
        project = open_project(client, connection, reviews.folder)
        for start in range(0, len(tasks), PAGE_ROWS):
            server.ask("POST", f"/api/projects/{project.id}/import", tasks[start : start + PAGE_ROWS])
        look, news = _timed(lambda: has_news(client, connection, reviews))
        read, report = _timed(lambda: sync_reviews(client, connection, reviews))
        quiet, _ = _timed(lambda: has_news(client, connection, reviews))
    return {
        "annotations": report.annotations,
        "sensor_tick_with_news_seconds": round(look, 2) if news else None,
        "sensor_tick_without_news_seconds": round(quiet, 2),
        "full_sync_seconds": round(read, 1),
    }


def _connection(server: local_server.Server, title: str) -> Connection:
    return Connection(title, server.url, title, SCHEMA, SecretStr(server.account.token), 120)


def _timed(work: Any) -> tuple[float, Any]:
    started = time.perf_counter()
    found = work()
    return time.perf_counter() - started, found


if __name__ == "__main__":
    typer.run(main)
