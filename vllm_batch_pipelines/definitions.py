"""The code location: everything that Dagster knows of this project, put together."""

from dagster import Definitions, in_process_executor

from assets.batch_output import batch_output
from assets.batch_requests import batch_requests
from assets.batch_results import batch_results
from assets.exports import exports
from assets.handlers import handler_assets
from assets.webhooks import webhook_deliveries
from resources.batch_store.resource import BatchStoreResource
from resources.engine.resource import EngineResource
from resources.exports.resource import ExportsResource
from resources.settings import settings
from resources.targets import has_targets, webhooks_enabled
from resources.webhooks.resource import WebhooksResource
from vllm_batch_pipelines.jobs import JOBS, WEBHOOK_JOBS
from vllm_batch_pipelines.schedules import SCHEDULES
from vllm_batch_pipelines.sensors import SENSORS, WEBHOOK_SENSORS

_settings = settings()
_webhooks = webhooks_enabled(_settings)

defs = Definitions(
    assets=[
        batch_requests,
        batch_results,
        batch_output,
        *([webhook_deliveries] if _webhooks else []),
        *([exports] if has_targets(_settings, "exports") else []),
        *handler_assets(_settings.result_handlers, _settings.handler_timeout),
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
    },
    jobs=[*JOBS, *(WEBHOOK_JOBS if _webhooks else [])],
    sensors=[*SENSORS, *(WEBHOOK_SENSORS if _webhooks else [])],
    schedules=SCHEDULES,
    # In this process: the engine is one of its own anyway. Retries live inside the work, so no RetryPolicy anywhere.
    executor=in_process_executor,
)
