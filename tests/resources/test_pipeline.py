"""check -> answer -> publish: every line answered exactly once, whatever happens on the way."""

import asyncio
import gzip
import json
import threading
from collections import Counter
from pathlib import Path
from typing import Any, Literal

import pyarrow.dataset
import pyarrow.parquet as pq
import pytest
import yaml

from resources import pipeline
from resources.answering import Mode
from resources.batch_store.batch import Batch
from resources.batch_store.outputs import OutputSummary, verify_outputs
from resources.batch_store.status import status_of
from resources.batch_store.store import BatchStore
from resources.chunk_store.generation import Generation
from resources.chunk_store.schema import RESULTS
from resources.engine.catalog import Catalog, EngineKind, ModelEntry
from resources.engine.factory import EngineStarter
from resources.engine.protocol import EngineRequest, EngineResponse
from resources.errors import BatchError, BatchFailed, BatchStopped, EngineDown
from tests.helpers import (
    AnsweringServer,
    FakeEngine,
    FakeStarter,
    catalog_of,
    chat,
    chats,
    ids,
    ok,
    python,
    read_jsonl,
    refusal,
    wait_until,
)


class World:
    """A data root with one batch file, and the three steps."""

    def __init__(self, folder: Path, text: str | bytes = "", name: str = "in.jsonl", **options: Any) -> None:
        self.path = folder / name
        self.path.write_bytes(text.encode() if isinstance(text, str) else text)
        self.store = BatchStore(folder / "data")
        self.batch = self.register(**options)

    def register(self, engine: Literal["null"] | None = None, restore: bool = False, **options: Any) -> Batch:
        return self.store.register(self.path, options, engine=engine, restore=restore).batch

    def run(
        self,
        starter: Any = None,
        catalog: Catalog | None = None,
        mode: Mode = Mode.RESUME,
        stop: threading.Event | None = None,
    ) -> OutputSummary:
        batch, catalog = self.batch, catalog or catalog_of()
        with batch.lock("a test"):
            pipeline.check(batch, catalog, recheck=mode is not Mode.RESUME)
            starter = starter or EngineStarter(self.store.root, self.store.root)
            self.report = pipeline.answer(batch, catalog, starter, mode=mode, stop=stop)
            return pipeline.publish(batch)

    @property
    def output(self) -> list[dict[str, Any]]:
        return read_jsonl(self.batch.output_dir / "output.jsonl")

    @property
    def errors(self) -> list[dict[str, Any]]:
        return read_jsonl(self.batch.output_dir / "errors.jsonl")

    @property
    def codes(self) -> list[tuple[str | None, str | None]]:
        """(custom_id, code) of the error lines; the status where the engine refused."""
        return [
            (line["custom_id"], line["error"]["code"] if line["error"] else line["response"]["status_code"])
            for line in self.errors
        ]


def texts(world: World) -> set[str]:
    return {line["response"]["body"]["choices"][0]["message"]["content"] for line in world.output}


class NoEngine:
    """Stands where no engine may be started."""

    def start(self, entry: ModelEntry, *_: object) -> Any:
        raise AssertionError(f"an engine was started for {entry.name}")


def fake(reply: Any = ok) -> FakeStarter:
    return FakeStarter(FakeEngine(reply))


# --- The way through ------------------------------------------------------------------------------------------------


def test_every_line_is_answered_once_in_input_order(tmp_path: Path) -> None:
    world = World(tmp_path, chats(250), chunk_rows=7)
    summary = world.run()
    assert (summary.lines, summary.succeeded, summary.failed, summary.missing) == (250, 250, 0, 0)
    assert ids(world.batch.output_dir / "output.jsonl") == [f"r{number}" for number in range(1, 251)]
    assert world.errors == []
    assert verify_outputs(world.batch) == []
    assert status_of(world.store, world.batch).state == "completed"
    line = world.output[6]
    assert line["id"] == f"batch_req_{world.batch.spec.identity[:12]}_7"
    assert line["response"]["body"]["choices"][0]["message"]["content"].startswith("null answer")
    rows = [pq.read_table(part) for part in sorted(world.batch.output_dir.glob("results/part-*.parquet"))]
    assert [number for table in rows for number in table["line"].to_pylist()] == list(range(1, 251))
    assert all(table.schema.equals(RESULTS) for table in rows)
    assert rows[0]["text"][0].as_py().startswith("null answer")


def test_output_and_errors_together_are_the_non_blank_lines_in_order(tmp_path: Path) -> None:
    text = chat("a") + "\nnot json\n" + chat("b") + "\r\n[]\n" + chat("a") + chat("c", model="nobody") + chat("d")[:-9]
    world = World(tmp_path, text)
    summary = world.run()
    assert [line["custom_id"] for line in world.output] == ["a", "b"]
    assert world.codes == [
        (None, "invalid_json"),
        (None, "not_an_object"),
        ("a", "duplicate_custom_id"),
        ("c", "model_not_found"),
        (None, "invalid_json"),
    ]
    assert [line["error"]["line"] for line in world.errors] == [3, 6, 7, 8, 9]
    assert (summary.lines, summary.succeeded, summary.failed) == (7, 2, 5)
    assert verify_outputs(world.batch) == []


def test_done_already_nothing_happens(tmp_path: Path) -> None:
    world = World(tmp_path, chats(20))
    first = world.run()
    published = (world.batch.output_dir / "output.jsonl").stat()
    assert world.run(NoEngine()) == first
    assert (world.batch.output_dir / "output.jsonl").stat() == published
    assert pipeline.is_complete(world.batch, catalog_of())


@pytest.mark.parametrize(
    ("text", "code"),
    [("", "empty_file"), ("\n \r\n", "empty_file"), ("no\n" + chat("a", model="x"), "no_valid_request")],
)
def test_file_without_a_request_is_a_failed_batch_with_that_reason(tmp_path: Path, text: str, code: str) -> None:
    world = World(tmp_path, text)
    for _ in range(2):
        with pytest.raises(BatchFailed) as caught:
            world.run(NoEngine())
        assert caught.value.code == code
    assert (world.batch.final_failure() or {})["code"] == code
    assert status_of(world.store, world.batch).state == "failed"


def test_bad_line_under_reject_fails_before_an_engine_starts(tmp_path: Path) -> None:
    world = World(tmp_path, chats(5) + "bad\n", on_invalid="reject")
    with pytest.raises(BatchFailed, match="line 6: invalid_json") as caught:
        world.run(NoEngine())
    assert caught.value.code == "invalid_requests"
    world.batch = world.register(on_invalid="quarantine")
    assert world.run().failed == 1


def test_compressed_and_truncated_files(tmp_path: Path) -> None:
    packed = gzip.compress(chats(5).encode())
    assert World(tmp_path, packed, "whole.jsonl.gz").run().succeeded == 5
    with pytest.raises(BatchFailed) as caught:
        World(tmp_path, packed[:-12], "cut.jsonl.gz").run(NoEngine())
    assert caught.value.code == "unreadable_input"


def test_file_of_several_models_is_run_model_by_model(tmp_path: Path) -> None:
    text = "".join(chat(f"r{number}", model=("one", "two", "alias")[number % 3]) for number in range(30))
    catalog = Catalog(
        [
            ModelEntry(name="one", engine="null"),
            ModelEntry(name="two", engine="null", aliases=("alias",)),
            ModelEntry(name="unused", engine="null"),
        ]
    )
    world, starter = World(tmp_path, text), fake()
    assert world.run(starter, catalog).succeeded == 30
    assert sorted(starter.started) == ["one", "two"]
    assert {model.model: model.asked for model in world.report.models} == {"one": 10, "two": 20}
    assert [line["custom_id"] for line in world.output] == [f"r{number}" for number in range(30)]


def test_sidecar_says_how_the_batch_is_run(tmp_path: Path) -> None:
    (tmp_path / "in.yaml").write_text("model: dry-run\ndefaults: {temperature: 0.5}\nmetadata: {team: support}\n")
    world, starter = World(tmp_path, chat("a", model="nobody") + chat("b", temperature=1)), fake()
    assert world.run(starter).metadata == {"team": "support"}
    bodies = [json.loads(request.body) for request in starter.engine.asked]
    assert [(body["model"], body["temperature"]) for body in bodies] == [("dry-run", 0.5), ("dry-run", 1)]


def test_refused_and_unanswered_lines_are_error_rows_and_stop_no_other(tmp_path: Path) -> None:
    def reply(request: EngineRequest) -> EngineResponse:
        if request.line == 2:
            return refusal(400, "too long")
        if request.line == 3:
            raise TimeoutError
        return ok(request)

    world = World(tmp_path, chats(5), max_attempts=1)
    summary = world.run(fake(reply))
    assert world.codes == [("r2", 400), ("r3", "request_timeout")]
    assert (world.errors[0]["error"], world.errors[0]["response"]["body"]) == (None, {"error": {"message": "too long"}})
    assert world.errors[1]["response"] is None
    assert summary.errors_by_code == {"http_400": 1, "request_timeout": 1}


# --- Going on -------------------------------------------------------------------------------------------------------


def test_cancelled_run_goes_on_where_it_stopped(tmp_path: Path) -> None:
    world, stop = World(tmp_path, chats(60), chunk_rows=5), threading.Event()
    first = stopping_at(20, stop)
    with pytest.raises(BatchStopped, match="of 60 lines answered"):
        world.run(first, catalog_of(concurrency=2), stop=stop)
    assert status_of(world.store, world.batch).state == "interrupted"
    assert not world.batch.is_published()
    second = fake()
    assert world.run(second, catalog_of(concurrency=2)).succeeded == 60
    asked = Counter(first.engine.lines) + Counter(second.engine.lines)
    assert sorted(asked) == list(range(1, 61))
    assert sum(asked.values()) - 60 <= 2


def stopping_at(line: int, stop: threading.Event, text: str = "fine") -> FakeStarter:
    """An engine that hangs from that line on, and is stopped there."""

    async def hang() -> EngineResponse:
        await asyncio.Event().wait()
        raise AssertionError

    def reply(request: EngineRequest) -> Any:
        if request.line < line:
            return ok(request, text)
        stop.set()
        return hang()

    return fake(reply)


_RUNNER = """
import sys
from pathlib import Path
from resources import pipeline
from resources.batch_store.store import BatchStore
from resources.engine.catalog import load_catalog
from resources.engine.factory import EngineStarter
root = Path(sys.argv[1])
batch, catalog = BatchStore(root / "data").get(sys.argv[2]), load_catalog(root / "models.yaml")
with batch.lock("the one that is killed"):
    pipeline.check(batch, catalog)
    pipeline.answer(batch, catalog, EngineStarter(root, root))
"""


@pytest.mark.e2e
def test_killed_run_loses_nothing_and_repeats_at_most_what_was_not_committed(tmp_path: Path) -> None:
    world = World(tmp_path, "".join(chat(f"r{n}", f"r{n}") for n in range(1, 101)), chunk_rows=10, flush_seconds=0.2)
    with AnsweringServer(hold=lambda _: len(server.asked) > 47) as server:
        entry = {"engine": "openai", "base_url": server.url, "concurrency": 4}
        (tmp_path / "models.yaml").write_text(yaml.safe_dump({"models": {"dry-run": entry}}))
        catalog = catalog_of(engine=EngineKind.OPENAI, base_url=server.url, concurrency=4)
        victim = python("-c", _RUNNER, tmp_path, world.batch.key)
        generation = Generation.of(world.batch.results_dir, catalog.get("dry-run"))
        wait_until(lambda: generation.folder.exists() and generation.committed(100).done >= 40, 30)
        victim.kill()
        victim.communicate()
        committed = generation.committed(100).done
        before = len(server.asked)
        server.gate.set()
        assert world.run(catalog=catalog).succeeded == 100
        again = len(server.asked) - before
    assert again == 100 - committed
    assert set(server.asked) == {f"r{n}" for n in range(1, 101)}
    assert sum(Counter(server.asked).values()) - 100 <= 4 + 10
    assert verify_outputs(world.batch) == []


def test_engine_that_goes_away_leaves_its_lines_to_the_next_run(tmp_path: Path) -> None:
    class Dying(FakeStarter):
        def start(self, *arguments: Any) -> Any:
            raise EngineDown("gone")

    world = World(tmp_path, chats(5))
    with pytest.raises(EngineDown):
        world.run(Dying(FakeEngine()))
    found = status_of(world.store, world.batch)
    assert (found.state, found.error) == ("failed", "gone")
    assert world.batch.final_failure() is None
    assert world.run().succeeded == 5


# --- What is another batch, and what another generation -------------------------------------------------------------


def test_changed_file_is_another_batch(tmp_path: Path) -> None:
    world = World(tmp_path, chats(3))
    world.run()
    other = World(tmp_path, chats(4))
    assert other.batch.key != world.batch.key
    assert other.run().succeeded == 4
    assert len(world.output) == 3


def test_changed_catalog_entry_is_another_generation_and_the_old_one_stays(tmp_path: Path) -> None:
    world = World(tmp_path, chats(3))
    world.run()
    old = world.batch.current()["dry-run"]["generation"]
    changed = catalog_of(defaults={"temperature": 0})
    assert not pipeline.is_complete(world.batch, changed)
    starter = fake()
    world.run(starter, changed)
    assert sorted(starter.engine.lines) == [1, 2, 3]
    current = world.batch.current()["dry-run"]
    assert (current["generation"] != old, current["revision"]) == (True, 2)
    assert Generation(world.batch.results_dir / old).committed(3).done == 3
    assert {line["response"]["body"]["id"] for line in world.output} == {"c"}


def test_dry_run_never_mixes_with_real_answers(tmp_path: Path) -> None:
    world = World(tmp_path, chats(3))
    real = catalog_of(engine=EngineKind.OPENAI, base_url="http://127.0.0.1:9/v1")
    dry = World(tmp_path, chats(3), engine="null")
    assert dry.batch.key != world.batch.key
    assert dry.run(catalog=real).succeeded == 3
    assert world.batch.run_record() == {}
    starter = fake()
    world.run(starter, real)
    assert sorted(starter.engine.lines) == [1, 2, 3]


def test_dry_run_in_the_same_batch_could_not_pass_for_an_answer_either(tmp_path: Path) -> None:
    world, starter = World(tmp_path, chats(3)), fake()
    world.run(catalog=catalog_of())
    world.run(starter, catalog_of(engine=EngineKind.OPENAI, base_url="http://127.0.0.1:9/v1"))
    assert sorted(starter.engine.lines) == [1, 2, 3]


# --- Modes ----------------------------------------------------------------------------------------------------------


def test_retry_asks_the_failed_lines_alone_and_raises_the_revision(tmp_path: Path) -> None:
    world = World(tmp_path, chats(10) + "bad\n", max_attempts=1)
    world.run(fake(lambda request: refusal(500) if request.line in (3, 7) else ok(request)))
    assert world.codes == [("r3", 500), ("r7", 500), (None, "invalid_json")]
    assert world.batch.current()["dry-run"]["revision"] == 1
    starter = fake(lambda request: refusal(400) if request.line == 7 else ok(request, "at last"))
    world.run(starter, mode=Mode.RETRY_FAILED)
    assert sorted(starter.engine.lines) == [3, 7]
    assert world.codes == [("r7", 400), (None, "invalid_json")]
    assert world.output[2]["response"]["body"]["choices"][0]["message"]["content"] == "at last"
    assert world.batch.current()["dry-run"]["revision"] == 2
    rows = pq.read_table(world.batch.output_dir / "results")
    assert rows["attempt"].to_pylist() == [1, 1, 2, 1, 1, 1, 2, 1, 1, 1, None]
    assert world.run(NoEngine()).failed == 2


def test_retry_with_nothing_failed_asks_nothing(tmp_path: Path) -> None:
    world = World(tmp_path, chats(3))
    world.run()
    world.run(NoEngine(), mode=Mode.RETRY_FAILED)
    assert world.batch.current()["dry-run"]["revision"] == 1


def test_restart_asks_everything_anew(tmp_path: Path) -> None:
    world = World(tmp_path, chats(5))
    world.run()
    starter = fake(lambda request: ok(request, "anew"))
    world.run(starter, mode=Mode.RESTART)
    assert sorted(starter.engine.lines) == [1, 2, 3, 4, 5]
    assert {line["response"]["body"]["choices"][0]["message"]["content"] for line in world.output} == {"anew"}
    assert world.batch.current()["dry-run"]["revision"] == 2


def test_restart_that_was_cut_off_and_resumed_publishes_the_new_answers(tmp_path: Path) -> None:
    world, stop = World(tmp_path, chats(10), chunk_rows=1), threading.Event()
    world.run(fake(lambda request: ok(request, "old")))
    with pytest.raises(BatchStopped):
        world.run(stopping_at(5, stop, "new"), mode=Mode.RESTART, stop=stop)
    assert texts(world) == {"old"}
    assert not pipeline.is_complete(world.batch, catalog_of())
    with world.batch.lock("test"):
        pipeline.publish(world.batch)
    assert texts(world) == {"old"}
    world.run(fake(lambda request: ok(request, "new")))
    assert texts(world) == {"new"}
    assert 0 < world.report.asked < 10
    assert pipeline.is_complete(world.batch, catalog_of())
    assert len([path for path in world.batch.results_dir.glob("*/*") if path.is_dir()]) == 1


def test_retry_that_was_cut_off_is_gone_on_with(tmp_path: Path) -> None:
    world, stop = World(tmp_path, chats(10), chunk_rows=1), threading.Event()
    world.run(fake(lambda request: refusal(400)))
    with pytest.raises(BatchStopped):
        world.run(stopping_at(5, stop, "new"), mode=Mode.RETRY_FAILED, stop=stop)
    assert not pipeline.is_complete(world.batch, catalog_of())
    world.run(fake(lambda request: ok(request, "new")))
    assert len(world.output) == 10
    assert pipeline.is_complete(world.batch, catalog_of())


def test_restart_after_the_deadline_is_refused_and_loses_nothing(tmp_path: Path) -> None:
    world = World(tmp_path, chats(3))
    world.run()
    world.batch = world.register(deadline="2020-01-01T00:00:00Z")
    with pytest.raises(BatchError, match="deadline has passed"):
        world.run(NoEngine(), mode=Mode.RESTART)
    assert len(world.output) == 3


def test_results_of_a_rejected_batch_are_refused_too(tmp_path: Path) -> None:
    world = World(tmp_path, chats(2) + "garbage\n", on_invalid="reject")
    with pytest.raises(BatchFailed), world.batch.lock("test"):
        pipeline.check(world.batch, catalog_of())
    with pytest.raises(BatchFailed, match="1 of 3 lines"), world.batch.lock("test"):
        pipeline.answer(world.batch, catalog_of(), NoEngine())


def test_line_goes_to_the_model_that_its_name_means_now(tmp_path: Path) -> None:
    def catalog(alias_of: str) -> Catalog:
        return Catalog(
            [ModelEntry(name=name, engine="null", aliases=("x",) if name == alias_of else ()) for name in ("a", "b")]
        )

    world = World(tmp_path, chat("1", model="a") + chat("2", model="x"))
    world.run(catalog=catalog("a"))
    world.run(catalog=catalog("b"), mode=Mode.RETRY_FAILED)
    rows = pyarrow.dataset.dataset(world.batch.output_dir / "results").to_table().to_pylist()
    assert [(row["line"], row["model"], row["status_code"]) for row in rows] == [(1, "a", 200), (2, "b", 200)]
    world.run(catalog=catalog("b"))
    assert world.report.asked == 0


def test_deadline_makes_error_rows_that_a_later_run_may_still_answer(tmp_path: Path) -> None:
    world = World(tmp_path, chats(5), deadline="2020-01-01T00:00:00Z")
    summary = world.run(NoEngine())
    assert world.report.expired
    assert world.codes == [(f"r{number}", "batch_expired") for number in range(1, 6)]
    assert (summary.missing, summary.failed, summary.succeeded) == (5, 5, 0)
    assert world.run(NoEngine()).failed == 5
    world.batch = world.register()
    assert world.run().succeeded == 5
    assert world.errors == []


def test_lines_of_an_unknown_model_are_answered_when_the_catalog_learns_its_name(tmp_path: Path) -> None:
    world = World(tmp_path, chat("a") + chat("b", model="later") + chat("c"))
    world.run()
    assert world.codes == [("b", "model_not_found")]
    starter = fake()
    assert world.run(starter, catalog_of("dry-run", "later")).succeeded == 3
    assert starter.engine.lines == [2]
    assert world.errors == []


def test_pruned_batch_keeps_its_outputs_and_can_be_brought_back(tmp_path: Path) -> None:
    world = World(tmp_path, chats(3))
    world.run()
    world.batch.input_path.unlink()
    assert world.run(NoEngine()).succeeded == 3
    with pytest.raises(Exception, match="pruned; `vllm-batch run FILE --mode restart`"):
        world.run(NoEngine(), mode=Mode.RESTART)
    world.batch = world.register(restore=True)
    assert world.run(mode=Mode.RESTART).succeeded == 3


def test_answer_of_many_lines_and_odd_usage_is_one_row(tmp_path: Path) -> None:
    body = b'{\n  "choices": [],\r\n  "usage": {"prompt_tokens": 99999999999}\n}'
    world = World(tmp_path, chats(2))
    assert world.run(fake(lambda request: EngineResponse(200, body, "id"))).succeeded == 2
    assert [line["response"]["body"] for line in world.output] == [json.loads(body)] * 2


def test_older_outputs_are_removed_and_the_link_always_points_to_whole_ones(tmp_path: Path) -> None:
    world = World(tmp_path, chats(3))
    for _ in range(3):
        world.run(mode=Mode.RESTART)
    assert len(list(world.batch.outputs_dir.iterdir())) == 1
    assert not world.batch.output_dir.readlink().is_absolute()
    assert verify_outputs(world.batch) == []


def test_verify_finds_what_is_missing(tmp_path: Path) -> None:
    world = World(tmp_path, chats(3))
    world.run()
    output = world.batch.output_dir / "output.jsonl"
    output.write_bytes(b"".join(output.read_bytes().splitlines(keepends=True)[:2]))
    assert verify_outputs(world.batch) == ["output.jsonl and errors.jsonl hold 2 lines, not 3"]


# --- Many models ------------------------------------------------------------------------------------------------------


def test_three_models_taking_turns_over_300_rows_are_started_once_each_the_warm_one_first(tmp_path: Path) -> None:
    text = "".join(chat(f"r{n}", model="abc"[n % 3]) for n in range(300))
    world = World(tmp_path, text)
    starter = FakeStarter(FakeEngine(), warm=["b"])
    world.run(starter, catalog_of("a", "b", "c"))
    assert starter.started == ["b", "a", "c"]
    assert ids(world.batch.output_dir / "output.jsonl") == [f"r{n}" for n in range(300)]
