"""batch_output: what everybody reads, in input order, in OpenAI's format and as Parquet."""

from typing import Any

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

from assets.batch_results import batch_results
from assets.partitions import BATCH_FILES, GROUP, OWNERS
from assets.reporting import failures_for_people, progress_reporter, table
from resources import pipeline
from resources.batch_store.outputs import OutputSummary, verify_outputs
from resources.batch_store.resource import BatchStoreResource


class OutputConfig(Config):
    show_answers: bool = Field(True, description="Show a few answers, cut short, in the UI. Off for private data.")
    max_error_rate: float = Field(0.05, ge=0, le=1, description="Share of error rows above which the check warns.")
    max_truncated_rate: float = Field(0.1, ge=0, le=1, description="Share of cut answers above which the check warns.")
    max_schema_violation_rate: float = Field(
        0.0, ge=0, le=1, description="Share of answers that do not fit their JSON schema above which the check warns."
    )


def _check(name: str, description: str, blocking: bool = False) -> AssetCheckSpec:
    return AssetCheckSpec(
        name, asset="batch_output", partitions_def=BATCH_FILES, description=description, blocking=blocking
    )


@asset(
    deps=[batch_results],
    partitions_def=BATCH_FILES,
    group_name=GROUP,
    owners=OWNERS,
    kinds={"jsonl", "parquet"},
    code_version="1",
    check_specs=[
        _check("every_request_answered_once", "The published files hold each line exactly once.", blocking=True),
        _check("error_rate", "The share of error rows is not above the threshold."),
        _check("truncated_rate", "The share of answers cut by max_tokens is not above the threshold."),
        _check(
            "schema_violation_rate", "The share of answers not fitting their JSON schema is not above the threshold."
        ),
    ],
)
def batch_output(context: AssetExecutionContext, config: OutputConfig, store: BatchStoreResource) -> MaterializeResult:  # type: ignore[type-arg]
    """`output.jsonl` and `errors.jsonl` as OpenAI's Batch API writes them, and the same as Parquet rows."""
    with failures_for_people(context):
        batch = store.lock(context.partition_key, context.run.run_id)
        summary = pipeline.publish(batch, progress=progress_reporter(context))
        problems = verify_outputs(batch)
    metadata: dict[str, Any] = {
        "lines": summary.lines,
        "succeeded": summary.succeeded,
        "failed": summary.failed,
        "truncated": summary.truncated,
        "schema_violations": summary.schema_violations,
        "prompt_tokens": summary.prompt_tokens,
        "completion_tokens": summary.completion_tokens,
        "errors_by_code": MetadataValue.json(summary.errors_by_code),
        "output_file": MetadataValue.path(str(batch.output_dir / "output.jsonl")),
        "error_file": MetadataValue.path(str(batch.output_dir / "errors.jsonl")),
        "results": MetadataValue.path(str(batch.output_dir / "results")),
        "dagster/row_count": summary.lines,
    }
    if batch.spec.options.metadata:
        metadata["batch_metadata"] = MetadataValue.json(batch.spec.options.metadata)
    if config.show_answers:
        metadata["sample_answers"] = table(summary.samples, ["line", "custom_id", "text"])
    return MaterializeResult(
        metadata=metadata,
        data_version=DataVersion("+".join(f"{e['generation']}.r{e['revision']}" for e in batch.current().values())),
        check_results=_check_results(config, summary, problems),
    )


def _check_results(config: OutputConfig, summary: OutputSummary, problems: list[str]) -> list[AssetCheckResult]:
    error_rate = summary.failed / summary.lines if summary.lines else 0.0
    truncated_rate = summary.truncated / summary.succeeded if summary.succeeded else 0.0
    violation_rate = summary.schema_violations / summary.succeeded if summary.succeeded else 0.0
    return [
        AssetCheckResult(
            check_name="every_request_answered_once",
            passed=not problems,
            severity=AssetCheckSeverity.ERROR,
            description="; ".join(problems) or f"{summary.lines} lines, each once.",
        ),
        AssetCheckResult(
            check_name="error_rate",
            passed=error_rate <= config.max_error_rate,
            severity=AssetCheckSeverity.WARN,
            metadata={"error_rate": error_rate, "threshold": config.max_error_rate},
        ),
        AssetCheckResult(
            check_name="truncated_rate",
            passed=truncated_rate <= config.max_truncated_rate,
            severity=AssetCheckSeverity.WARN,
            metadata={"truncated_rate": truncated_rate, "threshold": config.max_truncated_rate},
        ),
        AssetCheckResult(
            check_name="schema_violation_rate",
            passed=violation_rate <= config.max_schema_violation_rate,
            severity=AssetCheckSeverity.WARN,
            metadata={"schema_violation_rate": violation_rate, "threshold": config.max_schema_violation_rate},
        ),
    ]
