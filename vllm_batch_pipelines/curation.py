"""When reviews are read: as soon as somebody annotates, and once a night in full."""

import json
import time
from datetime import datetime

from dagster import (
    AssetSelection,
    DagsterRunStatus,
    DefaultScheduleStatus,
    DefaultSensorStatus,
    RunRequest,
    RunsFilter,
    ScheduleDefinition,
    SensorDefinition,
    SensorEvaluationContext,
    SensorResult,
    define_asset_job,
    sensor,
)

from resources.errors import BatchError
from resources.label_studio.client import LabelStudioClient
from resources.label_studio.connection import connection_of, target_names
from resources.label_studio.reviews import has_news, open_reviews
from resources.settings import settings
from resources.targets import load_targets

NIGHT_CONFIG = {"ops": {"label_studio_annotations": {"config": {"full": True}}}}
_INTERVAL_SECONDS = 30
_ASK_AGAIN_SECONDS = 900
_TICK_TRIES = 1
_TICK_TIMEOUT_SECONDS = 10.0
_UNFINISHED = [
    DagsterRunStatus.QUEUED,
    DagsterRunStatus.NOT_STARTED,
    DagsterRunStatus.STARTING,
    DagsterRunStatus.STARTED,
]

gold_star_job = define_asset_job(
    "gold_star_job",
    selection=AssetSelection.assets("label_studio_annotations").downstream(),
    description="Read what reviewers changed, bring the gold stars into step, write their datasets, tell of them.",
)


@sensor(
    job=gold_star_job,
    minimum_interval_seconds=_INTERVAL_SECONDS,
    default_status=DefaultSensorStatus.RUNNING,
    description="Starts gold_star_job when somebody has annotated, changed or deleted something in Label Studio.",
)
def annotations(context: SensorEvaluationContext) -> SensorResult:
    """Asks for the latest change only; the job reads. The cursor holds what was asked for last, and when: a job that
    failed is asked for again after a while, and not at every tick."""
    asked: dict[str, list[object]] = json.loads(context.cursor) if context.cursor else {}
    config = settings()
    targets = load_targets(config.targets_file)
    notes, news = [], {}
    for name in target_names(config, targets):
        try:
            found = _news_of(name)
        except BatchError as error:
            notes.append(f"{name}: {error}")
            continue
        if found is not None and _is_due(asked.get(name), found):
            news[name] = found
    if not news:
        return SensorResult(skip_reason="; ".join(notes) or "nothing new", cursor=json.dumps(asked))
    running = context.instance.get_runs(RunsFilter(job_name=gold_star_job.name, statuses=_UNFINISHED), limit=1)
    if running:
        return SensorResult(skip_reason="a run is reading them already", cursor=json.dumps(asked))
    asked |= {name: [found.isoformat(), time.time()] for name, found in news.items()}
    return SensorResult(run_requests=[RunRequest()], cursor=json.dumps(asked))


def _news_of(name: str) -> datetime | None:
    config = settings()
    connection = connection_of(name, config, load_targets(config.targets_file))
    with LabelStudioClient(connection, tries=_TICK_TRIES, timeout=_TICK_TIMEOUT_SECONDS) as client:
        return has_news(client, connection, open_reviews(config.data_root, name))


def _is_due(asked: list[object] | None, found: datetime) -> bool:
    if asked is None:
        return True
    moment, at = asked
    return found > datetime.fromisoformat(str(moment)) or time.time() - float(str(at)) > _ASK_AGAIN_SECONDS


reviews_at_night = ScheduleDefinition(
    name="reviews_at_night",
    job=gold_star_job,
    cron_schedule="30 2 * * *",
    run_config=NIGHT_CONFIG,
    default_status=DefaultScheduleStatus.RUNNING,
    description="Reads all annotations anew, so that deleted tasks are seen too, and writes the datasets.",
)

JOBS = [gold_star_job]
SENSORS: list[SensorDefinition] = [annotations]
SCHEDULES = [reviews_at_night]
