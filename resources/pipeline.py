"""The story of a batch in three functions: check -> answer -> publish.

The assets and the lean `vllm-batch run` both call these, and nothing else does the work twice. Each is idempotent: what
is done already is found and left alone. The caller holds the batch's lock; each function takes a `stop` event and a
`progress` callback, which is called in the caller's thread.
"""

import json
import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Any, BinaryIO

from resources import durable
from resources.batch_format.lines import MAX_LINE_BYTES, iter_lines, open_regular
from resources.batch_format.requests import Code, Rejected, check_line
from resources.batch_store.batch import Batch
from resources.batch_store.outputs import OutputSummary, write_outputs
from resources.batch_store.requests import RequestsSummary, RequestsWriter, request_parts, sync_parts, valid_rows
from resources.chunk_store.generation import Committed, Generation
from resources.chunk_store.writer import ChunkWriter
from resources.engine.catalog import Catalog, EngineKind, ModelEntry
from resources.engine.dispatcher import Counts, Dispatcher, DispatchOptions, Pending
from resources.engine.factory import EngineStarter
from resources.engine.transform import body_transform
from resources.errors import BatchError, BatchFailed, BatchStopped, CheckpointError

log = logging.getLogger(__name__)

_LINES_BETWEEN_LOOKS = 4096


class Mode(StrEnum):
    """resume: ask what has no row. retry_failed: that, and what failed. restart: everything, anew."""

    RESUME = "resume"
    RETRY_FAILED = "retry_failed"
    RESTART = "restart"


@dataclass(frozen=True)
class Progress:
    """How far a phase is. Rates are over this run; tokens are completion tokens."""

    phase: str
    done: int
    total: int
    failed: int = 0
    tokens_per_second: float = 0.0
    rows_per_second: float = 0.0
    note: str = ""

    @property
    def eta_seconds(self) -> float | None:
        return (self.total - self.done) / self.rows_per_second if self.rows_per_second > 0 else None


ProgressCallback = Callable[[Progress], None]


def _silent(_: Progress) -> None:
    pass


@dataclass
class ModelReport:
    """What happened to one model's lines in a call of `answer`. `asked` counts lines that were sent in this call."""

    model: str
    engine: str
    generation: str
    total: int
    asked: int = 0
    failed: int = 0
    truncated: int = 0
    retries: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    seconds: float = 0.0
    load_seconds: float = 0.0

    @property
    def tokens_per_second(self) -> float:
        return self.completion_tokens / self.seconds if self.seconds > 0 else 0.0


@dataclass
class AnswerReport:
    models: list[ModelReport] = field(default_factory=list)
    expired: bool = False

    @property
    def asked(self) -> int:
        return sum(model.asked for model in self.models)


def check(
    batch: Batch,
    catalog: Catalog,
    *,
    recheck: bool = False,
    stop: threading.Event | None = None,
    progress: ProgressCallback = _silent,
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
        stale = recheck or summary is None or _catalog_now_knows_more(summary, catalog)
        if summary is None or ((stale or not request_parts(batch.requests_dir)) and not done_and_pruned):
            summary = _check_snapshot(batch, catalog, stop or threading.Event(), tell)
        if summary.lines == 0:
            raise BatchFailed("empty_file", f"{batch.spec.source_name} holds no request.")
        if summary.valid == 0:
            raise BatchFailed("no_valid_request", f"None of the {summary.lines} lines is valid: {_first(summary)}")
        if summary.rejected and batch.spec.options.on_invalid == "reject":
            raise BatchFailed(
                "invalid_requests", f"{summary.rejected} of {summary.lines} lines are invalid: {_first(summary)}"
            )
        return summary


def answer(
    batch: Batch,
    catalog: Catalog,
    engines: EngineStarter,
    *,
    mode: Mode = Mode.RESUME,
    stop: threading.Event | None = None,
    progress: ProgressCallback = _silent,
) -> AnswerReport:
    """Have every valid line answered and committed, model by model. An engine is started only where lines are left.

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
        before = batch.current()
        if mode is Mode.RESTART and before:
            # What is published must never pass for the answers to come, also where this run is killed half-way.
            before = {model: {**entry, "rows": 0} for model, entry in before.items()}
            batch.set_current(before)
        current: dict[str, dict[str, Any]] = {}
        finished_before = 0
        for model, total in summary.models.items():
            entry = model_entry(batch, catalog, model)
            answering = _Answering(batch, entry, summary, total, engines, stop)
            model_report, committed, complete = answering.run(mode, tell, finished_before)
            report.models.append(model_report)
            report.expired |= not complete
            finished_before += committed.done
            current[model] = _current_entry(before.get(model), model_report, committed.rows)
        if current != before:
            batch.results_dir.mkdir(exist_ok=True)
            batch.set_current(current)
        return report


def publish(
    batch: Batch, *, stop: threading.Event | None = None, progress: ProgressCallback = _silent
) -> OutputSummary:
    """Write the outputs of the current results and give them their name in one step. Done already: nothing happens."""
    with _recorded(batch, "publish", progress) as tell:
        current = batch.current()
        known = batch.output_summary()
        if known is not None and batch.is_published():
            return OutputSummary(**known)
        if not current:
            raise BatchError(f"{batch.key}: it has no complete results yet; materialize batch_results first.")
        revision = "-".join(str(entry["revision"]) for entry in current.values()) or "0"
        name = f"{revision}-{time.time_ns():x}"
        batch.outputs_dir.mkdir(exist_ok=True)
        temporary = durable.temporary_beside(batch.outputs_dir / name)
        summary = write_to(batch, temporary, current, "batch_expired", stop or threading.Event(), tell)
        durable.publish_folder(temporary, batch.outputs_dir / name)
        durable.point_link(batch.output_dir, f"{batch.outputs_dir.name}/{name}")
        _remove_older(batch.outputs_dir, name)
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

    chosen = [Generation(batch.results_dir / entry["generation"]) for entry in generations.values()]
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


def newest_generations(batch: Batch, catalog: Catalog) -> dict[str, dict[str, Any]]:
    """The generations a run would go on with now, complete or not, in the form of `results/current.json`."""
    known = batch.requests_summary() or {"models": {}}
    found = {}
    for model in known["models"]:
        generation = Generation.of(batch.results_dir, model_entry(batch, catalog, model))
        found[model] = {"generation": generation.name, "revision": 0, "rows": 0}
    return found


def is_complete(batch: Batch, catalog: Catalog) -> bool:
    """Whether a run would find nothing to do: published, from the generations that the catalog means today."""
    if not batch.is_published():
        return False
    meant = {model: entry["generation"] for model, entry in newest_generations(batch, catalog).items()}
    return meant == {model: entry["generation"] for model, entry in batch.current().items()}


class _Answering:
    """One model's share of a batch."""

    def __init__(
        self,
        batch: Batch,
        entry: ModelEntry,
        summary: RequestsSummary,
        total: int,
        engines: EngineStarter,
        stop: threading.Event,
    ) -> None:
        self._batch, self._entry, self._summary, self._total = batch, entry, summary, total
        self._engines, self._stop = engines, stop
        self._generation = Generation.of(batch.results_dir, entry)

    def run(self, mode: Mode, tell: ProgressCallback, finished_before: int) -> tuple[ModelReport, Committed, bool]:
        """The report, what is committed now, and whether every line has a row (False: the deadline passed)."""
        generation, entry = self._generation, self._entry
        if mode is Mode.RESTART and generation.folder.exists():
            generation.folder.rename(durable.temporary_beside(self._batch.root / "restarted"))
            durable.remove_temporaries(self._batch.root)
        generation.remove_superseded()
        state = generation.committed(self._summary.last_line)
        report = ModelReport(entry.name, str(entry.engine), generation.name, self._total)
        wanted = (state.attempts == 0) | state.failed if mode is Mode.RETRY_FAILED else state.attempts == 0
        left = self._total - state.done + (state.failures if mode is Mode.RETRY_FAILED else 0)
        deadline = self._batch.spec.options.deadline_at(self._batch.spec.registered_at)
        if left == 0 or (deadline is not None and datetime.now(UTC) >= deadline):
            return report, state, left == 0
        generation.start(entry)
        complete = self._dispatch(state, wanted, report, deadline, tell, finished_before)
        state = generation.committed(self._summary.last_line)
        if self._stop.is_set() and not complete:
            raise BatchStopped(f"{self._batch.key}: stopped with {state.done} of {self._total} lines answered.")
        if complete and state.done != self._total:
            raise CheckpointError(f"{self._batch.key}: {state.done} of {self._total} lines have a row; this is a bug.")
        return report, state, complete

    def _dispatch(
        self,
        state: Committed,
        wanted: Any,
        report: ModelReport,
        deadline: datetime | None,
        tell: ProgressCallback,
        finished_before: int,
    ) -> bool:
        options, entry = self._batch.spec.options, self._entry
        transform = body_transform(options, entry)
        writer = ChunkWriter(self._generation, state, options.chunk_rows)
        done, failed_before = state.done, state.failures
        total = sum(self._summary.models.values())
        attempts = state.attempts

        def requests() -> Iterator[Pending]:
            for line, url, body in valid_rows(self._batch.requests_dir, entry.name, lambda lines: wanted[lines]):
                yield Pending(line, url, transform(body), int(attempts[line]))

        def waiting(note: str) -> None:
            tell(Progress("answer", finished_before + done, total, failed_before, note=note))

        with self._engines.start(entry, self._stop, waiting) as engine:
            report.load_seconds = engine.load_seconds
            dispatcher = Dispatcher(
                engine.connect,
                writer.commit,
                DispatchOptions(
                    concurrency=entry.concurrency,
                    chunk_rows=options.chunk_rows,
                    flush_seconds=options.flush_seconds,
                    max_attempts=options.max_attempts,
                    request_timeout=None if engine.in_process else options.request_timeout,
                    deadline=deadline,
                ),
                request_id_prefix=self._batch.spec.identity[:12],
                died=engine.died,
            )
            started = time.monotonic()

            def tick(counts: Counts) -> None:
                seconds = max(time.monotonic() - started, 1e-6)
                tell(
                    Progress(
                        "answer",
                        min(finished_before + done + counts.finished, total),
                        total,
                        failed_before + counts.failed,
                        counts.completion_tokens / seconds,
                        counts.finished / seconds,
                    )
                )

            try:
                return dispatcher.run(requests(), self._stop, tick)
            finally:
                report.seconds = time.monotonic() - started
                counts = dispatcher.counts
                report.asked, report.failed = counts.finished, counts.failed
                report.truncated, report.retries = counts.truncated, counts.retries
                report.prompt_tokens, report.completion_tokens = counts.prompt_tokens, counts.completion_tokens
                writer.finish()


def check_stream(
    stream: BinaryIO,
    suffix: str,
    model: str | None,
    catalog: Catalog,
    folder: Path,
    *,
    total: int = 0,
    stop: threading.Event | None = None,
    progress: ProgressCallback = _silent,
) -> RequestsSummary:
    """Check the lines of an input and write them into `folder` as Parquet. `model` stands for that of every line."""
    writer = RequestsWriter(folder)
    summary = RequestsSummary(names=sorted(catalog.names))
    started = time.monotonic()
    for count, (number, raw) in enumerate(iter_lines(stream, suffix)):
        writer.add(_request_row(number, raw, model, catalog))
        summary.last_line = number
        if count % _LINES_BETWEEN_LOOKS == 0:
            if stop is not None and stop.is_set():
                raise BatchStopped("Stopped while the lines were checked; the next run checks them anew.")
            rate = count / max(time.monotonic() - started, 1e-6)
            progress(Progress("check", number, max(total, number), rows_per_second=rate))
    return writer.finish(summary)


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
    durable.write_file(folder / "summary.json", json.dumps(summary.as_dict(), indent=1).encode())
    durable.publish_folder(folder, batch.requests_dir)
    return summary


def _request_row(number: int, raw: bytes | None, override: str | None, catalog: Catalog) -> Any:
    if raw is None:
        message = f"the line is over {MAX_LINE_BYTES} bytes"
        return (number, None, None, None, None, str(Code.LINE_TOO_LONG), message, None)
    try:
        request = check_line(raw)
    except Rejected as bad:
        return (number, bad.custom_id, None, None, None, str(bad.code), bad.message, bad.param)
    asked = override or request.model
    if asked is None:
        code, message = str(Code.MISSING), "`body.model` is missing, and the batch has no option `model`"
        return (number, request.custom_id, request.url, None, None, code, message, "body.model")
    model = catalog.resolve(asked)
    if model is None:
        code, message = str(Code.MODEL_NOT_FOUND), catalog.unknown(asked)
        return (number, request.custom_id, request.url, asked[:200], None, code, message, "body.model")
    return (number, request.custom_id, request.url, model, request.body, None, None, None)


def _catalog_now_knows_more(summary: RequestsSummary, catalog: Catalog) -> bool:
    return bool(summary.rejects_by_code.get(Code.MODEL_NOT_FOUND)) and summary.names != sorted(catalog.names)


def _current_entry(before: dict[str, Any] | None, report: ModelReport, rows: int) -> dict[str, Any]:
    """The revision goes up by one when there are new rows to read."""
    unchanged = before is not None and before["generation"] == report.generation and before["rows"] == rows
    if before is not None and unchanged:
        return before
    return {"generation": report.generation, "revision": (before["revision"] if before else 0) + 1, "rows": rows}


def _pruned(batch: Batch) -> str:
    return f"{batch.key}: its snapshot was pruned; register the file again to bring it back."


def _first(summary: RequestsSummary) -> str:
    first = summary.first_rejects[0]
    return f"line {first['line']}: {first['error_code']}, {first['error_message']}."


def _remove_older(outputs: Path, keep: str) -> None:
    for path in outputs.iterdir():
        if path.name != keep and not path.is_symlink():
            path.rename(durable.temporary_beside(path))
    durable.remove_temporaries(outputs)


@contextmanager
def _recorded(batch: Batch, phase: str, progress: ProgressCallback) -> Iterator[ProgressCallback]:
    """Keep `run.json` telling what the run does: running with progress, then done, failed or interrupted."""
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
        if time.monotonic() - last_written >= 1:
            last_written = time.monotonic()
            batch.write_run_record(record | {"progress": {**now.__dict__, "eta_seconds": now.eta_seconds}})
        progress(now)

    batch.write_run_record(record)
    try:
        yield tell
    except BatchFailed as failure:
        error = {"code": failure.code, "message": str(failure), "final": True}
        batch.write_run_record(record | {"status": "failed", "error": error}, durable_write=True)
        raise
    except (BatchStopped, KeyboardInterrupt) as stopped:
        error = {"code": "stopped", "message": str(stopped), "final": False}
        batch.write_run_record(record | {"status": "interrupted", "error": error})
        raise
    except BaseException as failure:
        status = "failed" if isinstance(failure, Exception) else "interrupted"
        error = {"code": type(failure).__name__, "message": str(failure)[:4000], "final": False}
        batch.write_run_record(record | {"status": status, "error": error})
        raise
    batch.write_run_record(record | {"status": "completed" if phase == "publish" else "idle"})
