"""What the assets have in common: errors as failures, progress as observations, tables as metadata."""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from dagster import (
    AssetExecutionContext,
    AssetObservation,
    Failure,
    MetadataValue,
    TableColumn,
    TableMetadataValue,
    TableRecord,
    TableSchema,
)

from resources.errors import BatchError, BatchFailed, BatchLocked
from resources.progress import Progress, ProgressCallback

log = logging.getLogger(__name__)

PROGRESS_SECONDS = 15
MOST_ERRORS = 20
PROGRESS_TAG = "vllm_batch/progress"
LOCKED_TAG = "vllm_batch/locked"
_CELL_CHARACTERS = 500


@contextmanager
def failures_for_people(context: AssetExecutionContext) -> Iterator[None]:
    """An error that is for people fails the step with its message and nothing else."""
    try:
        yield
    except BatchLocked as error:
        context.instance.add_run_tags(context.run.run_id, {LOCKED_TAG: "true"})
        raise Failure(description=str(error), allow_retries=False) from None
    except BatchFailed as error:
        errors = table(error.errors["data"][:MOST_ERRORS], ["line", "code", "param", "message"])
        raise Failure(description=str(error), metadata={"errors": errors}, allow_retries=False) from None
    except BatchError as error:
        raise Failure(description=str(error), allow_retries=False) from None


def progress_reporter(
    context: AssetExecutionContext, clock: Callable[[], float] = time.monotonic
) -> Callable[[Progress], None]:
    """Progress as one observation, one log line and a run tag, at most every 15 seconds of the clock."""
    last = clock()
    last_note = ""

    def report(now: Progress) -> None:
        nonlocal last, last_note
        if clock() - last < PROGRESS_SECONDS and (not now.note or last_note):
            return
        last, last_note = clock(), now.note
        try:
            tell(now)
        except Exception as error:  # the database is away for a while, say: the work needs it at its end only
            log.warning("progress could not be recorded: %s", error)

    def tell(now: Progress) -> None:
        if now.note:
            context.log.info(now.note)
            return
        percent = 100 * now.done / now.total if now.total else 0.0
        eta = f", about {now.eta_seconds / 60:.1f} min left" if now.eta_seconds is not None else ""
        context.log.info(
            f"{now.phase}: {now.done} of {now.total} lines ({percent:.0f} %), {now.failed} errors, "
            f"{now.rows_per_second:.1f} rows/s, {now.tokens_per_second:.0f} tokens/s{eta}"
        )
        context.instance.add_run_tags(context.run.run_id, {PROGRESS_TAG: f"{now.phase} {percent:.0f} %"})
        context.log_event(
            AssetObservation(
                context.asset_key,
                partition=context.partition_key,
                metadata={
                    "rows_done": now.done,
                    "rows_failed": now.failed,
                    "percent": round(percent, 1),
                    "tokens_per_second": round(now.tokens_per_second, 1),
                    "eta_seconds": round(now.eta_seconds or 0, 1),
                },
            )
        )

    return report


def all_of(*callbacks: ProgressCallback) -> ProgressCallback:
    """One callback that calls them all."""

    def tell(now: Progress) -> None:
        for callback in callbacks:
            callback(now)

    return tell


def said_at_intervals(
    context: AssetExecutionContext, clock: Callable[[], float] = time.monotonic
) -> Callable[[str], None]:
    """Says in the log what it is given, at most every 15 seconds of the clock."""
    last = clock()

    def say(text: str) -> None:
        nonlocal last
        if clock() - last < PROGRESS_SECONDS:
            return
        last = clock()
        try:
            context.log.info(text)
        except Exception as error:  # as above
            log.warning("progress could not be recorded: %s", error)

    return say


def table(rows: Sequence[dict[str, Any]], columns: Sequence[str]) -> TableMetadataValue:
    """A small table for the UI; long texts are cut short."""
    records = [TableRecord({name: _cell(row.get(name)) for name in columns}) for row in rows]
    return MetadataValue.table(records, schema=TableSchema([TableColumn(name) for name in columns]))


def _cell(value: Any) -> str:
    text = "" if value is None else str(value)
    return text if len(text) <= _CELL_CHARACTERS else text[: _CELL_CHARACTERS - 1] + "…"
