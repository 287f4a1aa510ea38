"""The dispatcher: keeps the engine fed from the first line to the last, and hands finished rows to the checkpoint.

As many workers as requests may be in flight pull from one iterator, so a new request starts the moment one finishes;
there is no barrier at a chunk's border. Finished rows gather in a buffer that another thread commits. Queues are
bounded in rows and bytes on both sides: the engine waits for a commit only when the disk is the slower one for long.

The event loop runs in a thread of its own. The caller's thread waits and turns an interrupt into a stop, so no
exception lands in the middle of a commit.

What is told elsewhere: `level.py`, how many are in flight; `breaker.py`, an engine out of reach; `suspects.py`, a
request that kills it.
"""

import asyncio
import contextlib
import random
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal

import msgspec

from resources.chunk_store.schema import ChunkRow
from resources.chunk_store.writer import MAX_CHUNK_BYTES
from resources.engine.breaker import Ask, Breaker, EngineGone
from resources.engine.level import Level
from resources.engine.protocol import (
    Engine,
    EngineRequest,
    EngineResponse,
    Load,
    Metered,
    RunningEngine,
    TransportFailure,
)
from resources.engine.rows import answered, unanswered
from resources.engine.suspects import Suspects
from resources.errors import EngineDown

TRANSIENT_STATUS = frozenset({408, 409, 425, 429, 500, 502, 503, 504})
UNSURE_STATUS = frozenset({429, 500, 502, 503, 504})
"""Of these, what an engine (or a gateway before it) also says when it answers nobody."""
MAX_IN_FLIGHT_BYTES = 256 * 1024 * 1024
MAX_USELESS_DEATHS = 2
MAX_QUARANTINED_IN_A_ROW = 5
_COMMITS_WAITING = 2
_ROWS_BETWEEN_YIELDS = 64
_TICK_SECONDS = 0.25
_LOAD_SECONDS = 1.0
_LOAD_TIMEOUT = 10.0
_LONGEST_RETRY_AFTER = 600.0
_SWITCH_SECONDS = 0.0005
"""How long the event loop may keep the interpreter from the committing thread, which needs it for moments at a time.
With Python's 5 ms the commits of a fast engine took half of the run's time (26k rows/s; 40k with this)."""


class Pending(msgspec.Struct, frozen=True, gc=False):
    """A line to be asked. `attempts` is how often it was sent before."""

    line: int
    url: str
    body: bytes
    attempts: int


@dataclass(frozen=True)
class DispatchOptions:
    """`concurrency` is how many requests are in flight; None follows what the engine can take. `request_timeout` is
    None for an engine in this process, which cannot hang. `outage_seconds` is how long an engine may be out of reach
    before the run fails with its rows uncommitted (one of ours is restarted then)."""

    concurrency: int | None
    chunk_rows: int = 1000
    flush_seconds: float = 5
    max_attempts: int = 3
    request_timeout: float | None = 600
    deadline: datetime | None = None
    outage_seconds: float = 300
    backoff_seconds: float = 0.5


@dataclass
class Counts:
    """What this dispatch has done so far. Tokens are those of finished rows, as the engine reported them.

    `lives` are those of an engine that tells its load, one more after each restart. `note` is for people, while an
    engine starts anew.
    """

    finished: int = 0
    failed: int = 0
    truncated: int = 0
    retries: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    in_flight: int = 0
    engine_restarts: int = 0
    quarantined: int = 0
    lives: list["Life"] = field(default_factory=list)
    note: str = ""


@dataclass
class Life:
    """What an engine said when we came and when it was asked last; the tokens of the rows that finished until then
    (`useful`: prompt, completion). `ended` is None while it goes on. In a `shared` one it worked for others too."""

    first: Load
    last: Load
    useful_before: tuple[int, int]
    useful: tuple[int, int] = (0, 0)
    ended: Literal["closed", "crashed"] | None = None
    shared: bool = False


@dataclass
class _Round:
    """Requests that are asked with so many in flight, until the source is dry."""

    source: Iterator[Pending]
    level: Level
    dry: bool = False
    workers: int = 0
    done: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class Dispatcher:
    """One dispatch of many requests to one engine.

    `commit` is called in one other thread with the next rows, and may block.
    """

    def __init__(
        self,
        engine: RunningEngine,
        commit: Callable[[list[ChunkRow]], None],
        options: DispatchOptions,
        *,
        request_id_prefix: str,
    ) -> None:
        self.counts = Counts()
        self._engine = engine
        self._commit = commit
        self._options = options
        self._prefix = request_id_prefix
        self._deadline = options.deadline.timestamp() if options.deadline else None
        self._suspects: Suspects[Pending] = Suspects()
        self._in_flight: dict[int, Pending] = {}
        self._in_flight_bytes = 0
        self._useless_deaths = 0
        self._quarantined_in_a_row = 0
        self._rows: list[ChunkRow] = []
        self._rows_bytes = 0

    def run(
        self, requests: Iterable[Pending], stop: threading.Event, tick: Callable[[Counts], None] = lambda _: None
    ) -> bool:
        """Ask them all; True when the source ran dry, False when `stop` or the deadline came first.

        `tick` is called in this thread every quarter of a second. An exception here (an interrupt, say) aborts what is
        in flight, commits what is finished, and goes on to the caller.

        Raises:
            EngineDown: the engine is gone for good; rows without an answer are not committed.
            EngineStartFailed: it died and did not come up again.
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

    # --- Lives of the engine ------------------------------------------------------------------------------------------

    async def _dispatch(self, source: Iterator[Pending], stop: threading.Event) -> bool:
        self._loop = asyncio.get_running_loop()
        self._commit_slots = asyncio.Semaphore(_COMMITS_WAITING)
        self._drained = asyncio.Event()
        self._commits: set[asyncio.Future[None]] = set()
        self._stopped = self._expired = False
        with ThreadPoolExecutor(1, thread_name_prefix="commit") as self._committer:
            try:
                while True:
                    try:
                        async with self._engine.connect() as engine:
                            await self._life(engine, source, stop)
                        return not (self._stopped or self._expired)
                    except (EngineGone, EngineDown) as death:
                        await self._revive(death)
            finally:
                await self._flush_all()
                await asyncio.gather(*self._commits)

    async def _life(self, engine: Engine, source: Iterator[Pending], stop: threading.Event) -> None:
        """Ask until all is answered, a stop, the deadline, or the engine's death."""
        self._ask = _bounded(engine.ask, self._options.request_timeout)
        self._breaker = Breaker(self._ask, self._options.outage_seconds, self._engine.died)
        self._tasks: set[asyncio.Task[None]] = set()
        self._failure: BaseException | None = None
        self._round = _Round(iter(()), Level(1), dry=True)
        self._life_now: Life | None = None
        await self._note_load(engine)
        try:
            for helper in (self._until(stop), self._breaker.watch(), self._flush_by_time(), self._watch_load(engine)):
                self._start(helper)
            if self._suspects:
                self._start(self._prove_the_engine(self._suspects.any()))
                await self._round_is_done()
            while self._suspects and not self._stopped:
                group = self._suspects.next()
                await self._ask_all(iter(group), Level(len(group)))
                self._suspects.cleared()
            if not self._stopped:
                await self._ask_all(source, Level(self._options.concurrency, self._engine.most_running))
        except (EngineGone, EngineDown):
            self._close_life("crashed")
            raise
        finally:
            tasks = list(self._tasks)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            if self._failure is None:
                await self._note_load(engine)
                self._close_life("closed")

    async def _revive(self, death: Exception) -> None:
        """Find out more about why the engine died, and start it anew. Raises EngineDown where that makes no sense."""
        restart = self._engine.restart
        if restart is None:
            raise EngineDown(str(death)) from None
        lost, self._in_flight = list(self._in_flight.values()), {}
        self._useless_deaths += 1
        if self._useless_deaths > MAX_USELESS_DEATHS or self._quarantined_in_a_row >= MAX_QUARANTINED_IN_A_ROW:
            raise EngineDown(f"The engine dies whatever it is asked. {death}") from None
        guilty = self._suspects.engine_died(lost)
        if guilty is not None:
            self._quarantine(guilty, str(death))
        await self._flush_all()
        self.counts.engine_restarts += 1

        def note(text: str) -> None:
            self.counts.note = f"the engine died and starts anew; {text}"

        await self._loop.run_in_executor(None, restart, note)
        self.counts.note = ""

    async def _prove_the_engine(self, like: Pending) -> None:
        """See that the new engine answers something at all, so that it is right to blame a request."""
        await self._breaker.prove(EngineRequest(like.line, like.url, like.body, f"{self._prefix}-{like.line}"))
        self._useless_deaths = 0
        _settle(self._round.done)

    def _quarantine(self, pending: Pending, why: str) -> None:
        message = f"the engine died twice while this request was alone with it: {why.splitlines()[0][:500]}"
        now = time.time_ns() // 1000
        attempt = pending.attempts + 1
        request_id = f"{self._prefix}-{pending.line}-{attempt}"
        self._finish(unanswered(pending.line, request_id, "engine_crash", message, now, attempt))
        self.counts.quarantined += 1
        self._quarantined_in_a_row += 1

    # --- Requests -----------------------------------------------------------------------------------------------------

    async def _ask_all(self, source: Iterator[Pending], level: Level) -> None:
        self._round = _Round(source, level)
        self._hire()
        await self._round_is_done()

    async def _round_is_done(self) -> None:
        """Wait for it, or for the first task that fails, whose error is raised."""
        if self._failure is None:
            await self._round.done
        if self._failure is not None:
            raise self._failure

    def _hire(self) -> None:
        """Have as many workers as requests are wanted in flight."""
        round_ = self._round
        while not round_.dry and round_.workers < round_.level.now:
            round_.workers += 1
            self._start(self._work(round_))

    def _start(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._failure = self._failure or error
            _settle(self._round.done)

    async def _work(self, round_: _Round) -> None:
        count = 0
        while round_.workers <= round_.level.now:
            pending = None if self._past_deadline() else next(round_.source, None)
            if pending is None:
                self._expired |= self._past_deadline()
                round_.dry = True
                break
            self._in_flight[pending.line] = pending
            size = len(pending.body)
            while self._in_flight_bytes and self._in_flight_bytes + size > MAX_IN_FLIGHT_BYTES:
                self._drained.clear()
                await self._drained.wait()
            self._in_flight_bytes += size
            self.counts.in_flight += 1
            try:
                row = await self._answer(pending)
            finally:
                self._in_flight_bytes -= size
                self.counts.in_flight -= 1
                self._drained.set()
            del self._in_flight[pending.line]
            self._finish(row)
            while self._chunk_is_full():
                await self._flush(self._chunk_is_full)
            count += 1
            if count % _ROWS_BETWEEN_YIELDS == 0:
                await asyncio.sleep(0)
        round_.workers -= 1
        if round_.dry and not round_.workers:
            _settle(round_.done)

    async def _answer(self, pending: Pending) -> ChunkRow:
        """One row, whatever happens to it: retried while that may help, then with its last failure as the answer."""
        options, breaker, sent = self._options, self._breaker, 0
        started = time.time_ns() // 1000
        while True:
            if not breaker.is_closed:
                await breaker.passage()
            sent += 1
            attempt = pending.attempts + sent
            request = EngineRequest(pending.line, pending.url, pending.body, f"{self._prefix}-{pending.line}-{attempt}")
            wait, unsure = 0.0, True
            try:
                response = await self._ask(request)
                row = answered(request, response, started, attempt)
                if response.status not in TRANSIENT_STATUS:
                    breaker.answered()
                    self._useless_deaths = self._quarantined_in_a_row = 0
                    self._round.level.fine()
                    return row
                wait = min(response.retry_after or 0.0, _LONGEST_RETRY_AFTER)
                unsure = response.status in UNSURE_STATUS
                if response.status == 429:
                    self._round.level.too_much()
                elif unsure:
                    breaker.failed(request, f"status {response.status}")
                else:
                    breaker.answered()
            except TimeoutError:
                message = f"no answer within {options.request_timeout:g} s"
                row = unanswered(pending.line, request.request_id, "request_timeout", message, started, attempt)
                self._round.level.too_much()
                breaker.failed(request, message)
            except TransportFailure as failure:
                row = unanswered(
                    pending.line, request.request_id, "connection_error", str(failure)[:500], started, attempt
                )
                breaker.failed(request, str(failure), unreachable=failure.unreachable)
                if failure.unreachable:
                    sent -= 1
                    await asyncio.sleep(options.backoff_seconds * random.uniform(0.5, 1))
                    continue
            if sent >= options.max_attempts or self._past_deadline():
                if not unsure or await breaker.is_there(request):
                    return row
                sent -= 1
                continue
            self.counts.retries += 1
            backoff = min(options.backoff_seconds * 2 ** min(sent, 6), 30) * random.uniform(0.5, 1)
            await asyncio.sleep(max(wait, backoff))

    def _past_deadline(self) -> bool:
        return self._deadline is not None and time.time() >= self._deadline

    def _finish(self, row: ChunkRow) -> None:
        self._rows.append(row)
        self._rows_bytes += row.nbytes
        counts = self.counts
        counts.finished += 1
        counts.failed += row.failed
        counts.truncated += row.finish_reason == "length"
        counts.prompt_tokens += row.prompt_tokens or 0
        counts.completion_tokens += row.completion_tokens or 0

    # --- Commits ------------------------------------------------------------------------------------------------------

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

    async def _flush_all(self) -> None:
        while self._rows:
            await self._flush()

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

    # --- Beside the requests ------------------------------------------------------------------------------------------

    async def _until(self, stop: threading.Event) -> None:
        while not stop.is_set():
            await asyncio.sleep(0.1)
        self._stopped = True
        _settle(self._round.done)

    async def _watch_load(self, engine: Engine) -> None:
        """Have as many requests in flight as the engine can take."""
        while self._life_now is not None:
            await asyncio.sleep(_LOAD_SECONDS)
            await self._note_load(engine)
            self._round.level.follow(self._life_now.last, self.counts.in_flight)
            self._hire()

    async def _note_load(self, engine: Engine) -> None:
        """Ask the engine how it is, where it is one that tells."""
        load = None
        if isinstance(engine, Metered):
            with contextlib.suppress(TransportFailure, TimeoutError):
                async with asyncio.timeout(_LOAD_TIMEOUT):
                    load = await engine.load()
        if load is None:
            return
        counts = self.counts
        if self._life_now is None:
            self._life_now = Life(load, load, (counts.prompt_tokens, counts.completion_tokens))
            counts.lives.append(self._life_now)
        self._life_now.last = load
        self._life_now.shared |= self._engine.shared()
        self._note_useful()

    def _note_useful(self) -> None:
        if self._life_now is not None:
            before, counts = self._life_now.useful_before, self.counts
            self._life_now.useful = (counts.prompt_tokens - before[0], counts.completion_tokens - before[1])

    def _close_life(self, how: Literal["closed", "crashed"]) -> None:
        if self._life_now is not None:
            self._note_useful()
            self._life_now.ended = how


def _settle(done: asyncio.Future[None]) -> None:
    if not done.done():
        done.set_result(None)


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
