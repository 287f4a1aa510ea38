"""Schedules: the sweep, which keeps promises that sensors alone cannot, and the inbox at night."""

from collections.abc import Iterator

from dagster import DefaultScheduleStatus, RunRequest, ScheduleEvaluationContext, SkipReason, schedule

from assets.partitions import BATCH_FILES
from resources.batch_store.inbox import Inbox
from resources.batch_store.store import BatchStore
from resources.engine.catalog import load_catalog
from resources.settings import settings
from resources.targets import all_targets
from vllm_batch_pipelines.jobs import process_batch
from vllm_batch_pipelines.starting import ToStart, engines, start_queued, sweep, take_from_inbox


@schedule(
    name="sweep",
    cron_schedule="* * * * *",
    job=process_batch,
    default_status=DefaultScheduleStatus.RUNNING,
    description="Starts batches that are missing, failed or left by a dead process; adopts those of the lean core.",
)
def sweep_schedule(context: ScheduleEvaluationContext) -> Iterator[RunRequest | SkipReason]:
    store, catalog = BatchStore(settings().data_root), load_catalog(settings().models_file)
    found = sweep(context.instance, store, catalog, engines=engines())
    yield from _requests(context, found)


@schedule(
    name="inbox_at_night",
    cron_schedule=settings().night_cron,
    job=process_batch,
    description="Takes the inbox at one hour only, for a GPU that is busy by day: start it, stop the sensor `inbox`.",
)
def inbox_at_night(context: ScheduleEvaluationContext) -> Iterator[RunRequest | SkipReason]:
    config = settings()
    store = BatchStore(config.data_root, all_targets(config))
    dropped = Inbox(config.inbox_dir, config.data_root / "inbox-index.json")
    catalog = load_catalog(config.models_file)
    found = take_from_inbox(context.instance, store, dropped, catalog, large_in_a_run=False)
    yield from _requests(context, start_queued(context.instance, store, "inbox", found, catalog, engines()))


def _requests(context: ScheduleEvaluationContext, found: ToStart) -> Iterator[RunRequest | SkipReason]:
    for note in found.notes:
        context.log.info(note)
    if found.new_keys:
        context.instance.add_dynamic_partitions(str(BATCH_FILES.name), found.new_keys)
    if not found.runs:
        yield SkipReason("; ".join(found.notes[:10]) or "nothing to start")
    yield from found.runs


SCHEDULES = [sweep_schedule, inbox_at_night]
