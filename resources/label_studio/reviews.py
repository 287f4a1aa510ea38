"""What reviewers have said, kept in step with Label Studio: annotations, gold stars, and what changed among the stars.

The folder of a target, `<data>/curation/<target>/`:

state.json                          which of the following counts: a number, a cursor, the project. Written last.
snapshots/<number>/annotations.parquet gold_stars.parquet
changes/<number>.jsonl              gold_star.created|updated|removed that led to the snapshot of that number

A snapshot and its changes are written, synced and named before `state.json` points at them, so that a run that is
killed has done nothing, and the next one writes the same number again. A delivery reads the change files up to the
state's number, and each event once; event ids do not depend on the run.
"""

import fcntl
import json
import logging
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from resources import durable
from resources.errors import BatchLocked
from resources.label_studio.annotations import AnnotationRow, from_table, rows_of_task, to_table
from resources.label_studio.client import LabelStudioClient, task_filter
from resources.label_studio.connection import Connection
from resources.label_studio.project import known_project
from resources.webhooks.event import event_id

log = logging.getLogger(__name__)

OVERLAP = timedelta(seconds=60)
"""How far behind the cursor is looked again: a change gets its time before the server commits it."""
_HEAVY_FIELDS = "id,data,meta,annotations,result,completed_by,was_cancelled,ground_truth,created_at,updated_at"
"""The server picks by these names among the fields of tasks and of their annotations alike."""
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_LIGHT_PAGE = 1000
_HEAVY_PAGE = 250


@dataclass(frozen=True)
class ReviewState:
    """What is committed. `cursor` is the latest change of a task that was seen."""

    number: int = 0
    cursor: datetime = _EPOCH
    project: int | None = None
    full_at: datetime | None = None


@dataclass
class SyncReport:
    """What a sync found. `project_gone` where a person has deleted the project: what was known is kept then."""

    target: str
    annotations: int = 0
    gold: int = 0
    tasks_read: int = 0
    created: int = 0
    updated: int = 0
    removed: int = 0
    full: bool = False
    project_gone: bool = False
    cursor: datetime | None = None
    rows: list[AnnotationRow] = field(default_factory=list, repr=False)


class Reviews:
    """The reviews of one target on disk."""

    def __init__(self, root: Path, target: str) -> None:
        self.target = target
        self.folder = root / target

    def state(self) -> ReviewState:
        try:
            found = json.loads((self.folder / "state.json").read_bytes())
        except FileNotFoundError:
            return ReviewState()
        full_at = found.get("full_at")
        return ReviewState(
            int(found["number"]),
            datetime.fromisoformat(found["cursor"]),
            found.get("project"),
            datetime.fromisoformat(full_at) if full_at else None,
        )

    def annotations(self) -> list[AnnotationRow]:
        return self._rows("annotations")

    def gold_stars(self) -> list[AnnotationRow]:
        return self._rows("gold_stars")

    def path(self, name: str) -> Path:
        """The file that counts now: `annotations` or `gold_stars`."""
        return self.folder / "snapshots" / str(self.state().number) / f"{name}.parquet"

    def changes(self, after: int = 0) -> Iterator[dict[str, Any]]:
        """The events of the change feed in order, those of numbers above `after`; each has its `number`."""
        last = self.state().number
        for number in range(after + 1, last + 1):
            path = self._changes_path(number)
            if path.exists():
                for line in path.read_bytes().splitlines():  # a text would also end a line at U+2028 and the like
                    yield {"number": number, **json.loads(line)}

    @contextmanager
    def lock(self) -> Iterator[None]:
        """One sync at a time. Raises BatchLocked."""
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with (self.folder / "lock").open("a") as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise BatchLocked(f"The reviews of target `{self.target}` are being read by another run.") from None
            yield

    def commit(self, rows: list[AnnotationRow], state: ReviewState) -> tuple[int, int, int]:
        """Make these annotations what counts; how many stars were created, updated and removed by it."""
        rows = sorted(rows, key=lambda row: (row.task, row.annotation))
        stars = [row for row in rows if row.gold]
        events = list(self._events(self.gold_stars(), stars))
        is_same = rows == self.annotations() if self.state().number else not rows
        number = self.state().number + (0 if is_same else 1)
        if not is_same:
            (self.folder / "changes").mkdir(exist_ok=True)
            if events:
                text = "".join(json.dumps(event, ensure_ascii=False) + "\n" for event in events)
                durable.write_file(self._changes_path(number), text.encode())
            else:
                self._changes_path(number).unlink(missing_ok=True)
            self._write_snapshot(number, {"annotations": rows, "gold_stars": stars})
        content = {
            "number": number,
            "cursor": state.cursor.isoformat(),
            "project": state.project,
            "full_at": state.full_at.isoformat() if state.full_at else None,
        }
        durable.write_file(self.folder / "state.json", json.dumps(content).encode())
        self._remove_older(number)
        kinds = [event["type"].removeprefix("gold_star.") for event in events]
        return kinds.count("created"), kinds.count("updated"), kinds.count("removed")

    def _events(self, before: list[AnnotationRow], after: list[AnnotationRow]) -> Iterator[dict[str, Any]]:
        old = {row.annotation: row for row in before}
        new = {row.annotation: row for row in after}
        for annotation in sorted(old.keys() | new.keys()):
            if annotation not in new:
                yield self._event("removed", old[annotation])
            elif annotation not in old:
                yield self._event("created", new[annotation])
            elif old[annotation] != new[annotation]:
                yield self._event("updated", new[annotation])

    def _event(self, kind: str, row: AnnotationRow) -> dict[str, Any]:
        data = {"target": self.target, **row.document()}
        # A star may come and go and come again with the same content: the number tells these events apart.
        return {
            "id": event_id(self.state().number + 1, kind, data),
            "type": f"gold_star.{kind}",
            "timestamp": row.updated_at.isoformat(),
            "data": data,
        }

    def _write_snapshot(self, number: int, tables: dict[str, list[AnnotationRow]]) -> None:
        parent = self.folder / "snapshots"
        parent.mkdir(exist_ok=True)
        durable.remove_temporaries(parent)
        made = durable.temporary_beside(parent / str(number))
        made.mkdir()
        for name, rows in tables.items():
            pq.write_table(to_table(rows), made / f"{name}.parquet", compression="zstd")
            durable.sync_file(made / f"{name}.parquet")
        durable.publish_folder(made, parent / str(number))

    def _remove_older(self, number: int) -> None:
        """The one before stays: somebody may be reading it."""
        for path in (self.folder / "snapshots").glob("[0-9]*"):
            if path.name.isdigit() and int(path.name) < number - 1:
                shutil.rmtree(path, ignore_errors=True)

    def _changes_path(self, number: int) -> Path:
        return self.folder / "changes" / f"{number:08d}.jsonl"

    def _rows(self, name: str) -> list[AnnotationRow]:
        path = self.path(name)
        return from_table(pq.read_table(path)) if path.exists() else []


def sync_reviews(
    client: LabelStudioClient,
    connection: Connection,
    reviews: Reviews,
    *,
    full: bool = False,
    page_size: int = _LIGHT_PAGE,
) -> SyncReport:
    """Bring a target's annotations and gold stars into step with the server.

    Reads tasks that changed since the cursor less an overlap; a deleted annotation is a change of its task. `full`
    reads all annotated tasks, and so finds deleted tasks too. A project that a person has deleted takes no star with
    it: what was known stays, and the report says so.
    """
    with reviews.lock():
        state = reviews.state()
        project = known_project(reviews.folder, connection)
        report = SyncReport(reviews.target, cursor=state.cursor)
        if project is None or client.project(project) is None:
            report.project_gone = project is not None
            report.rows = reviews.annotations()
            report.annotations, report.gold = len(report.rows), sum(row.gold for row in report.rows)
            return report
        full = full or state.project != project or state.full_at is None
        known = reviews.annotations()
        if full:
            tasks = _all_annotated(client, project)
            cursor, changed = _newest(client, project, state.cursor), None
        else:
            cursor, changed, annotated = _changed(client, project, state.cursor - OVERLAP, page_size)
            tasks = _tasks_by_id(client, project, annotated)
        rows = []
        for task in tasks:
            report.tasks_read += 1
            rows += rows_of_task(connection.schema, task)
        if changed is not None:
            rows += [row for row in known if row.task not in changed]
        full_at = datetime.now(UTC) if full else state.full_at
        state = ReviewState(state.number, max(cursor, state.cursor), project, full_at)
        report.created, report.updated, report.removed = reviews.commit(rows, state)
        report.rows, report.full, report.cursor = rows, full, state.cursor
        report.annotations, report.gold = len(rows), sum(row.gold for row in rows)
        return report


def has_news(client: LabelStudioClient, connection: Connection, reviews: Reviews) -> datetime | None:
    """When something was annotated after the cursor; None where nothing was. Two requests, however much there is.

    A deletion that was followed by more than a page of other changes is left to the next sync.
    """
    project = known_project(reviews.folder, connection)
    if project is None:
        return None
    newest = client.last_annotated(project)
    state = reviews.state()
    if newest is not None and (newest > state.cursor or state.full_at is None):
        return newest
    # An annotation that was deleted, or cancelled, may leave its task without any: tasks that we know of, then.
    known = {row.task for row in reviews.annotations()}
    changed = client.tasks_changed_since(project, state.cursor, _LIGHT_PAGE, newest_first=True) if known else []
    later = [task["updated_at"] for task in changed if task["updated_at"] > state.cursor and _matters(task, known)]
    return max(later, default=None)


def _matters(task: dict[str, Any], known: set[int]) -> bool:
    return bool(task["id"] in known or task.get("total_annotations") or task.get("cancelled_annotations"))


def _newest(client: LabelStudioClient, project: int, cursor: datetime) -> datetime:
    """Read before the tasks are, as it happens: a generator's reading begins later. What changes meanwhile is news."""
    return client.last_annotated(project) or cursor


def _all_annotated(client: LabelStudioClient, project: int) -> Iterator[dict[str, Any]]:
    """Tasks that have an annotation, cancelled ones too."""
    for column in ("total_annotations", "cancelled_annotations"):
        filters = [task_filter(column, "greater", "Number", 0)]
        if column == "cancelled_annotations":  # those that have both came with the first
            filters.append(task_filter("total_annotations", "equal", "Number", 0))
        yield from client.tasks(project, filters, _HEAVY_FIELDS, page_size=_HEAVY_PAGE, heavy=True)


def _changed(
    client: LabelStudioClient, project: int, since: datetime, page_size: int
) -> tuple[datetime, set[int], list[int]]:
    """(latest change, ids of all changed tasks, ids of those with annotations).

    Pages follow the time, not an offset: a task that changes meanwhile moves to the end and shifts nobody out.
    """
    changed: dict[int, bool] = {}
    latest, page = since, 1
    while True:
        tasks = client.tasks_changed_since(project, since, page_size, page)
        changed |= {
            task["id"]: bool(task.get("total_annotations") or task.get("cancelled_annotations")) for task in tasks
        }
        latest = max([latest, *(task["updated_at"] for task in tasks)])
        if len(tasks) < page_size:
            return latest, set(changed), [task for task, annotated in changed.items() if annotated]
        # A page that is all of one moment is followed by the next of that moment.
        since, page = (latest, 1) if latest > since else (since, page + 1)


def _tasks_by_id(client: LabelStudioClient, project: int, ids: Iterable[int]) -> Iterator[dict[str, Any]]:
    ordered = sorted(ids)
    for start in range(0, len(ordered), _HEAVY_PAGE):
        some = ordered[start : start + _HEAVY_PAGE]
        filters = [task_filter("id", "in_list", "Number", some)]
        yield from client.tasks(project, filters, _HEAVY_FIELDS, page_size=_HEAVY_PAGE, heavy=True)


def open_reviews(data_root: Path, target: str) -> Reviews:
    return Reviews(data_root / "curation", target)
