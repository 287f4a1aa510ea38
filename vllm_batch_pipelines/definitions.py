"""The code location: everything that Dagster knows of this project, put together."""

from dagster import Definitions, in_process_executor

from assets.batch_output import batch_output
from assets.batch_requests import batch_requests
from assets.batch_results import batch_results
from assets.exports import exports
from assets.gold_star_feeds import gold_star_events, gold_star_tables
from assets.gold_stars import gold_star_datasets, gold_stars, label_studio_annotations
from assets.handlers import handler_assets
from assets.label_studio import label_studio_tasks
from assets.models import catalog_as_it_is, downstream_of, model_assets
from assets.webhooks import webhook_deliveries
from resources.batch_store.resource import BatchStoreResource
from resources.engine.resource import EngineResource
from resources.exports.resource import ExportsResource
from resources.label_studio.connection import is_curation_on
from resources.label_studio.resource import LabelStudioResource
from resources.settings import settings
from resources.targets import has_targets, webhooks_enabled
from resources.webhooks.resource import WebhooksResource
from vllm_batch_pipelines import curation, monitoring
from vllm_batch_pipelines.jobs import JOBS, WEBHOOK_JOBS
from vllm_batch_pipelines.schedules import SCHEDULES
from vllm_batch_pipelines.sensors import SENSORS, WEBHOOK_SENSORS

_settings = settings()
_models = model_assets(catalog_as_it_is(_settings.models_file))
_webhooks = webhooks_enabled(_settings)
_exports = has_targets(_settings, "exports")
_curation = is_curation_on(_settings, has_targets(_settings, "label_studio"))

defs = Definitions(
    assets=[
        *_models,
        batch_requests,
        downstream_of(batch_results, _models),
        batch_output,
        *([webhook_deliveries] if _webhooks else []),
        *([exports] if _exports else []),
        *handler_assets(_settings.result_handlers, _settings.handler_timeout),
        *([label_studio_tasks, label_studio_annotations, gold_stars, *gold_star_datasets] if _curation else []),
        *([gold_star_events] if _curation and _webhooks else []),
        *([gold_star_tables] if _curation and _exports else []),
        *([monitoring.machine] if _settings.enable_monitoring else []),
    ],
    resources={
        "store": BatchStoreResource(data_root=str(_settings.data_root)),
        "engines": EngineResource(
            models_file=str(_settings.models_file.resolve()),
            runtime_dir=str(_settings.runtime_root),
            log_dir=str(_settings.data_root / "logs" / "engines"),
        ),
        "webhooks": WebhooksResource(data_root=str(_settings.data_root), enabled=_webhooks),
        "export_targets": ExportsResource(
            data_root=str(_settings.data_root), targets_file=str(_settings.targets_file.resolve())
        ),
        **({"label_studio": LabelStudioResource(data_root=str(_settings.data_root))} if _curation else {}),
    },
    jobs=[*JOBS, *(WEBHOOK_JOBS if _webhooks else []), *(curation.JOBS if _curation else [])],
    sensors=[
        *SENSORS,
        *(WEBHOOK_SENSORS if _webhooks else []),
        *(curation.SENSORS if _curation else []),
        *(monitoring.SENSORS if _settings.enable_monitoring else []),
    ],
    schedules=[*SCHEDULES, *(curation.SCHEDULES if _curation else [])],
    # In this process: the engine is one of its own anyway. Retries live inside the work, so no RetryPolicy anywhere.
    executor=in_process_executor,
)
