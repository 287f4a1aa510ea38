"""From annotations to training data: label_studio_annotations -> gold_stars -> gold_star_dataset/<format>."""

from collections.abc import Callable
from typing import Any, TypeVar

from dagster import (
    AssetExecutionContext,
    AssetKey,
    AssetsDefinition,
    Config,
    DataVersion,
    Failure,
    MaterializeResult,
    MetadataValue,
    asset,
)
from pydantic import Field

from assets.label_studio import label_studio_tasks
from assets.partitions import OWNERS, REVIEW_GROUP
from assets.reporting import failures_for_people, table
from resources.errors import BatchError
from resources.label_studio.annotations import AnnotationRow
from resources.label_studio.datasets import DEFAULT_VALIDATION_SHARE, FORMATS, Dataset, Format, write_dataset
from resources.label_studio.quality import quality
from resources.label_studio.resource import LabelStudioResource
from resources.label_studio.reviews import SyncReport, sync_reviews

T = TypeVar("T")

_SYNC_COLUMNS = ["target", "annotations", "gold", "tasks_read", "created", "updated", "removed", "full", "project_gone"]
_QUALITY_COLUMNS = [
    "target",
    "model",
    "schema",
    "annotations",
    "tasks",
    "annotators",
    "edit_rate",
    "gold_rate",
    "mean_rating",
    "agreement",
]


class AnnotationsConfig(Config):
    full: bool = Field(False, description="Read all annotated tasks, not only what changed: finds deleted tasks too.")


class DatasetConfig(Config):
    validation_share: float = Field(
        DEFAULT_VALIDATION_SHARE, ge=0, le=0.9, description="Share of the prompts that is held back for validation."
    )


@asset(
    deps=[label_studio_tasks],
    group_name=REVIEW_GROUP,
    owners=OWNERS,
    kinds={"labelstudio", "parquet"},
    pool="label_studio",
    code_version="1",
)
def label_studio_annotations(
    context: AssetExecutionContext, config: AnnotationsConfig, label_studio: LabelStudioResource
) -> MaterializeResult:  # type: ignore[type-arg]
    """What reviewers have said, in step with Label Studio: what changed since the last run, or all of it."""

    def sync(target: str) -> SyncReport:
        connection = label_studio.connection(target)
        with label_studio.client(connection) as client:
            return sync_reviews(client, connection, label_studio.reviews(target), full=config.full)

    reports = _of_each(context, label_studio, sync)
    for report in reports:
        if report.project_gone:
            context.log.warning(f"The project of target {report.target} is gone; what was known of it is kept.")
    rows = [(report.target, report.rows) for report in reports]
    return MaterializeResult(
        metadata={
            "annotations": sum(report.annotations for report in reports),
            "gold_stars": sum(report.gold for report in reports),
            "tasks_read": sum(report.tasks_read for report in reports),
            "targets": table([vars(report) for report in reports], _SYNC_COLUMNS),
            "quality": table(_quality(rows), _QUALITY_COLUMNS),
            "quality_numbers": MetadataValue.json(_quality(rows)),
            "dagster/row_count": sum(report.annotations for report in reports),
        }
    )


@asset(
    deps=[label_studio_annotations],
    group_name=REVIEW_GROUP,
    owners=OWNERS,
    kinds={"parquet"},
    code_version="1",
)
def gold_stars(context: AssetExecutionContext, label_studio: LabelStudioResource) -> MaterializeResult:  # type: ignore[type-arg]
    """The annotations that are marked as examples to learn from, with the model's answer and the reviewer's."""

    def count(target: str) -> dict[str, Any]:
        reviews = label_studio.reviews(target)
        stars = reviews.gold_stars()
        return {
            "target": target,
            "gold_stars": len(stars),
            "edited": sum(star.edited for star in stars),
            "version": reviews.state().number,
            "path": str(reviews.path("gold_stars")),
            "changes": str(reviews.folder / "changes"),
        }

    found = _of_each(context, label_studio, count)
    total = sum(row["gold_stars"] for row in found)
    return MaterializeResult(
        metadata={
            "gold_stars": total,
            "edited": sum(row["edited"] for row in found),
            "targets": table(found, ["target", "gold_stars", "edited", "version", "path", "changes"]),
            "dagster/row_count": total,
        },
        data_version=DataVersion("+".join(f"{row['target']}.{row['version']}" for row in found) or "none"),
    )


def _dataset_asset(form: Format) -> AssetsDefinition:
    @asset(
        key=AssetKey(["gold_star_dataset", form]),
        deps=[gold_stars],
        group_name=REVIEW_GROUP,
        owners=OWNERS,
        kinds={"parquet" if form == "raw" else "jsonl"},
        code_version="1",
        description=f"The gold stars as `{form}`, in immutable versions named by their content, a card beside each.",
    )
    def gold_star_dataset(
        context: AssetExecutionContext, config: DatasetConfig, label_studio: LabelStudioResource
    ) -> MaterializeResult:  # type: ignore[type-arg]
        def write(target: str) -> tuple[str, Dataset]:
            stars: list[AnnotationRow] = label_studio.reviews(target).gold_stars()
            schema = label_studio.connection(target).schema
            made = write_dataset(
                label_studio.datasets_dir, target, schema, stars, form, validation_share=config.validation_share
            )
            return target, made

        made = _of_each(context, label_studio, write)
        rows = [{**vars(dataset), **dataset.card["counts"], "target": target} for target, dataset in made]
        return MaterializeResult(
            metadata={
                "examples": sum(dataset.train + dataset.validation for _, dataset in made),
                "versions": table(rows, ["target", "version", "train", "validation", "is_new", "folder"]),
                "cards": MetadataValue.json({target: _without_lineage(dataset) for target, dataset in made}),
                "dagster/row_count": sum(dataset.train + dataset.validation for _, dataset in made),
            },
            data_version=DataVersion("+".join(f"{target}.{dataset.version}" for target, dataset in made) or "none"),
        )

    return gold_star_dataset


gold_star_datasets = [_dataset_asset(form) for form in FORMATS]


def _of_each(context: AssetExecutionContext, label_studio: LabelStudioResource, do: Callable[[str], T]) -> list[T]:
    """Do it for every target. One that fails fails the step, after the others are done."""
    done, failed = [], []
    with failures_for_people(context):
        for target in label_studio.targets():
            try:
                done.append(do(target))
            except BatchError as error:
                failed.append(f"{target}: {error}")
    if failed:
        raise Failure(description="; ".join(failed), allow_retries=False)
    return done


def _quality(rows: list[tuple[str, list[AnnotationRow]]]) -> list[dict[str, Any]]:
    return [{"target": target, **numbers} for target, found in rows for numbers in quality(found)]


def _without_lineage(dataset: Dataset) -> dict[str, Any]:
    """A row an example is for the file, not for the event log."""
    return {key: value for key, value in dataset.card.items() if key != "lineage"}
