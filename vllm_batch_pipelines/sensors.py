"""Sensors: what starts runs within seconds. All run as soon as the stack is up."""

from dagster import (
    AssetSelection,
    AutomationConditionSensorDefinition,
    DagsterRunStatus,
    DefaultSensorStatus,
    RunRequest,
    RunsFilter,
    SensorDefinition,
    SensorEvaluationContext,
    SensorResult,
    sensor,
)

from assets.partitions import BATCH_FILES
from resources.batch_store.inbox import Inbox
from resources.batch_store.store import BatchStore
from resources.engine.catalog import Catalog, load_catalog
from resources.errors import CatalogError
from resources.settings import settings
from resources.targets import all_targets
from resources.webhooks.deliveries import Deliveries
from vllm_batch_pipelines.announcing import announce_endings
from vllm_batch_pipelines.jobs import JOBS, deliver_webhooks
from vllm_batch_pipelines.resuming import resume_cut_off
from vllm_batch_pipelines.starting import ToStart, engines, start_queued, take_from_inbox

# The daemon looks every five seconds; an interval of exactly that would make every other look come a moment too early.
_POLL_SECONDS = max(1, settings().poll_seconds - 1)


@sensor(
    jobs=JOBS,
    minimum_interval_seconds=_POLL_SECONDS,
    default_status=DefaultSensorStatus.RUNNING,
    description="Registers files dropped in the inbox once they are whole, and starts their batches.",
)
def inbox(context: SensorEvaluationContext) -> SensorResult:
    config = settings()
    store = BatchStore(config.data_root, all_targets(config))
    dropped = Inbox(config.inbox_dir, config.data_root / "inbox-index.json")
    catalog = load_catalog(config.models_file)
    found = take_from_inbox(context.instance, store, dropped, catalog)
    return _result(context, start_queued(context.instance, store, "inbox", found, catalog, engines()))


@sensor(
    jobs=JOBS,
    minimum_interval_seconds=_POLL_SECONDS,
    default_status=DefaultSensorStatus.RUNNING,
    description="Starts what people asked for: `vllm-batch submit` and `retry`, and the job register_files.",
)
def submitted(context: SensorEvaluationContext) -> SensorResult:
    store = BatchStore(settings().data_root)
    return _result(context, start_queued(context.instance, store, "submit", ToStart(), _catalog(), engines()))


def _catalog() -> Catalog | None:
    """None where it cannot be read: the runs say what is wrong with it."""
    try:
        return load_catalog(settings().models_file)
    except CatalogError:
        return None


def _result(context: SensorEvaluationContext, found: ToStart) -> SensorResult:
    for note in found.notes:
        context.log.info(note)
    return SensorResult(
        run_requests=found.runs,
        dynamic_partitions_requests=[BATCH_FILES.build_add_request(found.new_keys)] if found.new_keys else [],
        skip_reason=None if found.runs else "; ".join(found.notes[:10]) or "nothing new",
    )


@sensor(
    jobs=[deliver_webhooks],
    minimum_interval_seconds=_POLL_SECONDS,
    default_status=DefaultSensorStatus.RUNNING,
    description="Notes batches that failed or were cancelled for the webhooks, and has sent what waits. No network.",
)
def announcements(context: SensorEvaluationContext) -> SensorResult:
    config = settings()
    deliveries = Deliveries(config.data_root, all_targets(config).webhooks)
    found = announce_endings(context.instance, BatchStore(config.data_root), _catalog(), deliveries, context.cursor)
    for note in found.notes:
        context.log.warning(note)
    for event in found.events:
        context.log.info(event)
    waiting = [name for name in deliveries.outbox.targets() if not deliveries.outbox.is_being_emptied(name)]
    wanted = bool(waiting) and not _about_to_deliver(context)
    return SensorResult(
        run_requests=[RunRequest(job_name=deliver_webhooks.name)] if wanted else [],
        cursor=found.cursor,
        skip_reason=None if wanted else "a run that delivers is about to begin" if waiting else "nothing to send",
    )


def _about_to_deliver(context: SensorEvaluationContext) -> bool:
    """Whether a run that has not begun yet will take what waits. One that goes on may hang at another target."""
    statuses = [DagsterRunStatus.NOT_STARTED, DagsterRunStatus.QUEUED, DagsterRunStatus.STARTING]
    return context.instance.get_runs_count(RunsFilter(job_name=deliver_webhooks.name, statuses=statuses)) > 0


@sensor(
    asset_selection=AssetSelection.all(),
    minimum_interval_seconds=30,
    default_status=DefaultSensorStatus.RUNNING,
    description="Runs again what comes after a batch where a stop of the stack or a dead process cut it off.",
)
def cut_off(context: SensorEvaluationContext) -> SensorResult:
    assert context.repository_def is not None
    defined = context.repository_def.asset_graph.executable_asset_keys
    found = resume_cut_off(context.instance, defined, context.cursor)
    for note in found.notes:
        context.log.info(note)
    return SensorResult(
        run_requests=found.runs, cursor=found.cursor, skip_reason=None if found.runs else "nothing was cut off"
    )


# Dagster's own, which stands for this one where none is declared, would wait to be started by hand.
automation = AutomationConditionSensorDefinition(
    "automation",
    target=AssetSelection.all(),
    default_status=DefaultSensorStatus.RUNNING,
    description="Starts what comes after the outputs of a batch: webhooks, exports, handlers.",
)

SENSORS: list[SensorDefinition] = [inbox, submitted, automation, cut_off]
WEBHOOK_SENSORS: list[SensorDefinition] = [announcements]
