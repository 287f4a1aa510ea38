"""The story of a batch in three functions: check -> answer -> publish.

The assets and the lean `vllm-batch run` both call these, and nothing else does the work twice. Each is idempotent: what
is done already is found and left alone. The caller holds the batch's lock; each function takes a `stop` event and a
`progress` callback, which is called in the caller's thread.
"""

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from resources import durable, failpoints
from resources.answering import Answering, Mode, ModelReport, set_aside_damaged
from resources.batch_format.lines import iter_lines, open_regular
from resources.batch_format.requests import Code
from resources.batch_store.batch import Batch
from resources.batch_store.checking import check_stream
from resources.batch_store.outputs import OutputSummary, write_outputs
from resources.batch_store.requests import RequestsSummary, request_parts, sync_parts
from resources.chunk_store.generation import Generation
from resources.chunk_store.retry import ERRORS, Failures, Retry
from resources.engine.catalog import Catalog, EngineKind, ModelEntry
from resources.engine.factory import EngineStarter
from resources.errors import (
    BatchError,
    BatchFailed,
    BatchLocked,
    BatchStopped,
    CheckpointError,
    ChunkDamaged,
    LineError,
)
from resources.progress import Progress, ProgressCallback, silent


@dataclass
class AnswerReport:
    models: list[ModelReport] = field(default_factory=list)
    expired: bool = False

    @property
    def asked(self) -> int:
        return sum(model.asked for model in self.models)

    @property
    def copied(self) -> int:
        return sum(model.copied for model in self.models)


_PUBLISH = "publish"
_PUBLISH_RESTART = "publish_restart"
_TO_PUBLISH = (_PUBLISH, _PUBLISH_RESTART)


def check(
    batch: Batch,
    catalog: Catalog,
    *,
    recheck: bool = False,
    stop: threading.Event | None = None,
    progress: ProgressCallback = silent,
) -> RequestsSummary:
    """Check every line of the snapshot, without a model, and publish `requests/`.

    Raises:
        BatchFailed: `empty_file`, `no_valid_request`, `invalid_requests` (option on_invalid: reject),
            `unreadable_input`; the same at every run until the options change.
        BatchStopped: stopped; nothing is published.
    """
    with _recorded(batch, "check", progress) as tell:
        known = batch.requests_summary()
        summary = RequestsSummary(**known) if known else None
        done_and_pruned = batch.is_pruned() and batch.is_published()
        stale = recheck or summary is None or _catalog_says_otherwise(summary, catalog)
        if summary is None or ((stale or not request_parts(batch.requests_dir)) and not done_and_pruned):
            if known is not None and batch.work().mode is None:
                batch.set_work(batch.work().restarts, Mode.RESUME)  # other lines may be valid now
            summary = _check_snapshot(batch, catalog, stop or threading.Event(), tell)
        _refuse_what_cannot_run(batch, summary)
        return summary


def answer(
    batch: Batch,
    catalog: Catalog,
    engines: EngineStarter,
    *,
    mode: Mode = Mode.RESUME,
    failed: Failures = ERRORS,
    stop: threading.Event | None = None,
    progress: ProgressCallback = silent,
) -> AnswerReport:
    """Have every valid line answered and committed, model by model, those whose server is warm first. An engine is
    started only where lines are left.

    `failed` is what the mode retry_failed asks again.

    Raises:
        BatchStopped: stopped; finished rows are committed.
        EngineError: the engine did not start, or went away; uncommitted lines are asked by the next run.
    """
    stop = stop or threading.Event()
    with _recorded(batch, "answer", progress) as tell:
        known = batch.requests_summary()
        if known is None:
            raise BatchError(f"{batch.key}: its lines are not checked yet; materialize batch_requests first.")
        summary = RequestsSummary(**known)
        report = AnswerReport()
        if batch.is_pruned():
            if mode is Mode.RESUME and batch.is_published():
                return report
            raise BatchError(_pruned(batch))
        _refuse_what_cannot_run(batch, summary)
        retry = _begin(batch, mode, failed)
        before = batch.current() or _published_generations(batch)
        current: dict[str, dict[str, Any]] = {}
        finished_before = 0
        left = {model: model_entry(batch, catalog, model) for model in summary.models}
        while left:
            model, entry = _next_model(left, engines)
            del left[model]
            answering = Answering(batch, entry, summary, summary.models[model], engines, stop)
            model_report, committed, complete = answering.run(retry, tell, finished_before)
            report.models.append(model_report)
            report.expired |= not complete
            finished_before += committed.done
            current[model] = _current_entry(before.get(model), model_report, committed.rows)
        current = {model: current[model] for model in summary.models}
        if current != batch.current():
            durable.make_folder(batch.results_dir)
            batch.set_current(current)
        if batch.work().mode is not None:
            batch.set_work(batch.work().restarts, _PUBLISH_RESTART if _is_restarting(batch) else _PUBLISH)
        return report


def publish(batch: Batch, *, stop: threading.Event | None = None, progress: ProgressCallback = silent) -> OutputSummary:
    """Write the outputs of the current results and give them their name in one step. Done already: nothing happens."""
    with _recorded(batch, "publish", progress) as tell:
        current = batch.current()
        known = batch.output_summary()
        if known is not None and batch.is_published() and batch.work().mode not in _TO_PUBLISH:
            return OutputSummary(**known)
        if not current:
            raise BatchError(f"{batch.key}: it has no complete results yet; materialize batch_results first.")
        revision = "-".join(str(entry["revision"]) for entry in current.values()) or "0"
        durable.make_folder(batch.outputs_dir)
        name = f"{revision}-{batch.next_revision_number():x}"
        temporary = durable.temporary_beside(batch.outputs_dir / name)
        try:
            summary = write_to(batch, temporary, current, "batch_expired", stop or threading.Event(), tell)
        except ChunkDamaged:
            for entry in current.values():
                set_aside_damaged(batch, Generation(batch.results_dir / entry["generation"]))
            raise ChunkDamaged(
                f"{batch.key}: nothing new is published, since some of its chunks were damaged. They are set aside; "
                "run the batch again: their lines are asked anew, all others stay."
            ) from None
        batch.ensure_locked()
        durable.publish_folder(temporary, batch.outputs_dir / name)
        durable.point_link(batch.output_dir, f"{batch.outputs_dir.name}/{name}")
        _remove_older(batch, name)
        if batch.work().mode in _TO_PUBLISH:
            batch.set_work(batch.work().restarts, None)
        return summary


def write_to(
    batch: Batch,
    folder: Path,
    generations: dict[str, dict[str, Any]],
    missing_code: str,
    stop: threading.Event,
    progress: ProgressCallback,
) -> OutputSummary:
    """Write the outputs of some generations into a new folder, complete or not."""
    known = batch.requests_summary()
    if known is None:
        raise BatchError(f"{batch.key}: its lines are not checked yet, so there is nothing to write.")
    folder.mkdir(mode=0o700)
    started = time.monotonic()

    def step(lines: int) -> None:
        if stop.is_set():
            raise BatchStopped(f"{batch.key}: stopped while outputs were written; the next run writes them anew.")
        rate = lines / max(time.monotonic() - started, 1e-6)
        progress(Progress("publish", lines, known["lines"], rows_per_second=rate))

    chosen = {model: Generation(batch.results_dir / entry["generation"]) for model, entry in generations.items()}
    summary = write_outputs(batch, chosen, known["last_line"], folder, missing_code, step)
    if summary.lines != known["lines"]:
        raise CheckpointError(f"{batch.key}: {summary.lines} lines written of {known['lines']}; nothing is published.")
    summary.generations = generations
    durable.write_file(folder / "summary.json", json.dumps(summary.as_dict(), indent=1).encode())
    return summary


def model_entry(batch: Batch, catalog: Catalog, model: str) -> ModelEntry:
    """The catalog entry that answers a batch's lines for a model: the null engine where the batch is a dry run."""
    entry = catalog.get(model)
    if batch.spec.engine is None:
        return entry
    return ModelEntry(name=entry.name, engine=EngineKind(batch.spec.engine), concurrency=entry.concurrency)


def models_of(batch: Batch, catalog: Catalog) -> list[ModelEntry]:
    """The models that a run would use, as far as is known: before the check, that of the first line."""
    known = batch.requests_summary()
    names = known["models"] if known else [batch.spec.options.model or _model_of_first_line(batch) or ""]
    return [model_entry(batch, catalog, name) for name in names if catalog.resolve(name)]


def _model_of_first_line(batch: Batch) -> str | None:
    try:
        with open_regular(batch.input_path) as stream:
            _, line = next(iter_lines(stream, batch.spec.suffix))
            model = json.loads(line or b"{}")["body"]["model"]
    except (BatchError, OSError, ValueError, KeyError, TypeError, StopIteration):
        return None
    return model if isinstance(model, str) else None


def newest_generations(batch: Batch, catalog: Catalog) -> dict[str, dict[str, Any]]:
    """The generations a run would go on with now, complete or not, in the form of `results/current.json`."""
    known = batch.requests_summary() or {"models": {}}
    found = {}
    for model in known["models"]:
        generation = Generation.of(batch.results_dir, model_entry(batch, catalog, model), batch.work().restarts)
        found[model] = {"generation": generation.name, "revision": 0, "rows": 0}
    return found


def catalog_helps(batch: Batch, catalog: Catalog) -> bool:
    """Whether the catalog has changed so that another check may find more lines valid, or for other models."""
    known = batch.requests_summary()
    return known is not None and _catalog_says_otherwise(RequestsSummary(**known), catalog)


def is_complete(batch: Batch, catalog: Catalog) -> bool:
    """Whether a run would find nothing to do: published, from the generations that the catalog means today."""
    known = batch.requests_summary()
    if known is None or not batch.is_published() or batch.work().mode or catalog_helps(batch, catalog):
        return False
    deadline, output = batch.deadline(), batch.output_summary() or {}
    if output.get("missing") and (deadline is None or datetime.now(UTC) < deadline):
        return False
    meant = {model: entry["generation"] for model, entry in newest_generations(batch, catalog).items()}
    return meant == {model: entry["generation"] for model, entry in batch.current().items()}


def _next_model(left: dict[str, ModelEntry], engines: EngineStarter) -> tuple[str, ModelEntry]:
    """One whose server is up, so that it is used before it makes room; else the next in line."""
    warm = engines.warm(left.values()) if len(left) > 1 else set()
    return next(((model, entry) for model, entry in left.items() if entry.name in warm), next(iter(left.items())))


def _begin(batch: Batch, mode: Mode, failed: Failures) -> Retry | None:
    """Note durably what is begun, so that a run that is killed is gone on with; what this run asks again."""
    work = batch.work()
    if mode is Mode.RESUME:
        return work.retry
    if mode is Mode.RESTART and not _is_restarting(batch):
        deadline = batch.deadline()
        if deadline is not None and datetime.now(UTC) >= deadline:
            raise BatchError(f"{batch.key}: its deadline has passed, so a restart would ask nothing.")
        batch.set_work(work.restarts + 1, Mode.RESTART)
        return None
    if mode is Mode.RETRY_FAILED and work.retry and work.retry.failures == failed:
        return work.retry
    retry = Retry(failed) if mode is Mode.RETRY_FAILED else None
    if not _is_restarting(batch):
        begun = retry and replace(retry, begun_at=time.time_ns() // 1000)
        batch.set_work(work.restarts, mode, begun)
    return retry


def _is_restarting(batch: Batch) -> bool:
    """Whether a restart was begun and is not published: to ask for one again then is to go on with it."""
    return batch.work().mode in (Mode.RESTART, _PUBLISH_RESTART)


def _refuse_what_cannot_run(batch: Batch, summary: RequestsSummary) -> None:
    if summary.lines == 0:
        raise BatchFailed("empty_file", f"{batch.spec.source_name} holds no request.")
    if summary.valid == 0:
        message = f"None of the {summary.lines} lines is valid: {_first(summary)}"
        raise BatchFailed("no_valid_request", message, _line_errors(summary))
    if summary.rejected and batch.spec.options.on_invalid == "reject":
        message = f"{summary.rejected} of {summary.lines} lines are invalid: {_first(summary)}"
        raise BatchFailed("invalid_requests", message, _line_errors(summary))


def _line_errors(summary: RequestsSummary) -> list[LineError]:
    """The first of the lines that are invalid."""
    return [
        {
            "code": row["error_code"],
            "message": row["error_message"],
            "param": row["error_param"],
            "line": row["line"],
        }
        for row in summary.first_rejects
    ]


def _check_snapshot(batch: Batch, catalog: Catalog, stop: threading.Event, tell: ProgressCallback) -> RequestsSummary:
    if not batch.input_path.exists():
        raise BatchError(_pruned(batch))
    spec = batch.spec
    folder = durable.temporary_beside(batch.requests_dir)
    folder.mkdir(mode=0o700)
    with open_regular(batch.input_path) as stream:
        summary = check_stream(
            stream, spec.suffix, spec.options.model, catalog, folder, total=spec.lines or 0, stop=stop, progress=tell
        )
    sync_parts(folder)
    failpoints.reached("written", batch.requests_dir)
    durable.write_file(folder / "summary.json", json.dumps(summary.as_dict(), indent=1).encode())
    batch.ensure_locked()
    durable.publish_folder(folder, batch.requests_dir)
    return summary


def _catalog_says_otherwise(summary: RequestsSummary, catalog: Catalog) -> bool:
    """Whether a check would find other models now: a name that was missed is there, or one means another model."""
    moved = any(catalog.resolve(name) not in (None, model) for name, model in summary.names.items())
    return moved or (bool(summary.rejects_by_code.get(Code.MODEL_NOT_FOUND)) and summary.names != catalog.names)


def _current_entry(before: dict[str, Any] | None, report: ModelReport, rows: int) -> dict[str, Any]:
    """The revision goes up by one when there are new rows to read."""
    same = before is not None and before["generation"] == report.generation and before["rows"] == rows
    if before is not None and same and not report.asked:
        return before
    return {"generation": report.generation, "revision": (before["revision"] if before else 0) + 1, "rows": rows}


def _published_generations(batch: Batch) -> dict[str, dict[str, Any]]:
    """What `current.json` said, where it is damaged: the outputs carry a copy."""
    return dict((batch.output_summary() or {}).get("generations", {}))


def _pruned(batch: Batch) -> str:
    return f"{batch.key}: its snapshot was pruned; `vllm-batch run FILE --mode restart` brings it back."


def _first(summary: RequestsSummary) -> str:
    first = summary.first_rejects[0]
    return f"line {first['line']}: {first['error_code']}, {first['error_message']}."


def _remove_older(batch: Batch, keep: str) -> None:
    """Remove the outputs that this revision replaces, and the generations that a restart has replaced."""
    for path in batch.outputs_dir.iterdir():
        if path.name != keep and not path.is_symlink():
            path.rename(durable.temporary_beside(path))
    durable.remove_temporaries(batch.outputs_dir)
    for entry in batch.current().values():
        now = batch.results_dir / entry["generation"]
        for path in now.parent.iterdir() if now.is_dir() else ():
            if path != now and path.is_dir() and path.name.split("-")[0] == now.name.split("-")[0]:
                path.rename(durable.temporary_beside(batch.root / "replaced"))
    durable.remove_temporaries(batch.root)


@contextmanager
def _recorded(batch: Batch, phase: str, progress: ProgressCallback) -> Iterator[ProgressCallback]:
    """Keep `run.json` telling what the run does: running, then done, failed or interrupted, and how far it came."""
    record: dict[str, Any] = {
        "status": "running",
        "phase": phase,
        "started_at": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "run": batch.locked_by(),
        "error": None,
    }
    last_written = 0.0

    def tell(now: Progress) -> None:
        nonlocal last_written
        record["progress"] = {**now.__dict__, "eta_seconds": now.eta_seconds}
        if time.monotonic() - last_written >= 1:
            last_written = time.monotonic()
            batch.ensure_locked()
            note({})
        progress(now)

    def note(more: dict[str, Any], durable_write: bool = False) -> None:
        # It is only shown to people: a full disk, say, must not keep them from the error that tells of it.
        with suppress(OSError, BatchLocked):
            batch.write_run_record(record | more, durable_write=durable_write)

    batch.ensure_locked()
    note({})
    try:
        with durable.storage_errors(batch.root):
            yield tell
    except BatchFailed as failure:
        error = {"code": failure.code, "message": str(failure), "errors": failure.errors, "final": True}
        note({"status": "failed", "error": error}, durable_write=True)
        raise
    except (BatchStopped, KeyboardInterrupt) as stopped:
        error = {"code": "stopped", "message": str(stopped), "final": False}
        note({"status": "interrupted", "error": error})
        raise
    except BaseException as failure:
        status = "failed" if isinstance(failure, Exception) else "interrupted"
        error = {"code": type(failure).__name__, "message": str(failure)[:4000], "final": False}
        note({"status": status, "error": error})
        if isinstance(failure, FileNotFoundError):
            batch.ensure_locked()  # where the whole folder was removed, say that
        raise
    note({"status": "completed" if phase == "publish" else "idle"})
