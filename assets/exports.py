"""exports: the outputs of a batch in the object stores and tables that its options name."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

from dagster import (
    AssetCheckResult,
    AssetCheckSeverity,
    AssetCheckSpec,
    AssetExecutionContext,
    Failure,
    MaterializeResult,
    TableMetadataValue,
    asset,
)

from assets.batch_output import batch_output
from assets.partitions import AFTER_OUTPUT, BATCH_FILES, GROUP, OWNERS
from assets.reporting import failures_for_people, said_at_intervals, table
from resources.batch_store.resource import BatchStoreResource
from resources.errors import BatchError
from resources.exports.resource import ExportsResource
from resources.exports.rows import Written


@asset(
    deps=[batch_output],
    partitions_def=BATCH_FILES,
    group_name=GROUP,
    owners=OWNERS,
    kinds={"parquet", "sql"},
    code_version="1",
    automation_condition=AFTER_OUTPUT,
    check_specs=[
        AssetCheckSpec(
            "exported",
            asset="exports",
            partitions_def=BATCH_FILES,
            description="Every target that the batch names says that it has as many rows as were published.",
        )
    ],
)
def exports(
    context: AssetExecutionContext, store: BatchStoreResource, export_targets: ExportsResource
) -> Iterator[AssetCheckResult | MaterializeResult]:  # type: ignore[type-arg]
    """The published rows where others read them. What a target has already is left alone; one that fails, fails alone.

    Without the batch's lock: what is published does not change, and others who come after it need not wait.
    """
    with failures_for_people(context):
        batch = store.store().get(context.partition_key)
    names = dict.fromkeys(batch.spec.options.exports)
    targets, failed = export_each(context, {name: partial(export_targets.export, batch.key, name) for name in names})
    problems = "; ".join(failed)
    yield AssetCheckResult(
        check_name="exported",
        passed=not failed,
        severity=AssetCheckSeverity.ERROR,
        description=problems or ("All targets have all rows." if names else "The batch names no target."),
        metadata={"targets": targets},
    )
    if failed:
        raise Failure(
            description=f"{len(failed)} of {len(names)} exports failed, the others are done; run this asset again for "
            f"what is missing. {problems}",
            metadata={"targets": targets},
            allow_retries=False,
        )
    note = "" if names else f"Nothing to do: the option `exports` of {batch.key} names no target."
    if note:
        context.log.info(note)
    yield MaterializeResult(metadata={"targets": targets} | ({"note": note} if note else {}))


def export_each(
    context: AssetExecutionContext, wanted: Mapping[str, Callable[[Callable[[Any], None]], Written]]
) -> tuple[TableMetadataValue, list[str]]:
    """Do all of these exports, each called with what hears of its progress; what is where, and what failed and why."""
    done: list[dict[str, Any]] = []
    failed: list[str] = []
    for name, export in wanted.items():
        try:
            written = export(_hear(context, name))
        except BatchError as error:
            failed.append(f"{name}: {error}")
            context.log.error(failed[-1])  # noqa: TRY400 (the message says it all)
            continue
        done.append(_row(name, written))
        context.log.info(
            f"{name}: {written.there} rows in {written.where}" + ("" if written.changed else ", as before")
        )
        if written.there != written.rows:
            failed.append(f"{name}: {written.where} has {written.there} rows of {written.rows}")
    return table(done, ["target", "where", "rows", "there", "written now"]), failed


def _row(name: str, written: Written) -> dict[str, Any]:
    changed = "yes" if written.changed else "no, was there"
    return {
        "target": name,
        "where": written.where,
        "rows": written.rows,
        "there": written.there,
        "written now": changed,
    }


def _hear(context: AssetExecutionContext, name: str) -> Callable[[Any], None]:
    say = said_at_intervals(context)

    def hear(message: Any) -> None:
        said = f"{message['rows']:,} of {message['of']:,} rows" if isinstance(message, dict) else message
        say(f"{name}: {said}")

    return hear
