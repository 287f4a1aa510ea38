"""The main path with a real vLLM: answers that are the engine's own, and a run that is killed half-way."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai.types
import openai.types.chat
import pyarrow.dataset
import pytest
import yaml

from resources import pipeline
from resources.batch_store.store import BatchStore
from resources.engine.catalog import Catalog, ModelEntry
from resources.engine.endpoint import Endpoint
from resources.engine.factory import EngineStarter
from resources.engine.host_folder import HostFolder
from resources.engine.hosts import Hosts
from resources.engine.protocol import EngineRequest, EngineResponse, RunningEngine
from resources.engine.vllm_server import VllmServer
from resources.progress import Progress
from tests.helpers import ROOT, read_jsonl, wait_until

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

CITY = {
    "type": "json_schema",
    "json_schema": {
        "name": "city",
        "schema": {
            "type": "object",
            "properties": {"name": {"type": "string", "maxLength": 20}, "capital": {"type": "boolean"}},
            "required": ["name", "capital"],
            "additionalProperties": False,
        },
    },
}


class SharedServer(EngineStarter):
    """Starts nothing: connects to the server that all tests share."""

    def __init__(self, server: VllmServer) -> None:
        super().__init__(Path(), Path())
        object.__setattr__(self, "server", server)

    @contextmanager
    def start(
        self, entry: ModelEntry, stop: threading.Event, waiting: Callable[[str], None]
    ) -> Iterator[RunningEngine]:
        server: VllmServer = self.server  # type: ignore[attr-defined]
        yield RunningEngine(lambda: Endpoint(socket_path=server.socket_path))


def request(custom_id: str, url: str, **body: Any) -> dict[str, Any]:
    body = {"model": "smollm2-135m", "temperature": 0, "max_tokens": 24} | body
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": body}


def chat(custom_id: str, text: str, **body: Any) -> dict[str, Any]:
    return request(custom_id, "/v1/chat/completions", messages=[{"role": "user", "content": text}], **body)


REQUESTS = [
    chat("capital", "What is the capital of France?"),
    chat("alias", "Name three fruits.", model="smollm"),
    request("story", "/v1/completions", prompt="Once upon a time", max_tokens=16),
    chat("city", "Describe Paris as JSON with name and capital.", response_format=CITY, max_tokens=60),
    chat("logprobs", "Say yes.", logprobs=True, top_logprobs=2, max_tokens=4),
    chat("cut", "Tell a long story about a dragon.", max_tokens=5),
    chat("refused", "hello", temperature=-3),
    chat("too long", "word " * 3000),
]


def write(path: Path, requests: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in requests))
    return path


def ask_directly(server: VllmServer, requests: list[dict[str, Any]]) -> list[EngineResponse]:
    async def ask() -> list[EngineResponse]:
        async with Endpoint(socket_path=server.socket_path) as endpoint:
            return [
                await endpoint.ask(EngineRequest(0, row["url"], json.dumps(row["body"]).encode(), "direct"))
                for row in requests
            ]

    return asyncio.run(ask())


def content(body: dict[str, Any]) -> tuple[str, str]:
    choice = body["choices"][0]
    return (choice["message"]["content"] if "message" in choice else choice["text"]), choice["finish_reason"]


def test_greedy_answers_are_those_of_the_server_asked_directly(
    vllm_server: VllmServer, demo_entry: ModelEntry, tmp_path: Path
) -> None:
    # One at a time: batches of another make-up may round differently.
    catalog = Catalog([demo_entry.model_copy(update={"concurrency": 1})])
    batch = BatchStore(tmp_path / "data").register(write(tmp_path / "real.jsonl", REQUESTS)).batch
    with batch.lock("test"):
        pipeline.check(batch, catalog)
        report = pipeline.answer(batch, catalog, SharedServer(vllm_server))
        summary = pipeline.publish(batch)

    assert (report.asked, summary.succeeded, summary.failed) == (8, 6, 2)
    answers = {row["custom_id"]: row["response"]["body"] for row in read_jsonl(batch.output_dir / "output.jsonl")}
    good = REQUESTS[:6]
    direct = {
        row["custom_id"]: json.loads(response.body)
        for row, response in zip(good, ask_directly(vllm_server, good), strict=True)
    }
    assert {key: content(body) for key, body in answers.items()} == {k: content(b) for k, b in direct.items()}
    assert {key: body["usage"] for key, body in answers.items()} == {k: b["usage"] for k, b in direct.items()}
    assert "Paris" in content(answers["capital"])[0]
    assert content(answers["cut"])[1] == "length"
    assert summary.truncated == sum(content(body)[1] == "length" for body in answers.values())
    city = json.loads(content(answers["city"])[0])
    assert isinstance(city["name"], str)
    assert isinstance(city["capital"], bool)
    assert len(answers["logprobs"]["choices"][0]["logprobs"]["content"][0]["top_logprobs"]) == 2

    for row in good:
        kind = openai.types.chat.ChatCompletion if "messages" in row["body"] else openai.types.Completion
        kind.model_validate(answers[row["custom_id"]])
    errors = {row["custom_id"]: row for row in read_jsonl(batch.output_dir / "errors.jsonl")}
    assert {key: row["response"]["status_code"] for key, row in errors.items()} == {"refused": 400, "too long": 400}
    assert "temperature" in errors["refused"]["response"]["body"]["error"]["message"]
    assert all(row["error"] is None for row in errors.values())

    rows = pyarrow.dataset.dataset(batch.output_dir / "results").to_table().to_pylist()
    assert [row["custom_id"] for row in rows] == [row["custom_id"] for row in REQUESTS]
    assert sum(row["completion_tokens"] or 0 for row in rows) == summary.completion_tokens > 0


def test_a_run_killed_half_way_goes_on_with_the_server_it_left_warm(demo_entry: ModelEntry, engine_dir: Path) -> None:
    work = engine_dir / "killed"
    work.mkdir()
    requests = [chat(f"r{number}", f"What is {number} plus one?", max_tokens=24, seed=1) for number in range(36)]
    file = write(work / "sums.jsonl", requests)
    entry = demo_entry.model_dump(mode="json", include={"source", "engine_args"}) | {"concurrency": 2}
    (work / "models.yaml").write_text(yaml.safe_dump({"models": {"smollm2-135m": entry}}))
    environment = {name: value for name, value in os.environ.items() if not name.startswith("VLLM_BATCH_")} | {
        "VLLM_BATCH_DATA": str(work / "data"),
        "VLLM_BATCH_RUNTIME_DIR": str(work / "run"),
        "VLLM_BATCH_MODELS_FILE": str(work / "models.yaml"),
    }
    command = [sys.executable, "-m", "vllm_batch_pipelines.cli.main", "run", str(file), "--json"]
    command += ["--option", "chunk_rows=4"]

    with (work / "first.log").open("wb") as log:
        first = subprocess.Popen(command, env=environment, cwd=ROOT, stdout=log, stderr=log)
        try:
            wait_until(lambda: len(committed(work)) >= 8, 240)
        finally:
            first.send_signal(signal.SIGKILL)
            first.wait()
    kept = committed(work)
    assert 8 <= len(kept) < 36
    second = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)

    assert second.returncode == 0, second.stderr
    document = json.loads(second.stdout)
    assert document["request_counts"]["completed"] == 36
    assert document["request_counts"]["asked_now"] == 36 - len(kept)
    rows = {row["line"]: row for row in pyarrow.dataset.dataset(document["results"]).to_table().to_pylist()}
    assert sorted(rows) == list(range(1, 37))
    assert all(rows[line]["finished_at"] == finished for line, finished in kept.items())
    assert (document["models"][0]["warm"], document["models"][0]["load_seconds"]) == (True, 0)
    assert "stays warm for 60 s" in second.stderr
    assert Hosts(work / "run").stop_idle() == ["smollm2-135m"]
    wait_until(lambda: not processes_with(str(work / "run")), 20)


def test_tokens_of_the_rows_are_those_of_the_engines_own_counters(
    vllm_server: VllmServer, demo_entry: ModelEntry, tmp_path: Path
) -> None:
    catalog = Catalog([demo_entry])
    texts = [f"Tell me about the number {number}." for number in range(40)]
    rows = [chat(f"r{n}", text, max_tokens=4 + n, ignore_eos=True) for n, text in enumerate(texts)]
    batch = BatchStore(tmp_path / "data").register(write(tmp_path / "tokens.jsonl", [*rows, *REQUESTS])).batch
    with batch.lock("test"):
        pipeline.check(batch, catalog)
        report = pipeline.answer(batch, catalog, SharedServer(vllm_server)).models[0]
        summary = pipeline.publish(batch)
    assert report.tokens is not None
    assert report.tokens.as_dict() == {
        "useful": {"prompt": summary.prompt_tokens, "completion": summary.completion_tokens},
        "wasted_by_retry": {"prompt": 0, "completion": 0},
        "wasted_by_crash": {"prompt": 0, "completion": 0},
        "lower_bound": False,
    }
    (life,) = json.loads(next(batch.root.glob("results/*/*/usage.json")).read_text())["lives"]
    assert life == {
        "engine": [summary.prompt_tokens, summary.completion_tokens],
        "useful": [summary.prompt_tokens, summary.completion_tokens],
        "ended": "closed",
    }


def test_server_that_is_killed_is_started_again_and_every_line_is_answered(
    demo_entry: ModelEntry, engine_dir: Path, tmp_path: Path
) -> None:
    catalog = Catalog([demo_entry.model_copy(update={"concurrency": 4})])
    rows = [chat(f"r{number}", f"What is {number} plus one?", max_tokens=24, seed=1) for number in range(60)]
    batch = BatchStore(tmp_path / "data").register(write(tmp_path / "sums.jsonl", rows), {"chunk_rows": 4}).batch
    runtime = engine_dir / "dies"
    killed: list[int] = []

    def kill(progress: Progress) -> None:
        if progress.phase == "answer" and progress.done >= 12 and not killed:
            (path,) = (runtime / "servers").iterdir()
            record = HostFolder(path).events.read().record
            assert record
            killed.append(record.pid)
            os.kill(record.pid, signal.SIGKILL)

    with batch.lock("test"):
        pipeline.check(batch, catalog)
        starter = EngineStarter(runtime, tmp_path / "logs")
        report = pipeline.answer(batch, catalog, starter, progress=kill).models[0]
        summary = pipeline.publish(batch)
    assert (summary.succeeded, summary.failed, report.quarantined, report.engine_restarts) == (60, 0, 0, 1)
    assert report.tokens is not None
    assert report.tokens.lower_bound
    assert report.tokens.useful.completion == summary.completion_tokens
    assert Hosts(runtime).stop_idle() == ["smollm2-135m"]
    wait_until(lambda: not processes_with(str(runtime)), 20)


def committed(work: Path) -> dict[int, Any]:
    """Line and time of every committed row, read from the chunks."""
    chunks = sorted((work / "data").glob("batches/*/results/*/*/chunk-*.parquet"))
    if not chunks:
        return {}
    try:
        table = pyarrow.dataset.dataset([str(path) for path in chunks]).to_table(columns=["line", "finished_at"])
    except FileNotFoundError:  # merged meanwhile
        return {}
    return {row["line"]: row["finished_at"] for row in table.to_pylist()}


def processes_with(text: str) -> list[int]:
    found = []
    for process in Path("/proc").iterdir():
        if process.name.isdigit() and int(process.name) != os.getpid():
            try:
                if text.encode() in (process / "cmdline").read_bytes():
                    found.append(int(process.name))
            except OSError:
                continue
    return found
