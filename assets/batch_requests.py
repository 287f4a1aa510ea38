"""batch_requests: every line of a file checked, before any model is loaded."""

from dagster import (
    AssetCheckResult,
    AssetCheckSeverity,
    AssetCheckSpec,
    AssetExecutionContext,
    Config,
    DataVersion,
    MaterializeResult,
    MetadataValue,
    asset,
)
from pydantic import Field

from assets.partitions import BATCH_FILES, GROUP, OWNERS
from assets.reporting import failures_for_people, progress_reporter, table
from resources import pipeline
from resources.batch_store.resource import BatchStoreResource
from resources.engine.resource import EngineResource


class RequestsConfig(Config):
    recheck: bool = Field(False, description="Check the lines again although they were checked before.")


@asset(
    partitions_def=BATCH_FILES,
    group_name=GROUP,
    owners=OWNERS,
    kinds={"jsonl", "parquet"},
    code_version="1",
    check_specs=[
        AssetCheckSpec(
            "requests_valid",
            asset="batch_requests",
            partitions_def=BATCH_FILES,
            description="Every line of the file is a valid request.",
        )
    ],
)
def batch_requests(
    context: AssetExecutionContext, config: RequestsConfig, store: BatchStoreResource, engines: EngineResource
) -> MaterializeResult:  # type: ignore[type-arg]
    """The lines of a batch file, checked: valid requests and rejects with their reason, one row a line."""
    with failures_for_people(context):
        batch = store.lock(context.partition_key, context.run.run_id)
        summary = pipeline.check(batch, engines.catalog(), recheck=config.recheck, progress=progress_reporter(context))
    return MaterializeResult(
        metadata={
            "source": batch.spec.source_name,
            "lines": summary.lines,
            "valid": summary.valid,
            "rejected": summary.rejected,
            "models": MetadataValue.json(summary.models),
            "endpoints": ", ".join(summary.endpoints),
            "options": MetadataValue.json(batch.spec.options.model_dump(exclude_defaults=True)),
            "first_rejects": table(summary.first_rejects, ["line", "custom_id", "error_code", "error_message"]),
            "path": MetadataValue.path(str(batch.requests_dir)),
            "dagster/row_count": summary.lines,
        },
        data_version=DataVersion(batch.spec.identity[:16]),
        check_results=[
            AssetCheckResult(
                check_name="requests_valid",
                passed=summary.rejected == 0,
                severity=AssetCheckSeverity.WARN,
                metadata={"rejected": summary.rejected, "by_code": MetadataValue.json(summary.rejects_by_code)},
            )
        ],
    )
