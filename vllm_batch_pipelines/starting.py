"""How batches come to be runs: dropped files to start requests, start requests to run requests, and the sweep.

The functions here take a Dagster instance and the store, and return what is to be requested; sensors and schedules are
thin around them.
"""

import hashlib
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

from dagster import AssetKey, DagsterInstance, DagsterRun, DagsterRunStatus, RunRecord, RunRequest, RunsFilter

from assets.partitions import BATCH_FILES
from assets.reporting import LOCKED_TAG
from resources import pipeline
from resources.answering import Mode
from resources.batch_store import queue
from resources.batch_store.batch import Batch
from resources.batch_store.inbox import DroppedFile, Inbox
from resources.batch_store.store import BatchStore
from resources.engine.catalog import Catalog
from resources.engine.factory import EngineStarter
from resources.errors import BatchError, BatchNotFound
from resources.settings import settings
from vllm_batch_pipelines.jobs import BATCH_ASSET_KEYS, mode_config, process_batch, retry_failed_rows
from vllm_batch_pipelines.plan import Plan
from vllm_batch_pipelines.stack import INTERRUPTED_TAG

PARTITION_TAG = "dagster/partition"
RUN_KEY_TAG = "dagster/run_key"
MODE_TAG = "vllm_batch/mode"
DROP_TAG = "vllm_batch/dropped"
LOST_TAG = "vllm_batch/process_gone"
PRIORITY_TAG = "dagster/priority"

MOST_A_TICK = 100
_FIRST_LOOK = timedelta(hours=1)
_OVERLAP = timedelta(minutes=5)
"""Runs that ended are looked at again for so long: what ended first need not be seen first."""
_MOST_ENDED = 500
TICK_SECONDS = 20
LARGE_BYTES = 256 * 1024 * 1024
"""Files from here on are registered by a run, not in a sensor's tick."""

MAX_TRIES = 3
MAX_LOST = 20
_DEAD_LOOK_SECONDS = 3
_GOING_ON = [
    DagsterRunStatus.NOT_STARTED,
    DagsterRunStatus.QUEUED,
    DagsterRunStatus.STARTING,
    DagsterRunStatus.STARTED,
    DagsterRunStatus.CANCELING,
]
WITH_A_PROCESS = (DagsterRunStatus.STARTED, DagsterRunStatus.CANCELING)


@dataclass
class ToStart:
    """What a tick asks for: runs, and partitions that they need. `notes` are for the tick's log."""

    runs: list[RunRequest] = field(default_factory=list)
    new_keys: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def engines() -> EngineStarter:
    """What tells which models are warm."""
    return EngineStarter(settings().runtime_root, settings().data_root / "logs" / "engines")


def runs_of(instance: DagsterInstance, key: str, statuses: list[DagsterRunStatus] | None = None) -> list[DagsterRun]:
    """Runs that work on a batch, latest first."""
    found = instance.get_runs(RunsFilter(tags={PARTITION_TAG: key}, statuses=statuses or None))
    return [run for run in found if works_on_a_batch(run)]


def ended_since(
    instance: DagsterInstance, cursor: str | None, now: datetime | None = None
) -> tuple[Sequence[RunRecord], str]:
    """Runs that failed or were cancelled since a cursor, in the order of their end, and the cursor for the next look.
    Not every run is seen only once."""
    now = now or datetime.now(UTC)
    since = datetime.fromisoformat(cursor) if cursor else now - _FIRST_LOOK
    ended = instance.get_run_records(
        RunsFilter(statuses=[DagsterRunStatus.FAILURE, DagsterRunStatus.CANCELED], updated_after=since),
        limit=_MOST_ENDED,
        order_by="update_timestamp",
        ascending=True,
    )
    looked_to = ended[-1].update_timestamp if len(ended) == _MOST_ENDED else now - _OVERLAP
    return ended, max(since, in_utc(looked_to)).isoformat()


def in_utc(moment: datetime) -> datetime:
    return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)


def works_on_a_batch(run: DagsterRun) -> bool:
    """Whether a run answers a batch, and so holds its lock, and is not one of an asset that only reads its outputs."""
    if run.asset_selection:
        return not run.asset_selection.isdisjoint(BATCH_ASSET_KEYS)
    return run.job_name in (process_batch.name, retry_failed_rows.name)


def take_from_inbox(
    instance: DagsterInstance, store: BatchStore, inbox: Inbox, catalog: Catalog, large_in_a_run: bool = True
) -> ToStart:
    """Register the files that are whole and leave a start request for each; large ones get a run of register_files."""
    found = ToStart()
    deadline = time.monotonic() + TICK_SECONDS
    for count, dropped in enumerate(inbox.settled()):
        if count >= MOST_A_TICK or time.monotonic() > deadline:
            found.notes.append("more files wait for the next tick")
            break
        if dropped.size >= LARGE_BYTES and large_in_a_run:
            _register_in_a_run(instance, inbox, dropped, found)
            continue
        try:
            batch = store.register(dropped.path).batch
            if _wants_a_run(instance, batch, catalog):
                queue.enqueue(store, batch.key, origin="inbox")
        except Exception as error:  # whatever one file brings about, the others are taken
            found.notes.append(f"refused: {dropped.path.name}: {type(error).__name__}: {error}")
            inbox.take(dropped, error=str(error))
        else:
            inbox.take(dropped, key=batch.key)
    inbox.save()
    return found


def _register_in_a_run(instance: DagsterInstance, inbox: Inbox, dropped: DroppedFile, found: ToStart) -> None:
    """Have a large file registered by a run of its own, and again where that run did not end well."""
    drop_id = hashlib.sha256(f"{dropped.path.name}:{dropped.mark}".encode("utf-8", "surrogateescape")).hexdigest()[:24]
    statuses = [run.status for run in instance.get_runs(RunsFilter(tags={DROP_TAG: drop_id}))]
    if DagsterRunStatus.SUCCESS in statuses:
        inbox.take(dropped, run="register_files")
    elif statuses.count(DagsterRunStatus.FAILURE) >= MAX_TRIES:
        inbox.take(dropped, error=f"register_files failed {MAX_TRIES} times")
        found.notes.append(f"refused: {dropped.path.name}: register_files failed {MAX_TRIES} times")
    elif not set(statuses) & set(_GOING_ON):
        config = {"ops": {"register": {"config": {"paths": [str(dropped.path)]}}}}
        found.runs.append(
            RunRequest(
                run_key=f"{drop_id}:{len(statuses)}",
                job_name="register_files",
                run_config=config,
                tags={DROP_TAG: drop_id},
            )
        )


def start_queued(
    instance: DagsterInstance,
    store: BatchStore,
    origin: str,
    found: ToStart,
    catalog: Catalog | None = None,
    engines: EngineStarter | None = None,
) -> ToStart:
    """Turn waiting start requests into run requests. One whose run exists is done and is removed.

    A request for a batch that is being worked on waits for the end of that: two runs on one batch at once would only
    make the second fail. With `catalog` and `engines`, one for another model than those whose turn it is waits, too.
    """
    known = set(instance.get_dynamic_partitions(str(BATCH_FILES.name)))
    going_on = _going_on(instance)
    requests = list(queue.pending(store))
    plan = None
    if catalog is not None and engines is not None:
        plan = Plan(store, catalog, engines, going_on, [request.key for request in requests])
    for request in requests:
        if request.origin != origin:
            continue
        if instance.get_runs_count(RunsFilter(tags={RUN_KEY_TAG: request.id})):
            queue.withdraw(store, request.key, request.id)
            continue
        if len(found.runs) >= MOST_A_TICK:
            break
        try:
            batch = store.get(request.key)
        except BatchError:
            queue.withdraw(store, request.key, request.id)
            continue
        if going_on.get(request.key) or batch.locked_by() is not None:
            found.notes.append(f"{request.key}: starts when the present run has ended")
            continue
        if plan and (reason := plan.reason_to_wait(batch, request.requested_at)):
            found.notes.append(f"{request.key}: {reason}")
            continue
        found.runs.append(run_request(batch, request.mode, request.id, request.failed))
        if request.key not in known:
            found.new_keys.append(request.key)
    return found


def run_request(batch: Batch, mode: str, run_key: str, failed: Sequence[str] = ()) -> RunRequest:
    tags = {MODE_TAG: mode}
    if batch.spec.options.priority:
        tags[PRIORITY_TAG] = str(batch.spec.options.priority)
    job = "process_batch" if mode == Mode.RESUME else "retry_failed_rows"
    config = mode_config(mode, failed)
    return RunRequest(run_key=run_key, job_name=job, partition_key=batch.key, run_config=config, tags=tags)


def sweep(
    instance: DagsterInstance,
    store: BatchStore,
    catalog: Catalog,
    pause: Callable[[float], None] = time.sleep,
    engines: EngineStarter | None = None,
) -> ToStart:
    """Start what is missing or failed, and what a dead process left; adopt what `vllm-batch run` finished.

    Left alone: a batch whose last run was cancelled, one that cannot complete, one that is worked on, and one that
    failed MAX_TRIES times in a row (MAX_LOST times where its process went away). What is published stays so when the
    catalog changes: asking anew is for people. With `engines`, batches of the models whose turn it is come first.
    """
    found = ToStart()
    known = set(instance.get_dynamic_partitions(str(BATCH_FILES.name)))
    done = instance.get_materialized_partitions(AssetKey("batch_output"))
    going_on = _going_on(instance)
    _end_dead_runs(instance, store, going_on, found, pause)
    ready: list[Batch] = []
    for key in store.keys():  # noqa: SIM118 (a store, not a dict)
        if len(ready) >= MOST_A_TICK:
            found.notes.append("more batches wait for the next sweep")
            break
        try:
            batch = store.get(key)
        except BatchNotFound:
            continue
        except (BatchError, ValueError) as error:
            found.notes.append(f"{key}: cannot be read: {error}")
            continue
        published = batch.is_published()
        begun = batch.work().mode is not None
        if published and batch.key in done and not begun:
            continue
        if published and not begun and not _is_complete(batch, catalog):
            found.notes.append(f"{batch.key}: published under another catalog; materialize it to have it asked anew")
            continue
        if not published and batch.key not in known:
            continue
        reason = _reason_to_wait(instance, store, batch, catalog, going_on)
        if reason:
            found.notes.append(f"{batch.key}: {reason}")
            continue
        ready.append(batch)
    ready.sort(key=lambda batch: batch.spec.registered_at)
    plan = Plan(store, catalog, engines, going_on, [batch.key for batch in ready]) if engines is not None else None
    for batch in ready:
        if plan and not batch.is_published() and (reason := plan.reason_to_wait(batch, batch.spec.registered_at)):
            found.notes.append(f"{batch.key}: {reason}")
            continue
        if batch.key not in known:
            found.new_keys.append(batch.key)
            found.notes.append(f"{batch.key}: finished by `vllm-batch run`, adopted")
        # A schedule's run keys count within one tick alone, which may be repeated after a crash of the daemon.
        found.runs.append(run_request(batch, "resume", run_key=batch.key))
    return found


def _wants_a_run(instance: DagsterInstance, batch: Batch, catalog: Catalog) -> bool:
    in_progress = batch.locked_by() is not None or bool(runs_of(instance, batch.key, _GOING_ON))
    return not in_progress and not _is_complete(batch, catalog)


def _is_complete(batch: Batch, catalog: Catalog) -> bool:
    """A batch whose model has left the catalog counts as what it is: complete where it was published."""
    try:
        return pipeline.is_complete(batch, catalog)
    except BatchError:
        return batch.is_published()


def _reason_to_wait(
    instance: DagsterInstance,
    store: BatchStore,
    batch: Batch,
    catalog: Catalog,
    going_on: dict[str, list[DagsterRun]],
) -> str | None:
    if going_on.get(batch.key):
        return "a run is queued or going on"
    if queue.is_queued(store, batch.key):
        return "a start request waits"
    owner = batch.locked_by()
    if owner is not None:
        return f"worked on by {owner.get('owner')}"
    if cannot_complete(batch, catalog):
        return f"cannot complete: {(batch.final_failure() or {}).get('code')}"
    runs = runs_of(instance, batch.key)
    if runs and runs[0].status is DagsterRunStatus.CANCELED and INTERRUPTED_TAG not in runs[0].tags:
        return "its last run was cancelled"
    if is_given_up(runs):
        failed, lost = _failures_in_a_row(runs)
        return f"failed {failed} times in a row, and lost its process {lost} times"
    return None


def cannot_complete(batch: Batch, catalog: Catalog) -> bool:
    """Whether a batch failed for a reason that another run would meet again."""
    return batch.final_failure() is not None and not pipeline.catalog_helps(batch, catalog)


def is_given_up(runs: Iterable[DagsterRun]) -> bool:
    """Whether the last of these runs, latest first, failed so often that the sweep starts no other."""
    failed, lost = _failures_in_a_row(runs)
    return failed >= MAX_TRIES or lost >= MAX_LOST


def _failures_in_a_row(runs: Iterable[DagsterRun]) -> tuple[int, int]:
    """How often the last runs failed by themselves, and how often their process went away (a reboot, a SIGKILL)."""
    failed = lost = 0
    for run in runs:
        if run.status is DagsterRunStatus.SUCCESS:
            break
        if run.status is DagsterRunStatus.FAILURE and LOCKED_TAG not in run.tags:
            lost += LOST_TAG in run.tags
            failed += LOST_TAG not in run.tags
    return failed, lost


def _going_on(instance: DagsterInstance) -> dict[str, list[DagsterRun]]:
    runs: dict[str, list[DagsterRun]] = {}
    for run in instance.get_runs(RunsFilter(statuses=_GOING_ON)):
        key = run.tags.get(PARTITION_TAG)
        if key is not None and works_on_a_batch(run):
            runs.setdefault(key, []).append(run)
    return runs


def _end_dead_runs(
    instance: DagsterInstance,
    store: BatchStore,
    going_on: dict[str, list[DagsterRun]],
    found: ToStart,
    pause: Callable[[float], None],
) -> None:
    """Report as failed the runs whose process is gone. A live run holds its batch's lock from its first asset on; the
    two looks, some seconds apart, are for one that has just begun or is just ending."""
    suspects = _runs_without_lock(store, [run for runs in going_on.values() for run in runs])
    if not suspects:
        return
    pause(_DEAD_LOOK_SECONDS)
    fresh = [run for suspect in suspects if (run := instance.get_run_by_id(suspect.run_id)) is not None]
    for run in _runs_without_lock(store, fresh):
        key = run.tags[PARTITION_TAG]
        if run.status is DagsterRunStatus.CANCELING:
            instance.report_run_canceled(run, "The run's process is gone.")
        else:
            instance.add_run_tags(run.run_id, {LOST_TAG: "true"})
            instance.report_run_failed(run, "The run's process is gone (killed, or the machine went down).")
        instance.event_log_storage.free_concurrency_slots_for_run(run.run_id)
        found.notes.append(f"{key}: run {run.run_id[:8]} had no process any more")
        going_on[key] = [other for other in going_on[key] if other.run_id != run.run_id]


def _runs_without_lock(store: BatchStore, runs: list[DagsterRun]) -> list[DagsterRun]:
    dead = []
    for run in runs:
        if run.status not in WITH_A_PROCESS:
            continue
        try:
            owner = store.get(run.tags[PARTITION_TAG]).locked_by()
        except BatchError:
            continue
        if owner is None:
            dead.append(run)
    return dead
