"""What tests of every kind share."""

import asyncio
import importlib
import inspect
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar, cast

import pyarrow.parquet as pq
import pytest
import yaml
from dagster import DagsterInstance, Definitions, ExecuteInProcessResult, JobDefinition

from resources import pipeline
from resources.batch_store.batch import Batch
from resources.batch_store.inbox import Inbox
from resources.batch_store.store import BatchStore
from resources.engine.catalog import Catalog, EngineKind, ModelEntry, load_catalog
from resources.engine.factory import EngineStarter
from resources.engine.protocol import EngineRequest, EngineResponse, RunningEngine
from resources.postgres import EmbeddedPostgres
from resources.settings import Settings, load_settings, settings

T = TypeVar("T")
ROOT = Path(__file__).resolve().parents[1]
PARTITIONS = "batch_files"
CHAT = "/v1/chat/completions"


def wait_until(condition: Callable[[], T], seconds: float = 10.0) -> T:
    """The condition's value as soon as it is true.

    Raises:
        AssertionError: it was not within that time.
    """
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"not within {seconds:g} s: {getattr(condition, '__qualname__', condition)}"
        time.sleep(0.02)
    return value


# --- Input files ----------------------------------------------------------------------------------------------------


def chat(custom_id: str, text: str = "hello", model: str = "dry-run", **body: Any) -> str:
    """One good line."""
    messages = [{"role": "user", "content": text}]
    request = {"custom_id": custom_id, "method": "POST", "url": "/v1/chat/completions"}
    return json.dumps(request | {"body": {"model": model, "messages": messages} | body}) + "\n"


def chats(count: int, text: str = "hello", model: str = "dry-run", **body: Any) -> str:
    """Good lines with the ids r1, r2 and so on. Another text is another batch."""
    return "".join(chat(f"r{number}", text, model, **body) for number in range(1, count + 1))


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def ids(path: Path) -> list[str]:
    """The custom_ids of an output file, in its order."""
    return [line["custom_id"] for line in read_jsonl(path)]


def drop(folder: Path, name: str, content: str | bytes, age_seconds: float = 60) -> Path:
    """A file in a drop folder that was written a while ago."""
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    then = time.time() - age_seconds
    os.utime(path, (then, then))
    return path


# --- A data root of a test's own, seen by the real definitions ------------------------------------------------------


@dataclass(frozen=True)
class World:
    """A data root with its inbox and catalog, and the shared Dagster instance. The environment points at it."""

    root: Path
    settings: Settings
    instance: DagsterInstance
    definitions: Definitions

    @property
    def store(self) -> BatchStore:
        return BatchStore(self.settings.data_root)

    @property
    def catalog(self) -> Catalog:
        return load_catalog(self.settings.models_file)

    @property
    def inbox(self) -> Inbox:
        """As a sensor's tick opens it: what it knows is what the index file holds."""
        return Inbox(self.settings.inbox_dir, self.settings.data_root / "inbox-index.json")

    def chats(self, count: int, text: str = "hello", **body: Any) -> str:
        """Good lines that no other test has, so that their batch is this test's alone in the shared instance."""
        return chats(count, f"{text} ({self.root})", **body)

    def add_model(self, name: str, **entry: Any) -> None:
        models = yaml.safe_load(self.settings.models_file.read_text())
        models["models"][name] = entry
        self.settings.models_file.write_text(yaml.safe_dump(models))

    def drop(self, name: str, content: str | bytes) -> Path:
        return drop(self.settings.inbox_dir, name, content)

    def register(self, name: str, content: str, **options: Any) -> Batch:
        """A batch that is registered, and a partition of it."""
        path = self.root / name
        path.write_text(content)
        batch = self.store.register(path, options).batch
        self.instance.add_dynamic_partitions(PARTITIONS, [batch.key])
        return batch

    def finish(self, batch: Batch) -> None:
        """What `vllm-batch run` does with a batch."""
        engines = EngineStarter(self.settings.runtime_root, self.settings.data_root / "logs" / "engines")
        with batch.lock("vllm-batch run"):
            pipeline.check(batch, self.catalog)
            pipeline.answer(batch, self.catalog, engines)
            pipeline.publish(batch)

    def job(self, name: str = "process_batch") -> JobDefinition:
        return self.definitions.resolve_job_def(name)

    def run(
        self, key: str, job: str = "process_batch", config: dict[str, Any] | None = None, **options: Any
    ) -> ExecuteInProcessResult:
        """A run of a job on a partition, in this process, in the real instance."""
        return self.job(job).execute_in_process(
            instance=self.instance, partition_key=key, run_config=config, raise_on_error=False, **options
        )


@contextmanager
def new_instance() -> Iterator[DagsterInstance]:
    """Dagster as `vllm-batch up` sets it up: the root's dagster.yaml over an embedded PostgreSQL.

    Not below pytest's own folder, which every other pytest of root closes again to the user that PostgreSQL runs as.
    """
    with tempfile.TemporaryDirectory(prefix="vb-") as made, pytest.MonkeyPatch.context() as environment:
        home = Path(made)
        shutil.copyfile(ROOT / "dagster.yaml", home / "dagster.yaml")
        with EmbeddedPostgres(home / "data", home / "runtime") as server:
            environment.setenv("DAGSTER_HOME", str(home))
            environment.setenv("DAGSTER_POSTGRES_URL", server.url)
            loaded = DagsterInstance.get()
            environment.undo()
            with loaded:
                yield loaded
        if server.socket_dir.exists():
            shutil.rmtree(server.socket_dir)


@contextmanager
def new_world(root: Path, instance: DagsterInstance) -> Iterator[World]:
    """A world whose settings are those of this process for as long as the context lasts."""
    (root / "models.yaml").write_text(yaml.safe_dump({"models": {"dry-run": {"engine": "null", "aliases": ["dry"]}}}))
    with pytest.MonkeyPatch.context() as environment, tempfile.TemporaryDirectory(prefix="vb-", dir="/tmp") as runtime:
        environment.chdir(root)  # no `.env` of a developer
        environment.setenv("VLLM_BATCH_DATA", str(root / "data"))
        environment.setenv("VLLM_BATCH_MODELS_FILE", str(root / "models.yaml"))
        environment.setenv("VLLM_BATCH_RUNTIME_DIR", runtime)
        environment.setenv("DAGSTER_POSTGRES_URL", instance.run_storage.postgres_url)  # type: ignore[attr-defined]
        settings.cache_clear()
        try:
            found = load_settings()
            found.inbox_dir.mkdir(parents=True)
            loaded = importlib.reload(importlib.import_module("vllm_batch_pipelines.definitions"))
            yield World(root, found, instance, loaded.defs)
        finally:
            settings.cache_clear()


_HOLDER = """
import sys
from pathlib import Path
from resources.batch_store.lock import writer_lock
with writer_lock(Path(sys.argv[1]), sys.argv[2]):
    print("held", flush=True)
    sys.stdin.read()
"""


@contextmanager
def held_by_another_process(batch: Batch, owner: str = "vllm-batch run") -> Iterator[subprocess.Popen[bytes]]:
    """A batch that another process works on; the process ends with the context."""
    command = [sys.executable, "-c", _HOLDER, str(batch.root / "lock"), owner]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        try:
            yield holder
        finally:
            holder.kill()


# --- An OpenAI-compatible endpoint ----------------------------------------------------------------------------------


@dataclass
class Answer:
    text: str = "an answer"
    status: int = 200
    finish_reason: str = "stop"


@dataclass
class AnsweringServer:
    """A real HTTP server that answers chat requests. Those that `hold` names wait until `gate` is open.

    `asked` has the text of every request in the order of arrival, `answered` of those whose answer went out.
    """

    answer: Callable[[str], Answer] = lambda _: Answer()
    hold: Callable[[str], bool] = lambda _: False
    asked: list[str] = field(default_factory=list)
    answered: list[str] = field(default_factory=list)
    gate: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                text = body["messages"][-1]["content"]
                server.asked.append(text)
                if server.hold(text):
                    server.gate.wait(120)
                self._reply(server.answer(text))
                server.answered.append(text)

            def _reply(self, answer: Answer) -> None:
                choice = {
                    "index": 0,
                    "message": {"role": "assistant", "content": answer.text},
                    "finish_reason": answer.finish_reason,
                }
                usage = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
                good = {"id": "c", "object": "chat.completion", "model": "m", "choices": [choice], "usage": usage}
                content = json.dumps(good if answer.status < 400 else {"error": {"message": answer.text}}).encode()
                try:
                    self.send_response(answer.status)
                    self.send_header("Content-Type", "application/json")
                    self.send_header("Content-Length", str(len(content)))
                    self.end_headers()
                    self.wfile.write(content)
                except OSError:
                    self.close_connection = True  # who asked is gone

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._http.server_address[1]}/v1"

    def __enter__(self) -> Self:
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.gate.set()
        self._http.shutdown()
        self._http.server_close()


# --- Engines in this process -----------------------------------------------------------------------------------------


def completion(text: str = "fine", **fields: Any) -> bytes:
    """The body of a chat completion."""
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    usage = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
    head = {"id": "c", "object": "chat.completion", "created": 1, "model": "m"}
    return json.dumps({**head, "choices": [choice], "usage": usage, **fields}, separators=(",", ":")).encode()


def ok(request: EngineRequest, text: str = "fine") -> EngineResponse:
    return EngineResponse(200, completion(text), request.request_id)


def refusal(status: int, message: str = "no", retry_after: float | None = None) -> EngineResponse:
    return EngineResponse(status, json.dumps({"error": {"message": message}}).encode(), "engine-1", retry_after)


Reply = Callable[[EngineRequest], EngineResponse | Awaitable[EngineResponse]]


class FakeEngine:
    """Answers as `reply` says, at once or later; notes what it was asked, and how many requests were in flight."""

    def __init__(self, reply: Reply = ok) -> None:
        self.reply = reply
        self.asked: list[EngineRequest] = []
        self.levels: list[int] = []
        self.in_flight = 0

    @property
    def lines(self) -> list[int]:
        return [request.line for request in self.asked]

    async def ask(self, request: EngineRequest) -> EngineResponse:
        self.asked.append(request)
        self.in_flight += 1
        self.levels.append(self.in_flight)
        try:
            await asyncio.sleep(0)
            answer = self.reply(request)
            return await answer if inspect.isawaitable(answer) else answer
        finally:
            self.in_flight -= 1

    @asynccontextmanager
    async def connect(self) -> AsyncIterator["FakeEngine"]:
        yield self


class FakeStarter:
    """Starts that engine for every model; notes which models it was asked for."""

    def __init__(self, engine: FakeEngine, warm: Iterable[str] = ()) -> None:
        self.engine = engine
        self.started: list[str] = []
        self._warm = set(warm)

    def warm(self, entries: Iterable[ModelEntry]) -> set[str]:
        return self._warm

    @contextmanager
    def start(
        self, entry: ModelEntry, stop: threading.Event, waiting: Callable[[str], None]
    ) -> Iterator[RunningEngine]:
        self.started.append(entry.name)
        yield RunningEngine(self.engine.connect)


@dataclass
class Asked:
    """A batch of some lines, run from check to publish by an engine in this process."""

    folder: Path
    text: str
    options: dict[str, Any] = field(default_factory=dict)
    catalog: Catalog = field(default_factory=lambda: catalog_of())

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "in.jsonl").write_text(self.text)
        self.store = BatchStore(self.folder / "data")
        self.batch = self.store.register(self.folder / "in.jsonl", self.options).batch

    def run(self, reply: Reply | None = None, **answer: Any) -> FakeEngine:
        """All three steps with an engine that answers `reply`; what it was asked."""
        engine = FakeEngine(reply or ok)
        with self.batch.lock("a test"):
            pipeline.check(self.batch, self.catalog)
            self.report = pipeline.answer(self.batch, self.catalog, cast(EngineStarter, FakeStarter(engine)), **answer)
            self.summary = pipeline.publish(self.batch, progress=answer.get("progress", lambda _: None))
        return engine

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The published rows."""
        parts = sorted((self.batch.output_dir / "results").glob("part-*.parquet"))
        return [row for part in parts for row in pq.read_table(part).to_pylist()]


def catalog_of(*names: str, **fields: Any) -> Catalog:
    """A catalog whose models (`dry-run` where none is named) answer at once, or as `fields` say."""
    entry = {"engine": EngineKind.NULL, **fields}
    return Catalog([ModelEntry(name=name, **entry) for name in names or ("dry-run",)])


# --- Processes --------------------------------------------------------------------------------------------------------


def python(*arguments: str | Path, env: dict[str, str] | None = None, cwd: Path | None = None) -> subprocess.Popen[str]:
    """This Python with the project on its path, and none of our settings but those given."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("VLLM_BATCH_", "DAGSTER_"))}
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        env={**clean, "PYTHONPATH": str(ROOT), "NO_COLOR": "1", "COLUMNS": "200", **(env or {})},
        cwd=cwd,
        text=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
