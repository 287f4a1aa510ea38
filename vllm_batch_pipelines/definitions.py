"""The code location: everything that Dagster knows of this project, put together."""

from dagster import Definitions, in_process_executor

from assets.batch_output import batch_output
from assets.batch_requests import batch_requests
from assets.batch_results import batch_results
from assets.models import catalog_as_it_is, downstream_of, model_assets
from resources.batch_store.resource import BatchStoreResource
from resources.engine.resource import EngineResource
from resources.settings import settings
from vllm_batch_pipelines.jobs import JOBS
from vllm_batch_pipelines.schedules import SCHEDULES
from vllm_batch_pipelines.sensors import SENSORS

_settings = settings()
_models = model_assets(catalog_as_it_is(_settings.models_file))

defs = Definitions(
    assets=[*_models, batch_requests, downstream_of(batch_results, _models), batch_output],
    resources={
        "store": BatchStoreResource(data_root=str(_settings.data_root)),
        "engines": EngineResource(
            models_file=str(_settings.models_file.resolve()),
            runtime_dir=str(_settings.runtime_root),
            log_dir=str(_settings.data_root / "logs" / "engines"),
        ),
    },
    jobs=JOBS,
    sensors=SENSORS,
    schedules=SCHEDULES,
    # In this process: the engine is one of its own anyway. Retries live inside the work, so no RetryPolicy anywhere.
    executor=in_process_executor,
)
