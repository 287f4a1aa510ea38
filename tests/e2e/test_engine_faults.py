"""An engine that misbehaves, as a real process: over HTTP, and as a server of our own that dies."""

import json
import math
import socket
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from resources import pipeline
from resources.answering import Mode
from resources.batch_store.outputs import OutputSummary, verify_outputs
from resources.batch_store.store import BatchStore
from resources.engine.catalog import Catalog, EngineKind, ModelEntry
from resources.engine.factory import EngineStarter, running
from resources.engine.hosts import Hosts
from resources.engine.protocol import RunningEngine
from resources.engine.vllm_server import VllmServer
from resources.errors import EngineDown
from tests.helpers import chat, python, read_jsonl, wait_until

pytestmark = pytest.mark.e2e

SCRIPT = Path(__file__).with_name("misbehaving_server.py")


class World:
    """One batch file, and the log of what the engine was asked."""

    def __init__(self, folder: Path, prompts: list[str], **options: Any) -> None:
        self.asked_log = folder / "asked.log"
        path = folder / "in.jsonl"
        path.write_text("".join(chat(f"r{n}", text, "m") for n, text in enumerate(prompts, 1)))
        self.prompts = prompts
        self.store = BatchStore(folder / "data")
        self.batch = self.store.register(path, {"flush_seconds": 0.2, **options}).batch

    def run(self, catalog: Catalog, starter: Any = None, mode: Mode = Mode.RESUME) -> OutputSummary:
        with self.batch.lock("a test"):
            pipeline.check(self.batch, catalog)
            starter = starter or EngineStarter(self.store.root, self.store.root)
            self.report = pipeline.answer(self.batch, catalog, starter, mode=mode).models[0]
            return pipeline.publish(self.batch)

    @property
    def asked(self) -> Counter[str]:
        return Counter(self.asked_log.read_text().splitlines())

    @property
    def answers(self) -> dict[str, str]:
        """Answer by prompt."""
        lines = read_jsonl(self.batch.output_dir / "output.jsonl")
        content = {line["custom_id"]: line["response"]["body"]["choices"][0]["message"]["content"] for line in lines}
        return {text: content[f"r{n}"] for n, text in enumerate(self.prompts, 1) if f"r{n}" in content}

    @property
    def failures(self) -> dict[str, Any]:
        """Error code or status by prompt."""
        lines = read_jsonl(self.batch.output_dir / "errors.jsonl")
        codes = {e["custom_id"]: e["error"]["code"] if e["error"] else e["response"]["status_code"] for e in lines}
        return {text: codes[f"r{n}"] for n, text in enumerate(self.prompts, 1) if f"r{n}" in codes}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def endpoint(asked: Path, port: int) -> Iterator[subprocess.Popen[str]]:
    process = python(SCRIPT, "--asked", asked, "--port", str(port))
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def at(port: int) -> Catalog:
    entry = ModelEntry(name="m", engine=EngineKind.OPENAI, base_url=f"http://127.0.0.1:{port}/v1", concurrency=8)
    return Catalog([entry])


FAULTS = ["reset", "half", "garbage", "429", "500", "503", "hang", "drip"]


def test_each_fault_that_passes_is_asked_again_and_each_line_ends_in_one_row(tmp_path: Path) -> None:
    prompts = [f"{fault}*2 line {n}" for n, fault in enumerate(FAULTS * 2)] + [f"good {n}" for n in range(40)]
    world = World(tmp_path, prompts, request_timeout=1)
    port = free_port()
    with endpoint(world.asked_log, port):
        summary = world.run(at(port))
    assert (summary.lines, summary.succeeded, summary.failed) == (56, 56, 0)
    assert world.answers == {text: f"to {text}" for text in prompts}
    assert {text: world.asked[text] for text in prompts} == {text: 3 if "*" in text else 1 for text in prompts}
    assert verify_outputs(world.batch) == []
    assert world.report.retries == 32


def test_fault_that_stays_is_its_own_lines_answer_and_no_other(tmp_path: Path) -> None:
    prompts = [f"good {n}" for n in range(30)] + [f"{fault}*99 line" for fault in FAULTS] + ["good last"]
    world = World(tmp_path, prompts, request_timeout=0.5, max_attempts=2)
    port = free_port()
    with endpoint(world.asked_log, port):
        summary = world.run(at(port))
    assert (summary.succeeded, summary.failed) == (31, 8)
    assert world.failures == {
        "reset*99 line": "connection_error",
        "half*99 line": "connection_error",
        "garbage*99 line": "connection_error",
        "429*99 line": 429,
        "500*99 line": 500,
        "503*99 line": 503,
        "hang*99 line": "request_timeout",
        "drip*99 line": "request_timeout",
    }
    assert all(world.asked[text] == 2 for text in prompts if "*" in text)
    with endpoint(world.asked_log, port):
        world.run(at(port), mode=Mode.RETRY_FAILED)
    assert world.asked["good 1"] == 1


def test_endpoint_that_goes_away_and_comes_back_costs_nothing(tmp_path: Path) -> None:
    prompts = [f"good {n}" for n in range(400)]
    world = World(tmp_path, prompts, max_attempts=1)
    port = free_port()
    result: list[OutputSummary] = []
    with endpoint(world.asked_log, port) as first:
        run = threading.Thread(target=lambda: result.append(world.run(at(port))))
        run.start()
        wait_until(lambda: world.asked_log.exists() and world.asked.total() > 100)
        first.kill()
        first.wait()
    with endpoint(world.asked_log, port):
        run.join(60)
    assert (result[0].succeeded, result[0].failed) == (400, 0)
    assert world.asked.total() <= 400 + 8 + 10  # those in flight, and probes


def test_endpoint_that_stays_away_fails_the_run_with_nothing_committed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("resources.answering.OUTAGE_SECONDS", 1)
    world = World(tmp_path, ["good 1", "good 2"])
    port = free_port()
    with pytest.raises(EngineDown, match="out of reach for 1 s"):
        world.run(at(port))
    assert list(world.batch.root.glob("results/*/*/chunk-*")) == []
    with endpoint(world.asked_log, port):
        assert world.run(at(port)).succeeded == 2


# --- A server of our own ----------------------------------------------------------------------------------------------


class OwnServer:
    """Starts the misbehaving server as our own: on a socket, under an engine host, with a device lock."""

    def __init__(self, folder: Path, asked: Path) -> None:
        self.folder, self.asked = folder, asked

    def warm(self, entries: Iterable[ModelEntry]) -> set[str]:
        return set()

    @contextmanager
    def start(
        self, entry: ModelEntry, stop: threading.Event, waiting: Callable[[str], None]
    ) -> Iterator[RunningEngine]:
        command = [sys.executable, str(SCRIPT), "--asked", str(self.asked)]
        with VllmServer(
            entry, runtime_dir=self.folder, log_dir=self.folder / "logs", command=command, stop_grace=0.2
        ) as server:
            server.start(should_stop=stop.is_set, progress=waiting)
            yield running(server, stop)


@pytest.fixture
def runtime() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="vb-", dir="/tmp") as folder:
        yield Path(folder)
        hosts = Hosts(Path(folder))
        hosts.stop_idle()
        wait_until(lambda: not hosts.status(), 20)


OWN = Catalog([ModelEntry(name="m", source="org/m", concurrency=16, keep_alive=60)])


def test_request_that_kills_our_server_is_quarantined_and_all_others_are_answered(
    tmp_path: Path, runtime: Path
) -> None:
    prompts = [f"good {n}" for n in range(80)]
    prompts[30], prompts[61] = "poison*99 a", "poison*99 b"
    world = World(tmp_path, prompts)
    summary = world.run(OWN, OwnServer(runtime, world.asked_log))
    assert (summary.succeeded, summary.failed) == (78, 2)
    assert world.failures == {"poison*99 a": "engine_crash", "poison*99 b": "engine_crash"}
    assert world.answers == {text: f"to {text}" for text in prompts if "good" in text}
    report = world.report
    assert report.quarantined == 2
    assert report.engine_restarts <= 2 * (3 + math.log2(16))
    tokens = report.tokens
    assert tokens is not None
    assert (tokens.useful.prompt, tokens.useful.completion, tokens.lower_bound) == (78 * 3, 78 * 2, True)


def test_server_of_ours_that_dies_of_everything_fails_the_run_and_keeps_what_is_committed(
    tmp_path: Path, runtime: Path
) -> None:
    world = World(tmp_path, [f"good {n}" for n in range(40)] + [f"poison*99 {n}" for n in range(40)])
    with pytest.raises(EngineDown, match="dies whatever it is asked"):
        world.run(OWN, OwnServer(runtime, world.asked_log))
    state = json.loads((world.batch.root / "run.json").read_text())
    assert state["status"] == "failed"
    assert "dies whatever" in state["error"]["message"]
    assert len(list(world.batch.root.glob("results/*/*/chunk-*"))) >= 1


def test_run_that_shares_a_server_with_a_deadly_request_is_not_blamed_and_loses_nothing(
    tmp_path: Path, runtime: Path
) -> None:
    prompts = [f"good {n}" for n in range(600)]
    poisoned = [f"fine {n}" for n in range(600)]
    poisoned[500] = "poison*99 it"
    folders = [tmp_path / "innocent", tmp_path / "guilty"]
    for folder in folders:
        folder.mkdir()
    worlds = [World(folder, some) for folder, some in zip(folders, (prompts, poisoned), strict=True)]
    asked = tmp_path / "asked.log"
    summaries: dict[int, OutputSummary] = {}

    def run(number: int) -> None:
        summaries[number] = worlds[number].run(OWN, OwnServer(runtime, asked))

    runs = [threading.Thread(target=run, args=(number,)) for number in range(2)]
    for thread in runs:
        thread.start()
    for thread in runs:
        thread.join(120)
    innocent, guilty = worlds
    assert (summaries[0].succeeded, summaries[0].failed) == (600, 0)
    assert (summaries[1].succeeded, summaries[1].failed) == (599, 1)
    assert guilty.failures == {"poison*99 it": "engine_crash"}
    assert (innocent.report.quarantined, guilty.report.quarantined) == (0, 1)
    assert innocent.report.engine_restarts <= 1
    assert innocent.answers == {text: f"to {text}" for text in prompts}


def test_next_run_on_the_model_finds_the_server_warm(tmp_path: Path, runtime: Path) -> None:
    reports = []
    for number in range(2):
        folder = tmp_path / str(number)
        folder.mkdir()
        world = World(folder, [f"good {number}"])
        world.run(OWN, OwnServer(runtime, tmp_path / "asked.log"))
        reports.append(world.report)
    assert [report.warm for report in reports] == [False, True]
    assert reports[0].load_seconds > 0
    assert reports[1].load_seconds == 0
