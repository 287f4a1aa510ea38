"""A batch with the null engine in a process of its own, so that its memory and its start are its own.

    python -m benchmarks.null_child whole|stop|resume FOLDER [CHUNK_ROWS [STOP_AFTER]]

The folder holds in.jsonl. `whole` goes from registration to publication, `stop` is stopped after that many rows,
`resume` goes on with what `stop` left and stops at once. The figures are one line of JSON: seconds of each step, the
peak of resident memory, and for `resume` when the first request reached the engine.
"""

import asyncio
import json
import re
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path

from resources import pipeline
from resources.batch_store.store import BatchStore
from resources.engine.catalog import Catalog, EngineKind, ModelEntry
from resources.engine.factory import EngineStarter
from resources.engine.null import NullEngine
from resources.engine.protocol import Engine, EngineRequest, EngineResponse, RunningEngine
from resources.errors import BatchStopped
from resources.progress import Progress

CATALOG = Catalog([ModelEntry(name="dry-run", engine=EngineKind.NULL)])


def whole(folder: Path, chunk_rows: int) -> dict[str, float]:
    seconds: dict[str, float] = {}
    with _timed(seconds, "register"):
        batch = BatchStore(folder / "data").register(folder / "in.jsonl", {"chunk_rows": chunk_rows}).batch
    with batch.lock("benchmark"):
        with _timed(seconds, "check"):
            lines = pipeline.check(batch, CATALOG).lines
        with _timed(seconds, "answer"):
            pipeline.answer(batch, CATALOG, EngineStarter(folder, folder))
        with _timed(seconds, "publish"):
            summary = pipeline.publish(batch)
    assert summary.succeeded == lines, summary
    return seconds


def stop(folder: Path, chunk_rows: int, stop_after: int) -> dict[str, float]:
    batch = BatchStore(folder / "data").register(folder / "in.jsonl", {"chunk_rows": chunk_rows}).batch
    engine = StoppingEngine(stop_after)
    with batch.lock("benchmark"), suppress(BatchStopped):
        pipeline.check(batch, CATALOG)
        pipeline.answer(batch, CATALOG, _Lent(engine), stop=engine.end)
    return {"answered": engine.answered}


def resume(folder: Path) -> dict[str, float]:
    store = BatchStore(folder / "data")
    batch = store.get(store.keys()[0])
    engine = StoppingEngine(0)
    done: list[int] = []

    def note(progress: Progress) -> None:
        if progress.phase == "answer":
            done.append(progress.done)

    with batch.lock("benchmark"), suppress(BatchStopped):
        pipeline.check(batch, CATALOG)
        pipeline.answer(batch, CATALOG, _Lent(engine), stop=engine.end, progress=note)
    return {"stopped_at": engine.stopped_at, "done": done[-1]}


class StoppingEngine(NullEngine):
    """Answers that many requests and has the run stopped at the next, which stays without an answer."""

    def __init__(self, answers: int) -> None:
        self.answered = 0
        self.stopped_at = 0.0
        self.end = threading.Event()
        self._answers = answers

    async def ask(self, request: EngineRequest) -> EngineResponse:
        if self.answered < self._answers:
            self.answered += 1
            return await super().ask(request)
        self.stopped_at = self.stopped_at or time.time()
        self.end.set()
        never: asyncio.Future[EngineResponse] = asyncio.get_running_loop().create_future()
        return await never


class _Lent(EngineStarter):
    """Starts nothing: lends that engine."""

    def __init__(self, engine: Engine) -> None:
        super().__init__(Path(), Path())
        object.__setattr__(self, "engine", engine)

    @contextmanager
    def start(
        self, entry: ModelEntry, stop: threading.Event, waiting: Callable[[str], None]
    ) -> Iterator[RunningEngine]:
        @asynccontextmanager
        async def connect() -> AsyncIterator[Engine]:
            yield self.engine  # type: ignore[attr-defined]

        yield RunningEngine(connect, in_process=True)


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    began = time.monotonic()
    yield
    seconds[name] = time.monotonic() - began


def _peak_rss_mb() -> float:
    """Of this program alone: what getrusage says begins with the memory of the process that started it."""
    found = re.search(r"^VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.M)
    assert found
    return int(found[1]) / 1024


if __name__ == "__main__":
    action, place, *sizes = sys.argv[1:]
    figures = {"whole": whole, "stop": stop, "resume": resume}[action](Path(place), *map(int, sizes))  # type: ignore[operator]
    print(json.dumps(figures | {"peak_rss_mb": _peak_rss_mb()}))
