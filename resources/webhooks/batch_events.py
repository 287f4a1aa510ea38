"""The events of a batch, made from its folder. Format: docs/webhooks.md."""

from datetime import UTC, datetime
from typing import Any

from resources.batch_store.batch import Batch
from resources.errors import BatchError
from resources.progress import Progress
from resources.webhooks.event import Event, event_id


def completed(batch: Batch) -> Event:
    """What is published. The id is that of the results' revision: the same for a repeat, another after a retry.

    Raises:
        BatchError: nothing is published.
    """
    folder = batch.output_dir.resolve()
    summary = batch.output_summary()
    if summary is None:
        raise BatchError(f"{batch.key}: it has no outputs yet; materialize batch_output first.")
    at = datetime.fromtimestamp((folder / "summary.json").stat().st_mtime, UTC)
    errors = summary["failed"]
    data = _data(batch, "completed") | {
        "completed_at": int(at.timestamp()),
        "request_counts": {"total": summary["lines"], "completed": summary["succeeded"], "failed": errors},
        "usage": {"prompt_tokens": summary["prompt_tokens"], "completion_tokens": summary["completion_tokens"]},
        "output_file": str(batch.output_dir / "output.jsonl"),
        "error_file": str(batch.output_dir / "errors.jsonl") if errors else None,
    }
    revision = _revision(summary["generations"])
    return Event(_id(batch, revision, "batch.completed"), "batch.completed", at, data, batch.key, folder)


def failed(batch: Batch, run_id: str, at: datetime) -> Event:
    """A batch that no run takes up again by itself. Another run that fails is another event."""
    error = batch.run_record().get("error") or {}
    code, message = str(error.get("code") or "run_failed"), str(error.get("message") or "The run failed.")
    data = _data(batch, "failed") | _counts(batch) | {"error": {"code": code, "message": message}}
    return Event(ending_id(batch, run_id, "batch.failed"), "batch.failed", at, data, batch.key)


def cancelled(batch: Batch, run_id: str, at: datetime) -> Event:
    """A batch whose run somebody cancelled; what is committed stays, and another run goes on with it."""
    data = _data(batch, "cancelled") | _counts(batch)
    return Event(ending_id(batch, run_id, "batch.cancelled"), "batch.cancelled", at, data, batch.key)


def in_progress(batch: Batch, run_id: str, now: Progress, at: datetime) -> Event:
    data = _data(batch, "in_progress") | {
        "request_counts": {"total": now.total, "completed": now.done - now.failed, "failed": now.failed},
        "progress": {
            "phase": now.phase,
            "percent": round(100 * now.done / now.total, 1) if now.total else 0.0,
            "tokens_per_second": round(now.tokens_per_second, 1),
            "eta_seconds": None if now.eta_seconds is None else round(now.eta_seconds),
        },
    }
    made = _id(batch, _revision(batch.current()), "batch.progress", run_id, at.isoformat())
    return Event(made, "batch.progress", at, data, batch.key)


def _data(batch: Batch, status: str) -> dict[str, Any]:
    summary = batch.requests_summary() or {}
    return {
        "id": batch.key,
        "object": "batch",
        "endpoint": ", ".join(summary.get("endpoints", [])) or None,
        "status": status,
        "created_at": int(batch.spec.registered_at.timestamp()),
        "completed_at": None,
        "request_counts": {"total": summary.get("lines") or batch.spec.lines or 0, "completed": 0, "failed": 0},
        "usage": {"prompt_tokens": 0, "completion_tokens": 0},
        "metadata": batch.spec.options.metadata,
        "model": sorted(summary.get("models", {})),
        "output_file": None,
        "error_file": None,
        "error": None,
    }


def _counts(batch: Batch) -> dict[str, Any]:
    """How far the last run came with asking, by its own word; nothing where it did not come to that."""
    progress = batch.run_record().get("progress") or {}
    if progress.get("phase") != "answer":
        return {}
    done, failed, total = (int(progress.get(name) or 0) for name in ("done", "failed", "total"))
    return {"request_counts": {"total": total, "completed": max(done - failed, 0), "failed": failed}}


def _revision(generations: dict[str, Any]) -> list[str]:
    return [f"{entry['generation']}.r{entry['revision']}" for entry in generations.values()]


def ending_id(batch: Batch, run_id: str, event: str) -> str:
    """The id of a `batch.failed` or `batch.cancelled`: of the run, and so the same whatever came of the batch."""
    return _id(batch, [], event, run_id)


def _id(batch: Batch, revision: list[str], event: str, *more: str) -> str:
    return event_id(batch.key, batch.spec.identity, revision, event, *more)
