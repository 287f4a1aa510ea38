"""What the disk does to a batch: damaged files, no space, no right to write. And the clock. Never a wrong result."""

import errno
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from resources import durable, failpoints, pipeline
from resources.answering import Mode
from resources.batch_store.batch import Batch, revision_number
from resources.batch_store.outputs import OutputSummary, verify_outputs
from resources.batch_store.status import status_of
from resources.batch_store.store import BatchStore
from resources.engine.protocol import EngineRequest
from resources.errors import BatchLocked, BatchStopped, ChunkDamaged, StorageError
from tests.helpers import FakeEngine, FakeStarter, Reply, catalog_of, chats, ok, read_jsonl, refusal

LINES = 20


class World:
    """A batch of 20 lines in chunks of 5, and its runs."""

    def __init__(self, folder: Path) -> None:
        self.store = BatchStore(folder / "data")
        (folder / "in.jsonl").write_text(chats(LINES))
        self.batch: Batch = self.store.register(folder / "in.jsonl", {"chunk_rows": 5, "max_attempts": 1}).batch

    def run(self, reply: Reply = ok, mode: Mode = Mode.RESUME, publish: bool = True) -> tuple[OutputSummary, list[int]]:
        """The summary of a run, and the lines that it asked."""
        engine, catalog = FakeEngine(reply), catalog_of(concurrency=1)
        with self.batch.lock("a test"):
            pipeline.check(self.batch, catalog, recheck=mode is not Mode.RESUME)
            pipeline.answer(self.batch, catalog, FakeStarter(engine), mode=mode)
            summary = pipeline.publish(self.batch) if publish else OutputSummary()
        return summary, sorted(engine.lines)

    def chunks(self) -> list[Path]:
        return sorted(self.batch.results_dir.glob("*/*/chunk-*"))

    def texts(self) -> list[str]:
        assert verify_outputs(self.batch) == []
        lines = read_jsonl(self.batch.output_dir / "output.jsonl")
        return [line["response"]["body"]["choices"][0]["message"]["content"] for line in lines]


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


@pytest.fixture(autouse=True)
def _disarmed() -> Iterator[None]:
    yield
    failpoints.arm(None)


def anew(request: EngineRequest) -> object:
    return ok(request, "anew")


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 8
    path.write_bytes(content)


# --- Chunks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", [cut, flip, Path.touch], ids=["cut", "flipped", "whole"])
def test_lines_of_a_damaged_chunk_are_asked_again_by_the_next_run(world: World, damage: Callable[[Path], None]) -> None:
    world.run(publish=False)
    damage(world.chunks()[1])
    summary, asked = world.run(anew)
    wanted = [] if damage is Path.touch else [6, 7, 8, 9, 10]
    assert (summary.succeeded, asked) == (LINES, wanted)
    assert world.texts() == ["anew" if line in wanted else "fine" for line in range(1, LINES + 1)]
    assert len(list(world.batch.results_dir.glob("*/*/damaged/*"))) == bool(wanted)


def test_damage_that_publishing_meets_keeps_it_back_and_the_next_run_mends_it(world: World) -> None:
    world.run()
    (world.batch.output_dir / "summary.json").unlink()
    flip(world.chunks()[0])
    with world.batch.lock("test"), pytest.raises(ChunkDamaged, match="run the batch again"):
        pipeline.publish(world.batch)
    assert not world.batch.is_published()
    assert not pipeline.is_complete(world.batch, catalog_of(concurrency=1))
    summary, asked = world.run(anew)
    assert (summary.succeeded, asked) == (LINES, [1, 2, 3, 4, 5])
    assert world.batch.current()["dry-run"]["revision"] == 2
    assert pipeline.is_complete(world.batch, catalog_of(concurrency=1))


def test_failed_attempt_does_not_pass_for_the_answer_that_was_in_a_damaged_chunk(world: World) -> None:
    world.run(lambda request: refusal(400) if request.line in (3, 17) else ok(request))
    world.run(mode=Mode.RETRY_FAILED)
    flip(world.chunks()[-1])
    (world.batch.output_dir / "summary.json").unlink()
    with world.batch.lock("test"), pytest.raises(ChunkDamaged):
        pipeline.publish(world.batch)
    summary, asked = world.run(anew)
    assert (summary.succeeded, asked) == (LINES, [3, 17])


def test_who_only_reads_sets_nothing_aside(world: World, tmp_path: Path) -> None:
    world.run(publish=False)
    flip(world.chunks()[2])
    before = {path: path.stat() for path in world.batch.root.rglob("*")}
    generations = pipeline.newest_generations(world.batch, catalog_of(concurrency=1))
    with pytest.raises(ChunkDamaged, match="Run the batch again"):
        pipeline.write_to(
            world.batch, tmp_path / "out", generations, "batch_incomplete", threading.Event(), lambda _: None
        )
    assert status_of(world.store, world.batch).state == "interrupted"
    assert {path: path.stat() for path in world.batch.root.rglob("*")} == before


# --- The small files ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["results/current.json", "output/summary.json", "requests/summary.json", "work.json", "run.json", "manifest.json"],
)
@pytest.mark.parametrize("content", ["", "{", '{"a": 1', "[]"])
def test_half_a_file_costs_no_answer(world: World, name: str, content: str) -> None:
    world.run(lambda request: ok(request, "old"))
    world.run(mode=Mode.RESTART)
    current = world.batch.current()
    place = world.chunks()[0].parent if name == "manifest.json" else world.batch.root
    (place / name).write_text(content)
    status_of(world.store, world.batch)
    summary, asked = world.run(anew)
    assert (summary.succeeded, asked) == (LINES, [])
    assert world.texts() == ["fine"] * LINES
    assert world.batch.current() == current
    assert pipeline.is_complete(world.batch, catalog_of(concurrency=1))


def test_leftovers_of_a_killed_process_are_removed(world: World) -> None:
    world.run()
    batch, generation = world.batch, world.chunks()[0].parent
    left = [durable.temporary_beside(folder / "x") for folder in (batch.root, batch.results_dir, generation)]
    for path in left:
        path.write_text("half")
    world.run()
    assert not any(path.exists() for path in left)


def test_restart_that_is_asked_for_again_before_it_is_published_is_gone_on_with(world: World) -> None:
    world.run()
    world.run(anew, Mode.RESTART, publish=False)
    summary, asked = world.run(mode=Mode.RESTART)
    assert (summary.succeeded, asked, world.batch.work().mode) == (LINES, [], None)
    assert world.texts() == ["anew"] * LINES
    assert len(world.run(mode=Mode.RESTART)[1]) == LINES


# --- The disk refuses -----------------------------------------------------------------------------------------------


def refusing(number: int, name: str, steps: set[str], after: int = 0) -> None:
    """Let every write to files of that name fail at these steps, once `after` of them were written."""
    seen = 0

    def reached(step: str, path: Path) -> None:
        nonlocal seen
        if path.name.startswith(name) and step in steps:
            seen += 1
            if seen > after:
                raise OSError(number, os.strerror(number))

    failpoints.arm(reached)


@pytest.mark.parametrize(
    ("number", "words"), [(errno.ENOSPC, "No space left.*Free some"), (errno.EROFS, "Read-only.*Make.*writable")]
)
@pytest.mark.parametrize("name", ["chunk", "current", "part", "work", "manifest"])
def test_disk_that_refuses_stops_the_run_with_an_error_for_people(
    world: World, name: str, number: int, words: str
) -> None:
    if name == "work":
        world.run()
    refusing(number, name, {"opened", "written", "synced"}, after=2 if name == "chunk" else 0)
    with pytest.raises(StorageError, match=f"{name}.*{words}.*what is committed stays"):
        world.run(mode=Mode.RESTART if name == "work" else Mode.RESUME)
    assert status_of(world.store, world.batch).state in ("failed", "completed")
    assert not list(world.batch.root.rglob("*/.tmp-*-chunk*"))
    kept = 5 * len(world.chunks())
    failpoints.arm(None)
    summary, asked = world.run()
    assert (summary.succeeded, len(asked)) == (LINES, LINES - kept)


def test_disk_that_has_no_room_for_run_json_does_not_hide_the_error(world: World) -> None:
    refusing(errno.ENOSPC, "", {"opened"})
    with pytest.raises(StorageError, match="No space left"):
        world.run()


def test_file_that_does_not_fit_is_not_registered(world: World, tmp_path: Path) -> None:
    (tmp_path / "other.jsonl").write_text(chats(3))
    refusing(errno.ENOSPC, "input", {"written"})
    with pytest.raises(StorageError, match="No space left"):
        world.store.register(tmp_path / "other.jsonl")
    assert world.store.keys() == [world.batch.key]
    assert list(world.store.root.iterdir()) == [world.batch.root]


# --- The clock, and the lock ----------------------------------------------------------------------------------------


def test_clock_that_jumps_back_changes_nothing(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.run()
    revisions = [revision_number(world.batch.output_dir.resolve())]
    monkeypatch.setattr(time, "time", lambda: 1_000_000.0)
    monkeypatch.setattr(time, "time_ns", lambda: 10**15)
    for text in ("second", "third"):
        world.run(lambda request, text=text: ok(request, text), Mode.RESTART)
        assert world.texts() == [text] * LINES
        revisions.append(revision_number(world.batch.output_dir.resolve()))
    assert revisions == sorted(set(revisions))
    summary, asked = world.run()
    assert (summary.succeeded, asked) == (LINES, [])


def test_run_whose_lock_file_was_replaced_writes_nothing_more(world: World) -> None:
    def replace(request: EngineRequest) -> object:
        if request.line == 8:
            (world.batch.root / "lock").unlink()
        return ok(request)

    with pytest.raises(BatchLocked, match="removed or replaced"):
        world.run(replace)
    assert len(world.chunks()) <= 1  # of the five lines before
    assert not world.batch.is_published()
    assert world.run()[0].succeeded == LINES


def test_nothing_is_done_without_the_lock(world: World) -> None:
    with pytest.raises(BatchLocked, match="does not hold its lock"):
        pipeline.check(world.batch, catalog_of())


def test_stopped_while_outputs_are_written_the_next_run_asks_nothing(world: World) -> None:
    stop = threading.Event()
    stop.set()
    world.run(publish=False)
    with world.batch.lock("test"), pytest.raises(BatchStopped):
        pipeline.publish(world.batch, stop=stop)
    assert world.run()[1] == []
