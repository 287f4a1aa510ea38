"""The dispatcher: keeps the engine fed from the first line to the last, and hands finished rows to the checkpoint.

As many workers as requests may be in flight pull from one iterator, so a new request starts the moment one finishes;
there is no barrier at a chunk's border. Finished rows gather in a buffer that another thread commits. Queues are
bounded in rows and bytes on both sides: the engine waits for a commit only when the disk is the slower one for long.

The event loop runs in a thread of its own. The caller's thread waits and turns an interrupt into a stop, so no
exception lands in the middle of a commit.
"""

import asyncio
import random
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from datetime import datetime

import msgspec

from resources.batch_format.answers import one_line, summarize
from resources.chunk_store.schema import ChunkRow, is_success
from resources.chunk_store.writer import MAX_CHUNK_BYTES
from resources.engine.protocol import Engine, EngineRequest, EngineResponse, TransportFailure
from resources.errors import EngineDown

TRANSIENT_STATUS = frozenset({408, 409, 425, 429, 500, 502, 503, 504})
GATEWAY_STATUS = frozenset({429, 502, 503, 504})
"""Of these, what a gateway says for an engine that is not there, or not for us: no word about the request itself."""
MAX_IN_FLIGHT_BYTES = 256 * 1024 * 1024
_MAX_INT8 = 127
_COMMITS_WAITING = 2
_ROWS_BETWEEN_YIELDS = 64
_TICK_SECONDS = 0.25
_LONGEST_RETRY_AFTER = 600.0
_SWITCH_SECONDS = 0.0005
"""How long the event loop may keep the interpreter from the committing thread, which needs it for moments at a time.
With Python's 5 ms the commits of a fast engine took half of the run's time (26k rows/s; 40k with this)."""


Ask = Callable[[EngineRequest], Awaitable[EngineResponse]]


class Pending(msgspec.Struct, frozen=True, gc=False):
    """A line to be asked. `attempts` is how often it was sent before."""

    line: int
    url: str
    body: bytes
    attempts: int


@dataclass(frozen=True)
class DispatchOptions:
    """`request_timeout` is None for an engine in this process, which cannot hang. `outage_seconds` is how long an
    engine may be out of reach before the run fails with its rows uncommitted."""

    concurrency: int
    chunk_rows: int = 1000
    flush_seconds: float = 5
    max_attempts: int = 3
    request_timeout: float | None = 600
    deadline: datetime | None = None
    outage_seconds: float = 300
    backoff_seconds: float = 0.5


@dataclass
class Counts:
    """What this dispatch has done so far. Tokens are those the engine reported."""

    finished: int = 0
    failed: int = 0
    truncated: int = 0
    retries: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    in_flight: int = 0


class Dispatcher:
    """One dispatch of many requests to one engine.

    `connect` opens the engine inside the event loop. `commit` is called in one other thread with the next rows, and may
    block. `died` tells why an engine that we own is gone, None while it lives.
    """

    def __init__(
        self,
        connect: Callable[[], AbstractAsyncContextManager[Engine]],
        commit: Callable[[list[ChunkRow]], None],
        options: DispatchOptions,
        *,
        request_id_prefix: str,
        died: Callable[[], str | None] = lambda: None,
    ) -> None:
        self.counts = Counts()
        self._connect = connect
        self._commit = commit
        self._options = options
        self._prefix = request_id_prefix
        self._reach = _Reach(options, died)
        self._deadline = options.deadline.timestamp() if options.deadline else None
        self._rows: list[ChunkRow] = []
        self._rows_bytes = 0
        self._in_flight_bytes = 0

    def run(
        self, requests: Iterable[Pending], stop: threading.Event, tick: Callable[[Counts], None] = lambda _: None
    ) -> bool:
        """Ask them all; True when the source ran dry, False when `stop` or the deadline came first.

        `tick` is called in this thread every quarter of a second. An exception here (an interrupt, say) aborts what is
        in flight, commits what is finished, and goes on to the caller.

        Raises:
            EngineDown: the engine is gone; rows without an answer are not committed.
        """
        outcome: list[bool | BaseException] = []
        finished = threading.Event()

        def loop_thread() -> None:
            try:
                outcome.append(asyncio.run(self._dispatch(iter(requests), stop)))
            except BaseException as error:
                outcome.append(error)
            finally:
                finished.set()

        thread = threading.Thread(target=loop_thread, name="dispatcher", daemon=True)
        switch_before = sys.getswitchinterval()
        sys.setswitchinterval(_SWITCH_SECONDS)
        thread.start()
        try:
            while not finished.wait(_TICK_SECONDS):
                tick(self.counts)
        finally:
            if not finished.is_set():
                stop.set()
            _join(thread)
            sys.setswitchinterval(switch_before)
        if isinstance(outcome[0], BaseException):
            raise outcome[0]
        tick(self.counts)
        return outcome[0]

    async def _dispatch(self, source: Iterator[Pending], stop: threading.Event) -> bool:
        self._loop = asyncio.get_running_loop()
        self._commit_slots = asyncio.Semaphore(_COMMITS_WAITING)
        self._drained = asyncio.Event()
        self._commits: set[asyncio.Future[None]] = set()
        self._expired = False
        with ThreadPoolExecutor(1, thread_name_prefix="commit") as self._committer:
            async with self._connect() as engine:
                ask = _bounded(engine.ask, self._options.request_timeout)
                workers = [asyncio.create_task(self._work(ask, source)) for _ in range(self._options.concurrency)]
                helpers = [asyncio.create_task(self._flush_by_time()), asyncio.create_task(_until(stop))]
                try:
                    complete = await self._until_done(workers, helpers)
                finally:
                    for task in [*workers, *helpers]:
                        task.cancel()
                    await asyncio.gather(*workers, *helpers, return_exceptions=True)
                    while self._rows:
                        await self._flush()
                    await asyncio.gather(*self._commits)
        return complete

    async def _until_done(self, workers: list[asyncio.Task[None]], helpers: list[asyncio.Task[None]]) -> bool:
        """Whether all was asked: False when a stop or the deadline came first. Raises the first error of any task."""
        pending: set[asyncio.Task[None]] = {*workers, *helpers}
        _, stopper = helpers
        while not stopper.done() and any(not worker.done() for worker in workers):
            finished, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            for task in finished:
                task.result()
        return all(worker.done() for worker in workers) and not self._expired

    async def _work(self, ask: Ask, source: Iterator[Pending]) -> None:
        for count, pending in enumerate(source, 1):
            if self._past_deadline():
                self._expired = True
                return
            size = len(pending.body)
            while self._in_flight_bytes and self._in_flight_bytes + size > MAX_IN_FLIGHT_BYTES:
                self._drained.clear()
                await self._drained.wait()
            self._in_flight_bytes += size
            self.counts.in_flight += 1
            try:
                row = await self._answer(ask, pending)
            finally:
                self._in_flight_bytes -= size
                self.counts.in_flight -= 1
                self._drained.set()
            self._count(row)
            self._rows.append(row)
            self._rows_bytes += row.nbytes
            while self._chunk_is_full():
                await self._flush(self._chunk_is_full)
            if count % _ROWS_BETWEEN_YIELDS == 0:
                await asyncio.sleep(0)

    async def _answer(self, ask: Ask, pending: Pending) -> ChunkRow:
        """One row, whatever happens to it: retried while that may help, then with its last failure as the answer."""
        options, reach, sent = self._options, self._reach, 0
        started = time.time_ns() // 1000
        while True:
            sent += 1
            attempt = pending.attempts + sent
            request = EngineRequest(pending.line, pending.url, pending.body, f"{self._prefix}-{pending.line}-{attempt}")
            wait = None
            tried_at = time.monotonic()
            try:
                response = await ask(request)
                row = _answered(request, response, started, attempt)
                if response.status not in TRANSIENT_STATUS:
                    reach.answered(request)
                    return row
                wait = response.retry_after
                if response.status not in GATEWAY_STATUS:
                    reach.answered(None)
                elif sent >= options.max_attempts and not await reach.answers_others(ask, tried_at):
                    reach.failed()
                    sent -= 1
                    await reach.wait(f"status {response.status}")
                    continue
            except TimeoutError:
                message = f"no answer within {options.request_timeout:g} s"
                row = _unanswered(request, "request_timeout", message, started, attempt)
            except TransportFailure as failure:
                row = _unanswered(request, "connection_error", str(failure)[:500], started, attempt)
                reach.failed()
                given_up = sent >= options.max_attempts and not failure.unreachable
                if failure.unreachable or (given_up and not await reach.answers_others(ask, tried_at)):
                    sent -= 1
                    await reach.wait(str(failure))
                    continue
            if sent >= options.max_attempts or self._past_deadline():
                return row
            self.counts.retries += 1
            backoff = min(options.backoff_seconds * 2 ** min(sent, 6), 30) * random.uniform(0.5, 1)
            await asyncio.sleep(max(min(wait or 0, _LONGEST_RETRY_AFTER), backoff))

    def _past_deadline(self) -> bool:
        return self._deadline is not None and time.time() >= self._deadline

    def _count(self, row: ChunkRow) -> None:
        counts = self.counts
        counts.finished += 1
        counts.failed += row.failed
        counts.truncated += row.finish_reason == "length"
        counts.prompt_tokens += row.prompt_tokens or 0
        counts.completion_tokens += row.completion_tokens or 0

    def _chunk_is_full(self) -> bool:
        return len(self._rows) >= self._options.chunk_rows or self._rows_bytes >= MAX_CHUNK_BYTES

    async def _flush(self, still_wanted: Callable[[], bool] = lambda: True) -> None:
        """Hand the next rows to the committer; waits only while too many commits are waiting already.

        `still_wanted` is asked after the wait: several workers may have come for the same rows."""
        await self._commit_slots.acquire()
        rows = _next_chunk(self._rows, self._options.chunk_rows) if still_wanted() else []
        if not rows:
            self._commit_slots.release()
            return
        self._rows = self._rows[len(rows) :]
        self._rows_bytes = sum(row.nbytes for row in self._rows)
        commit = self._loop.run_in_executor(self._committer, self._commit, rows)
        self._commits.add(commit)
        commit.add_done_callback(lambda _: self._commit_slots.release())

    async def _flush_by_time(self) -> None:
        """Commit what finished in the last `flush_seconds`, and notice a commit that failed."""
        step = min(self._options.flush_seconds, 0.5)
        next_flush = time.monotonic() + self._options.flush_seconds
        while True:
            await asyncio.sleep(step)
            for commit in [c for c in self._commits if c.done()]:
                self._commits.discard(commit)
                commit.result()
            if time.monotonic() >= next_flush:
                next_flush = time.monotonic() + self._options.flush_seconds
                if self._rows:
                    await self._flush()


class _Reach:
    """Tells one request's bad luck from an engine that is out of reach.

    A line without an answer gets an error row only when the engine has shown since that it answers others: by itself,
    or asked again for something that it answered before. Otherwise nothing counts, all wait, longer each time, and
    after `outage_seconds` the run fails, rather than a million rows with the same error.
    """

    def __init__(self, options: DispatchOptions, died: Callable[[], str | None]) -> None:
        self._limit = options.outage_seconds
        self._died = died
        self._probing = asyncio.Lock()
        self._answered: EngineRequest | None = None
        self._answered_at = 0.0
        self._lost_at: float | None = None

    def answered(self, request: EngineRequest | None) -> None:
        """Note an answer; `request` where it can be asked again to see whether the engine is there."""
        self._answered = request or self._answered
        self._answered_at, self._lost_at = time.monotonic(), None

    def failed(self) -> None:
        """Note a failure. Raises EngineDown where an engine that we own is gone."""
        gone = self._died()
        if gone:
            raise EngineDown(gone)
        self._lost_at = self._lost_at or time.monotonic()

    async def answers_others(self, ask: Ask, since: float) -> bool:
        """Whether the engine has answered anything since then; asks it, where nothing else tells."""
        async with self._probing:
            if self._answered_at > since:
                return True
            if self._answered is None:
                return False
            probe = msgspec.structs.replace(self._answered, request_id=f"{self._answered.request_id}-probe")
            try:
                response = await ask(probe)
            except (TransportFailure, TimeoutError):
                return False
            if response.status in GATEWAY_STATUS:
                return False
            self.answered(None)
            return True

    async def wait(self, failure: str) -> None:
        """Wait half as long as the engine has been away, within bounds. Raises EngineDown where that is too long."""
        away = time.monotonic() - (self._lost_at or time.monotonic())
        if away > self._limit:
            raise EngineDown(f"The engine has been out of reach for {self._limit:g} s ({failure}).")
        await asyncio.sleep(min(max(away / 2, 0.5), self._limit / 4, 16) * random.uniform(0.5, 1))


class _ErrorDetail(msgspec.Struct):
    message: str | None = None


class _ErrorBody(msgspec.Struct):
    error: _ErrorDetail | None = None
    message: str | None = None


_decode_error = msgspec.json.Decoder(_ErrorBody).decode


def _answered(request: EngineRequest, response: EngineResponse, started: int, attempt: int) -> ChunkRow:
    try:
        body = one_line(response.body)
        body.decode()
    except (msgspec.DecodeError, UnicodeDecodeError):
        raise TransportFailure("the answer is not JSON in UTF-8") from None
    summary = summarize(body)
    refused = not is_success(response.status)
    return ChunkRow(
        request.line,
        response.status,
        response.request_id,
        body,
        summary.finish_reason,
        f"http_{response.status}" if refused else None,
        _refusal(body) if refused else None,
        summary.prompt_tokens,
        summary.completion_tokens,
        summary.cached_tokens,
        started,
        time.time_ns() // 1000,
        min(attempt, _MAX_INT8),
    )


def _refusal(body: bytes) -> str | None:
    try:
        error = _decode_error(body)
    except msgspec.DecodeError:
        return None
    message = error.error.message if error.error else error.message
    return message[:2000] if message else None


def _unanswered(request: EngineRequest, code: str, message: str, started: int, attempt: int) -> ChunkRow:
    now = time.time_ns() // 1000
    return ChunkRow(
        request.line, None, request.request_id, None, None, code, message, None, None, None, started, now,
        min(attempt, _MAX_INT8),
    )  # fmt: skip


def _next_chunk(rows: list[ChunkRow], most: int) -> list[ChunkRow]:
    size = 0
    for count, row in enumerate(rows[:most]):
        size += row.nbytes
        if size > MAX_CHUNK_BYTES and count:
            return rows[:count]
    return rows[:most]


def _join(thread: threading.Thread) -> None:
    """Wait for the last commit, through further interrupts: after us the batch's lock is let go."""
    interrupt: BaseException | None = None
    while thread.is_alive():
        try:
            thread.join()
        except BaseException as error:
            interrupt = error
    if interrupt is not None:
        raise interrupt


def _bounded(ask: Ask, seconds: float | None) -> Ask:
    if seconds is None:
        return ask

    async def bounded(request: EngineRequest) -> EngineResponse:
        async with asyncio.timeout(seconds):
            return await ask(request)

    return bounded


async def _until(stop: threading.Event) -> None:
    while not stop.is_set():
        await asyncio.sleep(0.1)
