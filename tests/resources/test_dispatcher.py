"""The dispatcher: an engine that is kept fed, and what becomes of a request that fails."""

import asyncio
import contextlib
import itertools
import math
import statistics
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from resources.chunk_store.schema import ChunkRow
from resources.engine.dispatcher import Counts, Dispatcher, DispatchOptions, Pending
from resources.engine.protocol import EngineRequest, EngineResponse, RunningEngine, TransportFailure
from resources.errors import EngineDown, EngineStartFailed
from tests.helpers import CHAT, FakeEngine, completion, ok, refusal

OPTIONS: dict[str, Any] = {"concurrency": 4, "chunk_rows": 10, "backoff_seconds": 0.001, "request_timeout": 30}


def lines(count: int, body: bytes = b"{}", attempts: int = 0) -> list[Pending]:
    return [Pending(line, CHAT, body, attempts) for line in range(1, count + 1)]


@dataclass
class Dispatch:
    """One dispatch, and what it committed. `run` gives what the dispatcher gives."""

    engine: FakeEngine
    chunks: list[list[ChunkRow]] = field(default_factory=list)
    counts: Counts = field(default_factory=Counts)
    stop: threading.Event = field(default_factory=threading.Event)

    def run(
        self,
        requests: Iterable[Pending],
        *,
        commit: Callable[[list[ChunkRow]], None] | None = None,
        died: Callable[[], str | None] = lambda: None,
        restart: Callable[[Callable[[str], None]], None] | None = None,
        tick: Callable[[Counts], None] = lambda _: None,
        **options: Any,
    ) -> bool:
        dispatcher = Dispatcher(
            RunningEngine(self.engine.connect, died=died, restart=restart),
            commit or self.chunks.append,
            DispatchOptions(**{**OPTIONS, **options}),
            request_id_prefix="b",
        )
        self.counts = dispatcher.counts
        return dispatcher.run(requests, self.stop, tick)

    @property
    def rows(self) -> dict[int, ChunkRow]:
        found = [row for chunk in self.chunks for row in chunk]
        assert len({row.line for row in found}) == len(found), "a line was committed twice"
        return {row.line: row for row in found}


async def hang(_: EngineRequest) -> EngineResponse:
    await asyncio.Event().wait()
    raise AssertionError


def failing(error: Exception) -> Callable[[EngineRequest], EngineResponse]:
    def reply(_: EngineRequest) -> EngineResponse:
        raise error

    return reply


# --- Keeping the engine fed -----------------------------------------------------------------------------------------


def test_every_line_is_asked_once_and_committed_once() -> None:
    dispatch = Dispatch(FakeEngine())
    assert dispatch.run(lines(95))
    assert sorted(dispatch.engine.lines) == sorted(dispatch.rows) == list(range(1, 96))
    assert max(len(chunk) for chunk in dispatch.chunks) == 10
    assert (dispatch.counts.finished, dispatch.counts.failed, dispatch.counts.in_flight) == (95, 0, 0)
    assert (dispatch.counts.prompt_tokens, dispatch.counts.completion_tokens) == (285, 190)
    row = dispatch.rows[7]
    assert (row.status_code, row.request_id, row.attempt, row.error_code) == (200, "b-7-1", 1, None)
    assert (row.response, row.started_at <= row.finished_at) == (completion(), True)


def test_nothing_to_ask_is_done_at_once() -> None:
    dispatch = Dispatch(FakeEngine())
    assert dispatch.run([])
    assert dispatch.chunks == []


def test_one_slow_request_holds_up_neither_commits_nor_the_others() -> None:
    dispatch = Dispatch(FakeEngine())
    committed_before_the_slow_one: list[int] = []

    async def reply(request: EngineRequest) -> EngineResponse:
        if request.line == 1:
            while len(dispatch.chunks) < 15:
                await asyncio.sleep(0.001)
            committed_before_the_slow_one.append(len(dispatch.chunks))
        else:
            await asyncio.sleep(0.001)
        return ok(request)

    dispatch.engine.reply = reply
    assert dispatch.run(lines(200), concurrency=8)
    assert committed_before_the_slow_one[0] >= 15
    levels = dispatch.engine.levels[8:]
    assert statistics.median(levels) == 8
    assert sum(level < 6 for level in levels) < len(levels) / 20
    assert max(levels) == 8
    assert sorted(dispatch.rows) == list(range(1, 201))


def test_source_is_read_as_it_is_needed_and_not_before() -> None:
    read: list[int] = []

    def source() -> Iterable[Pending]:
        for pending in lines(50):
            read.append(pending.line)
            yield pending

    dispatch = Dispatch(FakeEngine(lambda request: ahead.append(len(read) - len(dispatch.rows)) or ok(request)))
    ahead: list[int] = []
    assert dispatch.run(source(), chunk_rows=1)
    assert max(ahead) < 20


def test_what_finished_is_committed_after_a_while_though_no_chunk_is_full() -> None:
    dispatch = Dispatch(FakeEngine())

    async def reply(request: EngineRequest) -> EngineResponse:
        while request.line > 3 and not dispatch.chunks:
            await asyncio.sleep(0.005)
        return ok(request)

    dispatch.engine.reply = reply
    assert dispatch.run(lines(6), chunk_rows=1000, flush_seconds=0.05)
    assert [row.line for row in dispatch.chunks[0]] == [1, 2, 3]


def test_requests_in_flight_are_bounded_in_bytes() -> None:
    engine = FakeEngine(lambda request: _later(request, 0.002))
    assert Dispatch(engine).run(lines(12, body=bytes(100 * 1024 * 1024)), concurrency=8)
    assert max(engine.levels) == 2


def test_request_over_the_bound_goes_alone() -> None:
    engine = FakeEngine(lambda request: _later(request, 0.002))
    huge = bytes(300 * 1024 * 1024)
    assert Dispatch(engine).run(lines(3, body=huge), concurrency=8)
    assert max(engine.levels) == 1


async def _later(request: EngineRequest, seconds: float) -> EngineResponse:
    await asyncio.sleep(seconds)
    return ok(request)


def test_chunks_are_bounded_in_bytes() -> None:
    body = completion("x" * 20_000_000)
    dispatch = Dispatch(FakeEngine(lambda request: EngineResponse(200, body, "id")))
    assert dispatch.run(lines(8), chunk_rows=1000)
    assert max(len(chunk) for chunk in dispatch.chunks) == 3
    assert len(dispatch.rows) == 8


# --- Requests that fail ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fault",
    [
        *(refusal(status) for status in (408, 409, 425, 429, 500, 502, 503, 504)),
        TransportFailure("reset"),
        TimeoutError(),
        EngineResponse(200, b'{"text":"\xff"}', "id"),
        EngineResponse(200, b'{"text":\n', "id"),
    ],
    ids=str,
)
def test_transient_fault_is_asked_again(fault: EngineResponse | Exception) -> None:
    seen: Counter[int] = Counter()

    def reply(request: EngineRequest) -> EngineResponse:
        seen[request.line] += 1
        if request.line == 2 and seen[2] < 3:
            if isinstance(fault, Exception):
                raise fault
            return fault
        return ok(request)

    dispatch = Dispatch(FakeEngine(reply))
    assert dispatch.run(lines(5))
    assert [row.status_code for row in dispatch.rows.values()] == [200] * 5
    assert (dispatch.rows[2].attempt, dispatch.rows[1].attempt, dispatch.counts.retries) == (3, 1, 2)
    assert [request.request_id for request in dispatch.engine.asked if request.line == 2] == ["b-2-1", "b-2-2", "b-2-3"]


@pytest.mark.parametrize("status", [400, 401, 403, 404, 413, 422, 501])
def test_refusal_is_the_answer_of_its_line(status: int) -> None:
    engine = FakeEngine(lambda request: refusal(status, "too long") if request.line == 2 else ok(request))
    dispatch = Dispatch(engine)
    assert dispatch.run(lines(3))
    row = dispatch.rows[2]
    assert (row.status_code, row.error_code, row.error_message) == (status, f"http_{status}", "too long")
    assert (row.failed, row.request_id, row.response) == (True, "engine-1", b'{"error": {"message": "too long"}}')
    assert Counter(engine.lines)[2] == 1
    assert (dispatch.counts.failed, dispatch.counts.finished) == (1, 3)


@pytest.mark.parametrize(
    ("fault", "code"),
    [
        (TransportFailure("cut short"), "connection_error"),
        (TimeoutError(), "request_timeout"),
    ],
)
def test_line_that_never_gets_an_answer_is_a_row_with_the_reason(fault: Exception, code: str) -> None:
    def reply(request: EngineRequest) -> EngineResponse:
        if request.line == 2:
            raise fault
        return ok(request)

    dispatch = Dispatch(FakeEngine(reply))
    assert dispatch.run(lines(3, attempts=2), max_attempts=3)
    row = dispatch.rows[2]
    assert (row.status_code, row.response, row.error_code, row.attempt) == (None, None, code, 5)
    assert row.error_message
    assert Counter(dispatch.engine.lines)[2] == 3


def test_last_answer_stands_when_attempts_are_used_up() -> None:
    dispatch = Dispatch(FakeEngine(lambda request: refusal(500, "busy") if request.line else ok(request)))
    assert dispatch.run(lines(2), max_attempts=4)
    assert sum(request.line > 0 for request in dispatch.engine.asked) == 8
    assert {(row.status_code, row.error_message, row.attempt) for row in dispatch.rows.values()} == {(500, "busy", 4)}


def test_gateway_without_an_engine_behind_it_fails_the_run_and_not_its_lines() -> None:
    dispatch = Dispatch(FakeEngine(lambda request: refusal(503, "no upstream")))
    with pytest.raises(EngineDown, match="status 503"):
        dispatch.run(lines(50), concurrency=8, outage_seconds=0.3)
    assert dispatch.rows == {}


def test_line_that_a_gateway_refuses_while_others_are_answered_gets_that_answer() -> None:
    dispatch = Dispatch(FakeEngine(lambda request: refusal(504, "too slow") if request.line == 9 else ok(request)))
    assert dispatch.run(lines(9), concurrency=2, max_attempts=2, outage_seconds=0.3)
    assert [row.status_code for _, row in sorted(dispatch.rows.items())] == [200] * 8 + [504]


def test_redirect_is_no_answer() -> None:
    dispatch = Dispatch(FakeEngine(lambda request: refusal(302, "elsewhere")))
    assert dispatch.run(lines(1))
    assert dispatch.rows[1].failed
    assert dispatch.rows[1].error_code == "http_302"


def test_waits_grow_between_attempts() -> None:
    times: list[float] = []

    def reply(request: EngineRequest) -> EngineResponse:
        if not request.line:
            return ok(request)
        times.append(time.monotonic())
        return refusal(500)

    Dispatch(FakeEngine(reply)).run(lines(1), backoff_seconds=0.04)
    first, second = (later - earlier for earlier, later in itertools.pairwise(times))
    assert first >= 0.04
    assert second >= 0.08


def test_engine_is_given_the_time_it_asks_for() -> None:
    times: list[float] = []

    def reply(request: EngineRequest) -> EngineResponse:
        times.append(time.monotonic())
        return refusal(429, retry_after=0.3) if len(times) == 1 else ok(request)

    assert Dispatch(FakeEngine(reply)).run(lines(1))
    assert times[1] - times[0] >= 0.3


def test_request_that_hangs_is_given_up_and_leaves_nothing_running() -> None:
    engine = FakeEngine(lambda request: hang(request) if request.line == 2 else ok(request))
    dispatch = Dispatch(engine)
    assert dispatch.run(lines(3), request_timeout=0.05, max_attempts=2)
    assert dispatch.rows[2].error_code == "request_timeout"
    assert Counter(engine.lines)[2] == 2
    assert engine.in_flight == 0


# --- An engine that is out of reach ---------------------------------------------------------------------------------


def test_engine_that_stays_away_fails_the_run_and_not_its_lines() -> None:
    dispatch = Dispatch(FakeEngine(failing(TransportFailure("refused"))))
    with pytest.raises(EngineDown, match=r"out of reach for 0.2 s \(refused"):
        dispatch.run(lines(500), concurrency=8, outage_seconds=0.2)
    assert dispatch.rows == {}
    assert set(dispatch.engine.lines) == set(range(9))  # those in flight, and probes


def test_what_was_answered_before_an_outage_is_committed() -> None:
    answered: list[int] = []

    def reply(request: EngineRequest) -> EngineResponse:
        if len(answered) == 25:
            raise TransportFailure("reset")
        answered.append(request.line)
        return ok(request)

    dispatch = Dispatch(FakeEngine(reply))
    with pytest.raises(EngineDown):
        dispatch.run(lines(500), concurrency=8, outage_seconds=0.2)
    assert sorted(dispatch.rows) == sorted(answered)
    assert all(row.status_code == 200 for row in dispatch.rows.values())


def test_lines_that_never_get_an_answer_are_no_outage_when_the_engine_answers_others() -> None:
    def reply(request: EngineRequest) -> EngineResponse:
        if request.line > 30:
            raise TransportFailure("the answer is longer than 268,435,456 bytes; not read")
        return ok(request)

    dispatch = Dispatch(FakeEngine(reply))
    assert dispatch.run(lines(60), concurrency=4, max_attempts=2, outage_seconds=0.2)
    assert [row.status_code for _, row in sorted(dispatch.rows.items())] == [200] * 30 + [None] * 30
    assert {row.error_code for row in dispatch.rows.values() if row.failed} == {"connection_error"}


def test_short_outage_uses_up_no_attempts() -> None:
    back_at: list[float] = []

    def reply(request: EngineRequest) -> EngineResponse:
        if len(dispatch.engine.asked) < 20:
            return ok(request)
        if not back_at:
            back_at.append(time.monotonic() + 0.3)
        if time.monotonic() < back_at[0]:
            raise TransportFailure("connection refused", unreachable=True)
        return ok(request)

    dispatch = Dispatch(FakeEngine(reply))
    assert dispatch.run(lines(60), concurrency=8, max_attempts=2, outage_seconds=2)
    assert [row.status_code for row in dispatch.rows.values()] == [200] * 60


def test_engine_of_ours_that_died_ends_the_run_at_once_with_the_reason() -> None:
    def reply(request: EngineRequest) -> EngineResponse:
        if request.line > 5:
            raise TransportFailure("reset")
        return ok(request)

    dispatch = Dispatch(FakeEngine(reply))
    with pytest.raises(EngineDown, match="out of memory"):
        dispatch.run(lines(50), died=lambda: "out of memory")
    assert sorted(dispatch.rows) == [1, 2, 3, 4, 5]


def test_engine_that_fails_every_request_fails_the_run_and_not_its_lines() -> None:
    dispatch = Dispatch(FakeEngine(lambda request: refusal(500, "no kernel image")))
    with pytest.raises(EngineDown, match="status 500"):
        dispatch.run(lines(50), concurrency=8, outage_seconds=0.3)
    assert dispatch.rows == {}


def test_engine_that_hangs_fails_the_run_and_not_its_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("resources.engine.breaker.PROBE_SECONDS", 0.1)
    dispatch = Dispatch(FakeEngine(lambda request: ok(request) if 0 < request.line < 5 else hang(request)))
    with pytest.raises(EngineDown, match="out of reach"):
        dispatch.run(lines(50), concurrency=8, request_timeout=0.1, outage_seconds=0.3)
    assert sorted(dispatch.rows) == [1, 2, 3, 4]
    assert dispatch.engine.in_flight == 0


def test_nothing_new_is_sent_while_the_engine_is_out_of_reach() -> None:
    def reply(request: EngineRequest) -> EngineResponse:
        if request.line > 10:
            raise TransportFailure("refused", unreachable=True)
        if not request.line:
            probes.append(time.monotonic())
            raise TransportFailure("refused", unreachable=True)
        return ok(request)

    probes: list[float] = []
    dispatch = Dispatch(FakeEngine(reply))
    with pytest.raises(EngineDown):
        dispatch.run(lines(500), concurrency=8, outage_seconds=0.5)
    assert Counter(line for line in dispatch.engine.lines if line > 10) == dict.fromkeys(range(11, 19), 1)
    assert len(probes) >= 4


# --- An engine of ours that dies --------------------------------------------------------------------------------------


class MortalEngine(FakeEngine):
    """Dies of some lines: then nothing more is answered, nor what is in flight, until it is restarted."""

    def __init__(self, poison: Callable[[int], bool]) -> None:
        super().__init__()
        self.poison, self.restarts, self.dead = poison, 0, asyncio.Event()

    async def ask(self, request: EngineRequest) -> EngineResponse:
        self.asked.append(request)
        dead = self.dead
        if self.poison(request.line):
            dead.set()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(dead.wait(), 0.002)
        if dead.is_set():
            raise TransportFailure("reset")
        return ok(request)

    def died(self) -> str | None:
        return "killed by signal 11" if self.dead.is_set() else None

    def restart(self, note: Callable[[str], None]) -> None:
        note("loading")
        self.restarts += 1
        self.dead = asyncio.Event()


def dispatch_to(engine: MortalEngine) -> tuple[Dispatch, Callable[..., bool]]:
    dispatch = Dispatch(engine)
    return dispatch, lambda *args, **options: dispatch.run(
        *args, died=engine.died, restart=engine.restart, **{"concurrency": 16, **options}
    )


@pytest.mark.parametrize("concurrency", [1, 2, 16, 64])
def test_request_that_kills_the_engine_is_found_and_all_others_are_answered(concurrency: int) -> None:
    engine = MortalEngine(lambda line: line == 77)
    dispatch, run = dispatch_to(engine)
    assert run(lines(200), concurrency=concurrency, max_attempts=1)
    rows = dispatch.rows
    bad = rows.pop(77)
    assert (bad.status_code, bad.error_code, bad.attempt) == (None, "engine_crash", 1)
    assert bad.error_message is not None
    assert "killed by signal 11" in bad.error_message
    assert sorted([*rows, 77]) == list(range(1, 201))
    assert {(row.status_code, row.attempt) for row in rows.values()} == {(200, 1)}
    assert 2 <= engine.restarts <= 3 + math.log2(concurrency)
    assert (dispatch.counts.engine_restarts, dispatch.counts.quarantined) == (engine.restarts, 1)


def test_several_such_requests_are_each_found_within_the_bound() -> None:
    poison = {3, 20, 21, 150}
    engine = MortalEngine(poison.__contains__)
    dispatch, run = dispatch_to(engine)
    assert run(lines(200))
    assert {line for line, row in dispatch.rows.items() if row.failed} == poison
    assert len(dispatch.rows) == 200
    assert engine.restarts <= len(poison) * (3 + 4)


def test_engine_that_dies_by_chance_costs_no_row_and_no_attempt() -> None:
    unlucky = iter([True])
    engine = MortalEngine(lambda line: line == 50 and next(unlucky, False))
    dispatch, run = dispatch_to(engine)
    assert run(lines(100), max_attempts=1)
    assert {(row.status_code, row.attempt) for row in dispatch.rows.values()} == {(200, 1)}
    assert (len(dispatch.rows), engine.restarts) == (100, 1)


def test_engine_that_dies_whatever_it_is_asked_fails_the_run_with_its_last_words() -> None:
    engine = MortalEngine(lambda line: line == 0 or line > 30)
    dispatch, run = dispatch_to(engine)
    with pytest.raises(EngineDown, match=r"dies whatever it is asked. killed by signal 11"):
        run(lines(100))
    assert 0 < len(dispatch.rows) <= 30
    assert not any(row.failed for row in dispatch.rows.values())
    assert engine.restarts <= 3


def test_engine_that_dies_of_every_line_fails_the_run_after_a_few() -> None:
    engine = MortalEngine(lambda line: line > 30)
    dispatch, run = dispatch_to(engine)
    with pytest.raises(EngineDown, match="dies whatever it is asked"):
        run(lines(100))
    assert sum(row.failed for row in dispatch.rows.values()) == 5


def test_engine_that_does_not_come_up_again_fails_the_run_and_keeps_what_is_finished() -> None:
    def restart(note: Callable[[str], None]) -> None:
        raise EngineStartFailed("out of memory")

    engine = MortalEngine(lambda line: line == 50)
    dispatch = Dispatch(engine)
    with pytest.raises(EngineStartFailed, match="out of memory"):
        dispatch.run(lines(100), died=engine.died, restart=restart)
    assert sorted(dispatch.rows) == list(range(1, min(set(range(1, 101)) - set(dispatch.rows))))


def test_request_that_hangs_the_engine_is_found_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("resources.engine.breaker.PROBE_SECONDS", 0.05)

    class Hung(MortalEngine):
        async def ask(self, request: EngineRequest) -> EngineResponse:
            if self.poison(request.line):
                self.dead.set()
            if self.dead.is_set():
                await asyncio.Event().wait()
            await asyncio.sleep(0)
            return ok(request)

        def died(self) -> str | None:
            return None

    engine = Hung(lambda line: line == 9)
    dispatch, run = dispatch_to(engine)
    assert run(lines(30), concurrency=4, request_timeout=0.05, outage_seconds=0.1, max_attempts=2)
    assert {line for line, row in dispatch.rows.items() if row.failed} == {9}
    assert dispatch.rows[9].error_code == "engine_crash"


# --- Ending early ---------------------------------------------------------------------------------------------------


def test_commit_that_fails_fails_the_run() -> None:
    dispatch = Dispatch(FakeEngine(lambda request: _later(request, 0.001)))

    def commit(rows: list[ChunkRow]) -> None:
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        dispatch.run(lines(100_000), commit=commit)
    assert len(dispatch.engine.asked) < 10_000


def test_source_that_fails_fails_the_run_and_keeps_what_is_finished() -> None:
    def source() -> Iterable[Pending]:
        yield from lines(25)
        raise RuntimeError("unreadable")

    dispatch = Dispatch(FakeEngine())
    with pytest.raises(RuntimeError, match="unreadable"):
        dispatch.run(source())
    assert set(dispatch.rows) >= set(range(1, 22))


def test_stop_commits_the_finished_rows_and_only_those() -> None:
    dispatch = Dispatch(FakeEngine())

    def reply(request: EngineRequest) -> Any:
        if request.line <= 23:
            return ok(request)
        dispatch.stop.set()
        return hang(request)

    dispatch.engine.reply = reply
    assert not dispatch.run(lines(100))
    assert sorted(dispatch.rows) == list(range(1, 24))
    assert dispatch.engine.in_flight == 0


def test_stop_before_the_start_asks_next_to_nothing() -> None:
    dispatch = Dispatch(FakeEngine(hang))
    dispatch.stop.set()
    assert not dispatch.run(lines(100))
    assert dispatch.rows == {}


def test_interrupt_in_the_callers_thread_commits_what_is_finished_and_goes_on_to_the_caller() -> None:
    dispatch = Dispatch(FakeEngine(lambda request: ok(request) if request.line <= 7 else hang(request)))

    def tick(counts: Counts) -> None:
        if counts.finished == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        dispatch.run(lines(100), tick=tick)
    assert sorted(dispatch.rows) == list(range(1, 8))
    assert dispatch.engine.in_flight == 0
    assert "dispatcher" not in {thread.name for thread in threading.enumerate()}


def test_deadline_stops_asking_and_keeps_what_came_back() -> None:
    dispatch = Dispatch(FakeEngine(lambda request: _later(request, 0.01)))
    assert not dispatch.run(lines(100_000), deadline=datetime.now(UTC) + timedelta(seconds=0.15))
    assert sorted(dispatch.rows) == sorted(dispatch.engine.lines)
    assert 4 <= len(dispatch.rows) < 1000


def test_progress_is_told_in_the_callers_thread() -> None:
    told: list[tuple[int, int]] = []
    dispatch = Dispatch(FakeEngine())
    dispatch.run(lines(5), tick=lambda counts: told.append((threading.get_ident(), counts.finished)))
    assert told[-1] == (threading.get_ident(), 5)
