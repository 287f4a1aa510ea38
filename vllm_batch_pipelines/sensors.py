"""Sensors: what starts runs within seconds. All run as soon as the stack is up."""

from dagster import DefaultSensorStatus, SensorDefinition, SensorEvaluationContext, SensorResult, sensor

from assets.partitions import BATCH_FILES
from resources.batch_store.inbox import Inbox
from resources.batch_store.store import BatchStore
from resources.engine.catalog import load_catalog
from resources.errors import CatalogError
from resources.settings import settings
from vllm_batch_pipelines.jobs import JOBS
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
    config, store = settings(), BatchStore(settings().data_root)
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
    try:
        catalog = load_catalog(settings().models_file)
    except CatalogError:  # the runs say what is wrong with it
        catalog = None
    return _result(context, start_queued(context.instance, store, "submit", ToStart(), catalog, engines()))


def _result(context: SensorEvaluationContext, found: ToStart) -> SensorResult:
    for note in found.notes:
        context.log.info(note)
    return SensorResult(
        run_requests=found.runs,
        dynamic_partitions_requests=[BATCH_FILES.build_add_request(found.new_keys)] if found.new_keys else [],
        skip_reason=None if found.runs else "; ".join(found.notes[:10]) or "nothing new",
    )


SENSORS: list[SensorDefinition] = [inbox, submitted]
