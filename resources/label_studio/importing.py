"""The import of a batch's results as tasks: each row exactly one task, however often it is killed or repeated.

The rules, in the order in which they hold:

1. The server is asked which tasks of the batch are there before anything is sent; they carry batch, line and answer.
2. A page is noted in the journal before it goes out and after its reply. Only a page without a reply can be in doubt.
3. A page in doubt is looked for on the server until it is there or has had its time, and only what is missing is sent.
4. At the end the server is asked how many there are. Tasks that stand twice, from a page that came late after all, are
   removed where nobody has annotated them.
5. A task that somebody has annotated, or has a draft in, is never changed: a later answer is a new task.
6. A task that was there and is gone was deleted by a person, and comes back only when that is asked for.
"""

import logging
import threading
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from resources.batch_store.batch import Batch
from resources.errors import BatchError, BatchStopped, LabelStudioDown, LabelStudioRefused, ReplyLost
from resources.label_studio.answers import Prefilled
from resources.label_studio.client import Json, LabelStudioClient, Pause, of_batch, task_filter
from resources.label_studio.connection import Connection
from resources.label_studio.journal import Journal, Sent
from resources.label_studio.project import Project, open_project
from resources.label_studio.tasks import SOURCE, ReviewRow, fill_in, make_prediction, make_task, review_rows
from resources.progress import Progress, ProgressCallback, silent

log = logging.getLogger(__name__)

PAGE_ROWS = 500
_PAGE_BYTES = 8 * 1024 * 1024
_SETTLE_PAUSES = (0.5, 1.0, 2.0, 4.0, 8.0)
_SENDS = 4
_DOUBT_SECONDS = 900
_STATE_FIELDS = "id,meta,total_annotations,cancelled_annotations,draft_exists"


@dataclass
class ImportReport:
    """What an import found and did. `rows` are the successful rows of the batch; `tasks` those with a task there."""

    rows: int = 0
    tasks: int = 0
    imported: int = 0
    there_before: int = 0
    updated: int = 0
    new_after_annotation: int = 0
    deleted_by_people: int = 0
    duplicates_removed: int = 0
    not_fitting: int = 0
    prefilled: int = 0
    without_predictions: int = 0
    project: int = 0
    url: str = ""
    note: str = ""
    misfits: list[dict[str, Any]] = field(default_factory=list)

    @property
    def is_complete(self) -> bool:
        """Whether the server holds a task of every row, but for those that people have deleted."""
        return self.tasks + self.deleted_by_people == self.rows

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class TaskState(NamedTuple):
    """A task of a line, as the server has it."""

    id: int
    answer: str
    is_touched: bool


class _Row(NamedTuple):
    row: ReviewRow
    prefilled: Prefilled


def import_batch(
    batch: Batch,
    client: LabelStudioClient,
    connection: Connection,
    folder: Path,
    *,
    reimport_deleted: bool = False,
    stop: threading.Event | None = None,
    progress: ProgressCallback = silent,
    pause: Pause = time.sleep,
) -> ImportReport:
    """Have the published successful rows of a batch as tasks in the target's project. `folder` is the target's.

    Raises:
        LabelStudioRefused, LabelStudioDown: what was imported is kept and found again by the next run.
        BatchStopped: stopped between two pages.
    """
    if not batch.is_published():
        raise BatchError(f"{batch.key}: it has no published results yet; materialize batch_output first.")
    project = open_project(client, connection, folder)
    journal = Journal.read(batch.review_dir / f"{connection.name}.jsonl")
    try:
        return _Import(batch, client, connection, project, journal, reimport_deleted, stop, progress, pause).run()
    finally:
        journal.close()


class _Import:
    def __init__(
        self,
        batch: Batch,
        client: LabelStudioClient,
        connection: Connection,
        project: Project,
        journal: Journal,
        reimport_deleted: bool,
        stop: threading.Event | None,
        progress: ProgressCallback,
        pause: Pause,
    ) -> None:
        self._batch = batch
        self._client = client
        self._connection = connection
        self._schema = connection.schema
        self._project = project
        self._journal = journal
        self._reimport = reimport_deleted
        self._stop = stop or threading.Event()
        self._progress = progress
        self._pause = pause
        self._report = ImportReport(project=project.id, url=project.url, note=project.note)
        self._there: dict[int, list[TaskState]] = {}
        self._answers: dict[int, str] = {}

    def run(self) -> ImportReport:
        self._open_journal()
        self._there = self._look()
        total = int((self._batch.output_summary() or {}).get("succeeded", 0))
        started = time.monotonic()
        adopted: list[Sent] = []
        for page in self._pages(self._rows(adopted)):
            if self._stop.is_set():
                raise BatchStopped(f"{self._batch.key}: stopped while it was imported; the next run goes on.")
            self._send(page)
            rate = self._report.rows / max(time.monotonic() - started, 1e-6)
            self._progress(Progress("import", self._report.rows, total, rows_per_second=rate))
        if adopted:
            self._journal.has_sent(adopted)
        self._settle_count()
        return self._report

    def _open_journal(self) -> None:
        """Have the journal be about this project. One that was deleted and made anew keeps what was in it deleted."""
        here = {"url": self._connection.url, "id": self._project.id, "title": self._connection.project}
        known = self._journal.project
        if known == here:
            return
        was_deleted = known is not None and all(known.get(key) == here[key] for key in ("url", "title"))
        self._journal.begin(here, list(self._journal.sent.values()) if was_deleted else [])

    def _look(self, lines: tuple[int, int] | None = None) -> dict[int, list[TaskState]]:
        """The batch's tasks on the server by line, the oldest first."""
        filters = [of_batch(self._batch.key)]
        if lines is not None:
            filters.append(task_filter("data.line", "in", "Number", {"min": lines[0], "max": lines[1]}))
        found: dict[int, list[TaskState]] = defaultdict(list)
        for task in self._client.tasks(self._project.id, filters, _STATE_FIELDS):
            meta = task.get("meta") or {}
            if meta.get("source") == SOURCE and isinstance(meta.get("line"), int):
                is_touched = bool(
                    task.get("total_annotations") or task.get("cancelled_annotations") or task.get("draft_exists")
                )
                found[meta["line"]].append(TaskState(task["id"], str(meta.get("answer")), is_touched))
        return dict(found)

    # --- What is to be done with each row

    def _rows(self, adopted: list[Sent]) -> Iterator[_Row]:
        """The rows that need a new task; all others are counted, and brought up to date, on the way."""
        for row in review_rows(self._batch):
            report = self._report
            report.rows += 1
            self._answers[row.line] = row.answer
            prefilled = fill_in(self._schema, row)
            report.prefilled += bool(prefilled.values)
            if prefilled.fits is False:
                report.not_fitting += 1
                if len(report.misfits) < 20:
                    misfit = {"line": row.line, "custom_id": row.custom_id, "problem": prefilled.problem}
                    report.misfits.append(misfit)
            there = self._there.get(row.line, [])
            same = [task for task in there if task.answer == row.answer]
            known = self._journal.sent.get(row.line)
            if same:
                report.there_before += 1
                if known is None or known.answer != row.answer:
                    adopted.append(Sent(row.line, same[0].id, row.answer))
            elif there:
                if not self._update(there, row, prefilled):
                    report.new_after_annotation += 1
                    yield _Row(row, prefilled)
            elif known is not None and not self._reimport:
                report.deleted_by_people += 1
            else:
                yield _Row(row, prefilled)

    def _update(self, there: list[TaskState], row: ReviewRow, prefilled: Prefilled) -> bool:
        """Bring a task nobody has touched up to a later answer; False where there is none.

        The prediction goes first: the task's `meta` names the new answer once all is done.
        """
        for state in reversed(there):
            if state.is_touched:
                continue
            task = self._client.task(state.id)
            if task is None or task.get("annotations") or task.get("drafts"):
                continue  # somebody came in between
            made = make_task(self._batch, self._schema, row, prefilled)
            self._client.set_prediction(task, make_prediction(self._schema, row, prefilled))
            self._client.update_task(state.id, made["data"], made["meta"])
            self._journal.has_sent([Sent(row.line, state.id, row.answer)])
            self._there[row.line] = [
                TaskState(state.id, row.answer, False) if task_.id == state.id else task_ for task_ in there
            ]
            self._report.updated += 1
            return True
        return False

    # --- Pages

    def _pages(self, rows: Iterable[_Row]) -> Iterator[list[_Row]]:
        page: list[_Row] = []
        size = 0
        for row in rows:
            page.append(row)
            size += len(row.row.response) + len(row.row.body or "")
            if len(page) >= PAGE_ROWS or size >= _PAGE_BYTES:
                yield page
                page, size = [], 0
        if page:
            yield page

    def _send(self, page: list[_Row]) -> None:
        """Have a page on the server, once."""
        first, last = page[0].row.line, page[-1].row.line
        self._wait_for_doubtful_page(first, last)
        for send in range(1, _SENDS + 1):
            page = self._not_there_yet(page)
            if not page:
                return
            self._journal.sending(first, last)
            tasks = [make_task(self._batch, self._schema, row, prefilled) for row, prefilled in page]
            try:
                self._take(page, self._import(page, tasks))
                return
            except ReplyLost as lost:
                log.warning("%s", lost)
                if send == _SENDS:
                    raise LabelStudioDown(
                        f"{lost} Lines {first} to {last} did not arrive in {_SENDS} tries; the next run looks again."
                    ) from None
                self._settle(page, first, last)

    def _wait_for_doubtful_page(self, first: int, last: int) -> None:
        """A killed run's page may still be under way on the server: give it its time."""
        doubtful = self._journal.open_page
        if doubtful is None or time.time() - self._journal.open_since > _DOUBT_SECONDS:
            return
        if doubtful[0] <= last and first <= doubtful[1]:
            lines = set(range(doubtful[0], doubtful[1] + 1))
            self._poll(doubtful, lambda there: bool(lines & there.keys()))

    def _settle(self, page: list[_Row], first: int, last: int) -> None:
        wanted = {(item.row.line, item.row.answer) for item in page}

        def has_all(there: dict[int, list[TaskState]]) -> bool:
            return wanted <= {(line, task.answer) for line, tasks in there.items() for task in tasks}

        self._poll((first, last), has_all)

    def _poll(self, lines: tuple[int, int], is_enough: Any) -> None:
        """Look for lines on the server until it is enough, or the time is up. What is seen is remembered."""
        for pause in (*_SETTLE_PAUSES, None):
            there = self._look(lines)
            self._there |= there
            if is_enough(there) or pause is None:
                return
            self._pause(pause)

    def _not_there_yet(self, page: list[_Row]) -> list[_Row]:
        """The rows whose answer is on the server in no task; those that are get into the journal."""
        missing, arrived = [], []
        for item in page:
            same = [task for task in self._there.get(item.row.line, []) if task.answer == item.row.answer]
            if same:
                arrived.append(Sent(item.row.line, same[0].id, item.row.answer))
            else:
                missing.append(item)
        if arrived:
            self._journal.has_sent(arrived)
            self._report.imported += len(arrived)
        return missing

    def _take(self, page: list[_Row], ids: list[int | None]) -> None:
        sent = []
        for item, task in zip(page, ids, strict=True):
            sent.append(Sent(item.row.line, task, item.row.answer))
            tasks = self._there.setdefault(item.row.line, [])
            tasks.append(TaskState(task or 0, item.row.answer, False))
        self._journal.has_sent(sent)
        self._report.imported += len(sent)

    def _import(self, page: list[_Row], tasks: list[Json]) -> list[int | None]:
        """One request; a page that is refused is halved until the row that is to blame is alone.

        A row whose prediction is refused (the label config is a person's, say) goes without one.
        """
        try:
            ids = self._client.import_tasks(self._project.id, tasks)
            return list(ids) if ids is not None else [None] * len(tasks)
        except LabelStudioRefused as refused:
            if refused.status not in (400, 413):
                raise
            if len(tasks) > 1:
                middle = len(tasks) // 2
                left = self._import(page[:middle], tasks[:middle])  # found on the server where the rest is lost
                return left + self._import(page[middle:], tasks[middle:])
            if not tasks[0]["predictions"]:
                raise LabelStudioRefused(f"line {page[0].row.line}: {refused}", refused.status) from None
            self._report.without_predictions += 1
            log.warning("line %d is imported without its answer filled in: %s", page[0].row.line, refused)
            return self._import(page, [{**tasks[0], "predictions": []}])

    # --- What is there at the end

    def _settle_count(self) -> None:
        """Compare with what the server has; where it differs, look closely and take away what stands twice."""
        expected = sum(len(tasks) for tasks in self._there.values())
        count = self._client.count_tasks(self._project.id, [of_batch(self._batch.key)])
        stands_twice = any(len({t.answer for t in tasks}) < len(tasks) for tasks in self._there.values())
        if count != expected or stands_twice:
            self._there = self._look()
            for line, tasks in self._there.items():
                self._there[line] = self._without_repeats(tasks)
        self._report.tasks = sum(
            any(task.answer == answer for task in self._there.get(line, [])) for line, answer in self._answers.items()
        )

    def _without_repeats(self, tasks: list[TaskState]) -> list[TaskState]:
        kept: dict[str, TaskState] = {}
        for task in sorted(tasks, key=lambda task: (not task.is_touched, task.id)):
            if task.answer in kept and not task.is_touched and not self._is_touched_now(task.id):
                self._client.delete_task(task.id)
                self._report.duplicates_removed += 1
            else:
                kept.setdefault(task.answer, task)
        return sorted(kept.values(), key=lambda task: task.id)

    def _is_touched_now(self, task_id: int) -> bool:
        task = self._client.task(task_id)
        return task is not None and bool(task.get("annotations") or task.get("drafts"))
