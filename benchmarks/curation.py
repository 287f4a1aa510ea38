"""The import into a real Label Studio against the bare SDK, and the sensor's look at as many annotations.

Both imports send the same tasks in pages of 500 to the same server, into projects of their own, in turn. Ours also
makes the tasks from the batch's files, keeps the journal, and asks the server before and after.
"""

import json
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import SecretStr

from benchmarks.common import Figure, Report, Unfit, against, alternate, held, ratio, say, seconds_of
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
SDK, OURS = "bare SDK", "label_studio_tasks"


@dataclass(frozen=True)
class Size:
    rows: int = 10_000
    rounds: int = 3


QUICK = Size(rows=600)


def run(quick: bool, budget_seconds: float) -> Report:
    size = QUICK if quick else Size()
    local_server.install()
    with tempfile.TemporaryDirectory(prefix="vb-bench-", dir="/tmp") as made:
        work = Path(made)
        local_server.copy_of_empty(work / "server")
        with local_server.running(work / "server") as server:
            batch = finished_batch(work, size.rows)
            say("  Label Studio is up")
            times = alternate(
                {
                    SDK: lambda number: sdk_import(server, batch, f"sdk {number}"),
                    OURS: lambda number: our_import(server, batch, work, f"ours {number}"),
                },
                size.rounds,
                budget_seconds=budget_seconds,
            )
            again = our_import(server, batch, work, "ours 0")
            say(f"  {size.rows:,} annotations")
            looks = annotations(server, batch, work)
    report = Report(
        "curation",
        "Reviews in Label Studio",
        f"{size.rows:,} rows imported into a local Label Studio, in pages of {PAGE_ROWS}: ours with the making of the "
        "tasks, the journal and the questions to the server before and after, the SDK with the sending alone. Then a "
        "project in which every task is annotated: one tick of the sensor that asks whether there is something new.",
        raw={"rows": size.rows, "import_seconds": times, "again_seconds": again, "looks": looks},
    )
    report.figures = [seconds_of(f"import, {name}", seconds) for name, seconds in times.items()]
    report.figures.append(held(ratio(times[SDK], times[OURS]), f"tasks/s, {OURS} / {SDK}", at_least=0.8))
    report.figures.append(Figure("import of what is there, seconds", f"{again:.1f}"))
    for what in ("tick with news", "tick without news"):
        report.figures.append(against(looks[what], f"{looks[what]:.2f}", f"sensor, {what}, seconds", at_most=10))
    report.figures.append(Figure("all annotations read anew, seconds", f"{looks['sync']:.1f}"))
    return report


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
        raise Unfit(f"incomplete: {report}")
    return took


def annotations(server: local_server.Server, batch: Batch, work: Path) -> dict[str, float]:
    """A project where every task is annotated: look as the sensor does, read all, and look again; seconds."""
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
        quiet, later = _timed(lambda: has_news(client, connection, reviews))
    if not news or later or report.annotations != len(tasks):
        raise Unfit(f"{report.annotations} annotations of {len(tasks)}; news before: {news}, after: {later}")
    return {"tick with news": look, "tick without news": quiet, "sync": read}


def _connection(server: local_server.Server, title: str) -> Connection:
    return Connection(title, server.url, title, SCHEMA, SecretStr(server.account.token), 120)


def _timed(work: Any) -> tuple[float, Any]:
    started = time.perf_counter()
    found = work()
    return time.perf_counter() - started, found
