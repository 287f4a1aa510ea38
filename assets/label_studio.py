"""label_studio_tasks: the results of a batch as tasks that people review."""

from dagster import (
    AssetCheckResult,
    AssetCheckSeverity,
    AssetCheckSpec,
    AssetExecutionContext,
    AutomationCondition,
    Config,
    MaterializeResult,
    MetadataValue,
    asset,
)
from pydantic import Field

from assets.batch_output import batch_output
from assets.partitions import BATCH_FILES, OWNERS, REVIEW_GROUP
from assets.reporting import failures_for_people, progress_reporter, table
from resources.batch_store.resource import BatchStoreResource
from resources.label_studio.importing import ImportReport, import_batch
from resources.label_studio.resource import LabelStudioResource

_CHECK = "every_row_is_a_task"


class TasksConfig(Config):
    reimport_deleted: bool = Field(False, description="Import again what people have deleted in Label Studio.")


@asset(
    deps=[batch_output],
    partitions_def=BATCH_FILES,
    group_name=REVIEW_GROUP,
    owners=OWNERS,
    kinds={"labelstudio"},
    pool="label_studio",
    code_version="1",
    automation_condition=AutomationCondition.eager() & AutomationCondition.all_deps_blocking_checks_passed(),
    check_specs=[
        AssetCheckSpec(
            _CHECK,
            asset="label_studio_tasks",
            partitions_def=BATCH_FILES,
            description="Label Studio, asked, has a task of every successful row, but for those that people deleted.",
        )
    ],
)
def label_studio_tasks(
    context: AssetExecutionContext, config: TasksConfig, store: BatchStoreResource, label_studio: LabelStudioResource
) -> MaterializeResult:  # type: ignore[type-arg]
    """A task in Label Studio for every successful row, with the model's answer filled in. Idempotent by line."""
    with failures_for_people(context):
        batch = store.lock(context.partition_key, context.run.run_id)
        target = label_studio.target_of(batch)
        if target is None:
            return _not_reviewed()
        connection = label_studio.connection(target)
        with label_studio.client(connection) as client:
            report = import_batch(
                batch,
                client,
                connection,
                label_studio.reviews(target).folder,
                reimport_deleted=config.reimport_deleted,
                progress=progress_reporter(context),
            )
    return MaterializeResult(
        metadata={
            "target": target,
            "project": MetadataValue.url(report.url),
            "rows": report.rows,
            "tasks": report.tasks,
            "imported_now": report.imported,
            "there_before": report.there_before,
            "updated_now": report.updated,
            "new_after_annotation": report.new_after_annotation,
            "deleted_by_people": report.deleted_by_people,
            "duplicates_removed": report.duplicates_removed,
            "answers_filled_in": report.prefilled,
            "answers_not_fitting": report.not_fitting,
            "without_predictions": report.without_predictions,
            "first_misfits": table(report.misfits, ["line", "custom_id", "problem"]),
            "dagster/row_count": report.tasks,
            **({"note": report.note} if report.note else {}),
        },
        check_results=[_check(report)],
    )


def _check(report: ImportReport) -> AssetCheckResult:
    return AssetCheckResult(
        check_name=_CHECK,
        passed=report.is_complete,
        severity=AssetCheckSeverity.ERROR,
        description=f"{report.tasks} tasks of {report.rows} rows; {report.deleted_by_people} deleted by people.",
    )


def _not_reviewed() -> MaterializeResult:  # type: ignore[type-arg]
    note = "The batch names no `label_studio` target, and the settings name no project for such batches."
    return MaterializeResult(
        metadata={"tasks": 0, "note": note},
        check_results=[AssetCheckResult(check_name=_CHECK, passed=True, description=note)],
    )
