"""exports: the outputs of a batch in the object stores and tables that its options name."""

from collections.abc import Callable, Iterator
from typing import Any

from dagster import (
    AssetCheckResult,
    AssetCheckSeverity,
    AssetCheckSpec,
    AssetExecutionContext,
    Failure,
    MaterializeResult,
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
    done: list[dict[str, Any]] = []
    failed: dict[str, str] = {}
    for name in names:
        try:
            written = export_targets.export(batch.key, name, _hear(context, name))
        except BatchError as error:
            failed[name] = str(error)
            context.log.error(f"{name}: {error}")  # noqa: TRY400 (the message says it all)
            continue
        done.append(_row(name, written))
        context.log.info(
            f"{name}: {written.there} rows in {written.where}" + ("" if written.changed else ", as before")
        )
        if written.there != written.rows:
            failed[name] = f"{written.where} has {written.there} rows of {written.rows}"
    problems = "; ".join(f"{name}: {message}" for name, message in failed.items())
    targets = table(done, ["target", "where", "rows", "there", "written now"])
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
