"""What to tell a person about a batch: read from its folder alone, so it works with the stack down."""

from dataclasses import asdict, dataclass
from typing import Any

from resources.batch_store import queue
from resources.batch_store.batch import Batch
from resources.batch_store.store import BatchStore


@dataclass(frozen=True)
class BatchStatus:
    """`state` is queued, running, completed, failed, interrupted or registered. Counts are None until known.

    `errors` is the list of OpenAI's Batch API, of a batch that cannot complete."""

    key: str
    state: str
    source: str
    registered_at: str
    lines: int | None = None
    done: int | None = None
    succeeded: int | None = None
    failed: int | None = None
    schema_violations: int | None = None
    rejected: int | None = None
    phase: str | None = None
    tokens_per_second: float | None = None
    eta_seconds: float | None = None
    note: str | None = None
    error: str | None = None
    errors: dict[str, Any] | None = None
    engine: str | None = None
    output_file: str | None = None
    error_file: str | None = None
    run: dict[str, Any] | None = None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def percent(self) -> float | None:
        return 100 * self.done / self.lines if self.done is not None and self.lines else None


def status_of(store: BatchStore, batch: Batch) -> BatchStatus:
    """The status of a batch as its files tell it now."""
    record = batch.run_record()
    owner = batch.locked_by()
    summary = batch.requests_summary()
    output = batch.output_summary() if batch.is_published() else None
    error = record.get("error") or {}
    common: dict[str, Any] = {
        "key": batch.key,
        "source": batch.spec.source_name,
        "registered_at": batch.spec.registered_at.isoformat(timespec="seconds"),
        "lines": summary["lines"] if summary else batch.spec.lines,
        "rejected": summary["rejected"] if summary else None,
        "engine": batch.spec.engine,
    }
    if owner is not None:
        progress = record.get("progress") or {}
        return BatchStatus(
            **common,
            state="running",
            done=progress.get("done"),
            failed=progress.get("failed"),
            phase=record.get("phase"),
            tokens_per_second=progress.get("tokens_per_second"),
            eta_seconds=progress.get("eta_seconds"),
            note=progress.get("note"),
            run=owner,
        )
    if queue.is_queued(store, batch.key):
        return BatchStatus(**common, state="queued")
    if output is not None and record.get("status") not in ("failed", "interrupted"):
        return BatchStatus(
            **common,
            state="completed",
            done=output["lines"],
            succeeded=output["succeeded"],
            failed=output["failed"],
            schema_violations=output.get("schema_violations", 0),
            output_file=str(batch.output_dir / "output.jsonl"),
            error_file=str(batch.output_dir / "errors.jsonl") if output["failed"] else None,
        )
    state = {"running": "interrupted", "idle": "interrupted"}.get(record.get("status", ""), record.get("status"))
    progress = record.get("progress") or {}
    return BatchStatus(
        **common,
        state=state or "registered",
        done=progress.get("done"),
        error=error.get("message"),
        errors=error.get("errors"),
        phase=record.get("phase"),
    )
