"""One model's share of a batch: what is left to ask, asked, committed."""

import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Any

from resources.batch_store.batch import Batch
from resources.batch_store.duplicates import Duplicates
from resources.batch_store.ordering import rows_to_ask
from resources.batch_store.requests import RequestsSummary, lines_of, valid_rows
from resources.chunk_store.generation import Committed, Generation
from resources.chunk_store.ledger import Booking, Ledger, Tokens, booking
from resources.chunk_store.retry import ERRORS, Retry
from resources.chunk_store.schema import ChunkRow
from resources.chunk_store.writer import ChunkWriter
from resources.engine.catalog import ModelEntry
from resources.engine.dispatcher import Counts, Dispatcher, DispatchOptions, Pending
from resources.engine.factory import EngineStarter
from resources.engine.transform import body_transform
from resources.errors import BatchStopped, CheckpointError
from resources.progress import Progress, ProgressCallback
from resources.structured_outputs import AskedSchemas

OUTAGE_SECONDS = 300.0
"""How long an engine may be out of reach before the run fails."""


class Mode(StrEnum):
    """resume: ask what has no row, and go on with what was begun. retry_failed: ask again what is chosen of the failed
    lines, too. restart: ask everything anew, beside the answers that are there, which stay published until it is done.
    """

    RESUME = "resume"
    RETRY_FAILED = "retry_failed"
    RESTART = "restart"


@dataclass
class ModelReport:
    """What happened to one model's lines in a call of `answer`. `asked` counts lines that were sent in this call, and
    `copied` those that got the answer of one that was. The other counts are of what was sent."""

    model: str
    engine: str
    generation: str
    total: int
    asked: int = 0
    copied: int = 0
    failed: int = 0
    truncated: int = 0
    retries: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    seconds: float = 0.0
    load_seconds: float = 0.0
    warm: bool = False
    """The server was up when we came."""
    woken: bool = False
    """The server slept when we came; `load_seconds` is what it took to wake."""
    swaps: int = 0
    """Servers of other models that were stopped, or put to sleep, to make room."""
    engine_restarts: int = 0
    quarantined: int = 0
    tokens: Booking | None = None
    """Of all runs of this generation; None where the engine does not tell what it made."""

    @property
    def tokens_per_second(self) -> float:
        return self.completion_tokens / self.seconds if self.seconds > 0 else 0.0

    @property
    def start(self) -> str:
        """How its engine came up, for people."""
        if not self.asked and not self.load_seconds:
            return "not needed"
        if self.warm or not self.load_seconds:
            return "warm" if self.warm else self.engine
        return f"{'woken' if self.woken else 'cold, loaded'} in {self.load_seconds:.1f} s"

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"tokens_per_second": round(self.tokens_per_second, 1)}


def set_aside_damaged(batch: Batch, generation: Generation) -> list[Path]:
    """Move the damaged chunks of a generation out of the way; where they are now.

    A line in them may have an earlier row elsewhere, of an attempt that failed, which would pass for its answer from
    now on. So failed lines are asked again too, and that is noted before the chunks go.
    """
    damaged = generation.damaged()
    work = batch.work()
    if damaged and work.mode != Mode.RESTART:
        chosen = work.retry.failures if work.retry else frozenset()
        batch.set_work(work.restarts, Mode.RETRY_FAILED, Retry(ERRORS | chosen))
    return [generation.set_aside(number) for number in damaged]


class Answering:
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
        self._generation = Generation.of(batch.results_dir, entry, batch.work().restarts)

    def run(
        self, retry: Retry | None, tell: ProgressCallback, finished_before: int
    ) -> tuple[ModelReport, Committed, bool]:
        """The report, what is committed now, and whether every line has a row (False: the deadline passed)."""
        generation, entry = self._generation, self._entry
        if set_aside_damaged(self._batch, generation):
            retry = self._batch.work().retry or Retry(ERRORS)
        generation.remove_superseded()
        mine = lines_of(self._batch.requests_dir, entry.name, self._summary.last_line)
        state = generation.committed(self._summary.last_line, retry)
        state.only(mine)
        report = ModelReport(entry.name, str(entry.engine), generation.name, self._total)
        wanted = (state.attempts == 0) | state.chosen
        deadline = self._batch.deadline()
        if not (wanted & mine).any():
            return report, state, True
        if deadline is not None and datetime.now(UTC) >= deadline:
            return report, state, state.done == self._total
        generation.start(entry)
        complete = self._dispatch(state, wanted, report, deadline, tell, finished_before)
        state = generation.committed(self._summary.last_line)
        state.only(mine)
        if self._stop.is_set() and not complete:
            raise BatchStopped(f"{self._batch.key}: stopped with {state.done} of {self._total} lines answered.")
        report.tokens = booking(generation.folder, _tokens(state))
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
        writer = ChunkWriter(self._generation, state, options.chunk_rows, self._batch.ensure_locked)
        ledger = Ledger(self._generation.folder, _tokens(state))
        done, failed_before = state.done, state.failures
        total = sum(self._summary.models.values())
        attempts = state.attempts
        asked_schemas = AskedSchemas()
        duplicates = None
        if options.dedupe:
            rows = valid_rows(self._batch.requests_dir, entry.name, wanted)
            duplicates = Duplicates((line, url, transform(body)) for line, url, body in rows)
            wanted[duplicates.followers] = False

        def requests() -> Iterator[Pending]:
            rows = rows_to_ask(self._batch.requests_dir, entry.name, wanted, options.order, transform)
            for line, url, body in rows:
                sent = transform(body)
                asked_schemas.note(line, url, sent)
                yield Pending(line, url, sent, int(attempts[line]))

        def commit(rows: list[ChunkRow]) -> None:
            rows = asked_schemas.judge(rows)
            if duplicates is None:
                writer.commit(rows)
            else:
                duplicates.commit(rows, attempts, options.chunk_rows, writer.commit)

        def waiting(note: str) -> None:
            tell(Progress("answer", finished_before + done, total, failed_before, note=note))

        with self._engines.start(entry, self._stop, waiting) as engine:
            report.load_seconds, report.swaps = engine.load_seconds, len(engine.replaced)
            report.warm, report.woken = engine.warm, engine.woken
            dispatcher = Dispatcher(
                engine,
                commit,
                DispatchOptions(
                    concurrency=entry.concurrency,
                    chunk_rows=options.chunk_rows,
                    flush_seconds=options.flush_seconds,
                    max_attempts=options.max_attempts,
                    request_timeout=None if engine.in_process else options.request_timeout,
                    deadline=deadline,
                    outage_seconds=OUTAGE_SECONDS,
                ),
                request_id_prefix=self._batch.spec.identity[:12],
            )
            started = time.monotonic()

            def tick(counts: Counts) -> None:
                seconds = max(time.monotonic() - started, 1e-6)
                ledger.note(counts.lives)
                copied, copies_failed = (duplicates.copied, duplicates.copies_failed) if duplicates else (0, 0)
                finished = counts.finished + copied
                tell(
                    Progress(
                        "answer",
                        min(finished_before + done + finished, total),
                        total,
                        failed_before + counts.failed + copies_failed,
                        counts.completion_tokens / seconds,
                        finished / seconds,
                        note=counts.note,
                    )
                )

            try:
                return dispatcher.run(requests(), self._stop, tick)
            finally:
                report.seconds = time.monotonic() - started
                counts = dispatcher.counts
                report.asked, report.failed = counts.finished, counts.failed
                report.copied = duplicates.copied if duplicates else 0
                report.truncated, report.retries = counts.truncated, counts.retries
                report.engine_restarts, report.quarantined = counts.engine_restarts, counts.quarantined
                report.prompt_tokens, report.completion_tokens = counts.prompt_tokens, counts.completion_tokens
                writer.finish()
                ledger.note(counts.lives, durable_write=True)


def _tokens(state: Committed) -> Tokens:
    """What the rows of a generation cost, superseded ones included."""
    return Tokens(state.prompt_tokens, state.completion_tokens)
