"""batch_results: every valid request answered, committed in chunks."""

from dagster import AssetExecutionContext, Config, DataVersion, MaterializeResult, MetadataValue, asset
from pydantic import Field

from assets.batch_requests import batch_requests
from assets.partitions import BATCH_FILES, GROUP, OWNERS
from assets.reporting import all_of, failures_for_people, progress_reporter, table
from resources import pipeline
from resources.answering import Mode
from resources.batch_store.resource import BatchStoreResource
from resources.chunk_store.retry import FailureKind, failures_of
from resources.engine.resource import EngineResource
from resources.webhooks.resource import WebhooksResource


class ResultsConfig(Config):
    mode: Mode = Field(
        Mode.RESUME, description="resume: lines without a row; retry_failed: failed ones too; restart: all, anew."
    )
    failed: list[str] = Field(
        [FailureKind.ERRORS.value],
        description="What retry_failed asks again: errors, truncated (cut answers), schema (answers that do not fit).",
    )


_REPORT_COLUMNS = [
    "model",
    "engine",
    "total",
    "asked",
    "copied",
    "failed",
    "truncated",
    "retries",
    "engine_restarts",
    "quarantined",
    "prompt_tokens",
    "completion_tokens",
    "seconds",
    "load_seconds",
    "warm",
    "woken",
    "swaps",
    "generation",
]


@asset(
    deps=[batch_requests],
    partitions_def=BATCH_FILES,
    group_name=GROUP,
    owners=OWNERS,
    kinds={"vllm", "parquet"},
    pool="gpu",
    code_version="1",
)
def batch_results(
    context: AssetExecutionContext,
    config: ResultsConfig,
    store: BatchStoreResource,
    engines: EngineResource,
    webhooks: WebhooksResource,
) -> MaterializeResult:  # type: ignore[type-arg]
    """The answers of a batch, in chunks that are the checkpoint: an interrupted run goes on where it stopped."""
    with failures_for_people(context):
        batch = store.lock(context.partition_key, context.run.run_id)
        report = pipeline.answer(
            batch,
            engines.catalog(),
            engines.starter(f"{context.partition_key}, run {context.run.run_id[:8]}"),
            mode=config.mode,
            failed=failures_of(config.failed),
            progress=all_of(progress_reporter(context), webhooks.progress_announcer(batch, context.run.run_id)),
        )
    seconds = sum(model.seconds for model in report.models)
    tokens = sum(model.completion_tokens for model in report.models)
    current = batch.current()
    return MaterializeResult(
        metadata={
            "asked_now": report.asked,
            "copied_now": report.copied,
            "failed_now": sum(model.failed for model in report.models),
            "truncated_now": sum(model.truncated for model in report.models),
            "prompt_tokens": sum(model.prompt_tokens for model in report.models),
            "completion_tokens": tokens,
            "tokens_per_second": round(tokens / seconds, 1) if seconds else 0.0,
            "duration_seconds": round(seconds, 2),
            "load_seconds": round(sum(model.load_seconds for model in report.models), 1),
            "engine": ", ".join(f"{model.model}: {model.start}" for model in report.models),
            "swaps": sum(model.swaps for model in report.models),
            "model": ", ".join(model.model for model in report.models),
            "deadline_passed": report.expired,
            "engine_restarts": sum(model.engine_restarts for model in report.models),
            "quarantined_now": sum(model.quarantined for model in report.models),
            "tokens": MetadataValue.json({m.model: m.tokens.as_dict() for m in report.models if m.tokens is not None}),
            "by_model": table([model.as_dict() for model in report.models], _REPORT_COLUMNS),
            "path": MetadataValue.path(str(batch.results_dir)),
        },
        data_version=DataVersion(
            "+".join(f"{entry['generation']}.r{entry['revision']}" for entry in current.values()) or "none"
        ),
    )
