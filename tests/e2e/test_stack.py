"""`vllm-batch up` for real: what is dropped or submitted gets done, and nothing that dies takes it away."""

import json
import os
import pty
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pyarrow.parquet as pq
import pytest
import yaml
from dagster import DagsterRun, DagsterRunStatus, RunsFilter

from resources.batch_store.batch import Batch
from resources.batch_store.status import status_of
from resources.batch_store.store import BatchStore
from resources.settings import Settings
from tests.helpers import ROOT, AnsweringServer, chat, chats, ids, wait_until
from vllm_batch_pipelines.stack import instance_env, stack_state

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(400)]

CLI = [sys.executable, "-m", "vllm_batch_pipelines.cli.main"]
SWEEP_SECONDS = 100
"""It comes every minute, and the run it starts is a new interpreter."""
ANSWERED_FIRST = 10
BATCH_ASSETS = ["batch_requests", "batch_results", "batch_output"]
OPTIONS = ["--option", "chunk_rows=5", "--option", "flush_seconds=0.2"]


@dataclass
class Stack:
    """A data root, and the `vllm-batch up` on it."""

    folder: Path
    server: AnsweringServer
    process: subprocess.Popen[bytes] | None = None
    options: tuple[str, ...] = ()
    held: set[str] = field(default_factory=set)

    @property
    def settings(self) -> Settings:
        return Settings(
            data=self.folder / "data", models_file=self.folder / "models.yaml", runtime_dir=self.folder / "run"
        )

    @property
    def environment(self) -> dict[str, str]:
        set_here = {
            "VLLM_BATCH_DATA": str(self.settings.data_root),
            "VLLM_BATCH_MODELS_FILE": str(self.settings.models_file),
            "VLLM_BATCH_RUNTIME_DIR": str(self.folder / "run"),
        }
        return os.environ | set_here

    @property
    def log(self) -> Path:
        return self.folder / "up.log"

    @property
    def url(self) -> str:
        state = stack_state(self.settings)
        return str(state["url"]) if state and state["url"] else ""

    @property
    def store(self) -> BatchStore:
        return BatchStore(self.settings.data_root)

    def up(self) -> None:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*CLI, "up", "--port", "0", *self.options],
                cwd=self.folder,
                env=self.environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        wait_until(lambda: self.url or self.has_ended(), 90)
        assert self.url, self.log.read_text()

    def has_ended(self) -> bool:
        return self.process is None or self.process.poll() is not None

    def ensure_up(self) -> None:
        if self.has_ended():
            self.up()

    def start(self, *arguments: str | Path, **options: Any) -> subprocess.Popen[str]:
        command = [*CLI, *map(str, arguments)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
        return subprocess.Popen(command, cwd=self.folder, env=self.environment, text=True, **pipes)

    def call(self, *arguments: str | Path) -> tuple[int, str, str]:
        process = self.start(*arguments)
        output, errors = process.communicate(timeout=120)
        return process.returncode, output, errors

    def file(self, name: str, content: str) -> Path:
        path = self.folder / name
        path.write_text(content)
        return path

    def graphql(self, query: str, headers: dict[str, str] | None = None, **variables: Any) -> Any:
        body = json.dumps({"query": query, "variables": variables}).encode()
        request = urllib.request.Request(
            f"{self.url}/graphql", body, {"Content-Type": "application/json"} | (headers or {})
        )
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(request, timeout=30) as response:
            answer = json.load(response)
        assert "errors" not in answer, answer
        return answer["data"]

    def runs(self, key: str) -> list[DagsterRun]:
        """Latest first."""
        with instance_env(self.settings) as instance:
            return list(instance.get_runs(RunsFilter(tags={"dagster/partition": key})))

    def processes(self) -> dict[int, str]:
        """Whatever lives and belongs to this data root: by its environment, or by its command line (PostgreSQL)."""
        mark, root = f"VLLM_BATCH_DATA={self.settings.data_root}".encode(), str(self.settings.data_root).encode()
        found = {}
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and int(entry.name) != os.getpid():
                with suppress(OSError):
                    command = (entry / "cmdline").read_bytes()
                    if command and (root in command or mark in (entry / "environ").read_bytes().split(b"\0")):
                        found[int(entry.name)] = command.replace(b"\0", b" ").decode()
        return found

    def kill_everything(self) -> None:
        def kill() -> bool:
            for pid in (left := self.processes()):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            if self.process is not None:
                self.process.poll()
            return not left

        wait_until(kill, 20)

    # A batch that stands still in mid-run: its first lines are answered and committed, the others are in flight.

    def held_file(self, name: str, lines: int = 30) -> Path:
        self.server.gate.clear()
        texts = [f"{name} {number}" for number in range(lines)]
        self.held |= set(texts[ANSWERED_FIRST:])
        return self.file(f"{name}.jsonl", "".join(chat(text, text, "held") for text in texts))

    def begin_held_batch(self, name: str) -> Batch:
        code, output, errors = self.call("submit", self.held_file(name), *OPTIONS, "--json")
        assert code == 0, errors
        batch = self.store.get(json.loads(output)["key"])
        self.wait_until_held(batch)
        return batch

    def wait_until_held(self, batch: Batch) -> None:
        wait_until(lambda: committed_rows(batch) == ANSWERED_FIRST and batch.locked_by() is not None, 60)

    def finished(self, batch: Batch, seconds: float) -> None:
        wait_until(lambda: status_of(self.store, batch).state == "completed", seconds)


def committed_rows(batch: Batch) -> int:
    try:
        return sum(pq.read_metadata(chunk).num_rows for chunk in batch.results_dir.rglob("chunk-*.parquet"))
    except FileNotFoundError:
        return -1  # merged just now


def answered_once_each(stack: Stack, batch: Batch, name: str, lines: int = 30) -> None:
    """No line is lost, and none that was committed was asked again."""
    texts = [f"{name} {number}" for number in range(lines)]
    assert ids(batch.output_dir / "output.jsonl") == texts
    assert [stack.server.asked.count(text) for text in texts[:ANSWERED_FIRST]] == [1] * ANSWERED_FIRST


class Terminal:
    """What a process shows on a terminal, read all the time: a full one would make it wait."""

    def __init__(self) -> None:
        self.shown = ""
        self._read_from, self.write_to = pty.openpty()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        with suppress(OSError):  # how Linux says that the other side is closed
            while piece := os.read(self._read_from, 65536):
                self.shown += piece.decode(errors="replace")

    def close(self) -> None:
        os.close(self.write_to)
        self._reader.join(10)
        os.close(self._read_from)


@pytest.fixture(scope="module")
def whole_stack() -> Iterator[Stack]:
    with tempfile.TemporaryDirectory(prefix="vb-") as made, AnsweringServer() as server:
        stack = Stack(Path(made), server)
        server.hold = lambda text: text in stack.held
        models = {
            "dry-run": {"engine": "null"},
            "hosted": {"engine": "openai", "base_url": server.url},
            "held": {"engine": "openai", "base_url": server.url, "concurrency": 4},
        }
        stack.file("models.yaml", yaml.safe_dump({"models": models}))
        try:
            yield stack
            server.gate.set()
            assert stack.call("down")[0] == 0
            assert stack.processes() == {}
        finally:
            server.gate.set()
            stack.kill_everything()
            for left in (stack.folder.parent).glob(f"{stack.folder.name}*-*"):
                shutil.rmtree(left)


@pytest.fixture
def stack(whole_stack: Stack) -> Stack:
    whole_stack.ensure_up()
    return whole_stack


# --- In and out -----------------------------------------------------------------------------------------------------


def test_a_dropped_file_is_answered_within_seconds(
    stack: Stack, record_property: Callable[[str, object], None]
) -> None:
    began = time.monotonic()
    (stack.settings.inbox_dir / "dropped.jsonl").write_text(chats(10))
    published = wait_until(lambda: list(stack.settings.data_root.glob("batches/dropped-*/output/output.jsonl")), 60)
    seconds = time.monotonic() - began
    record_property("seconds_from_drop_to_outputs", round(seconds, 1))
    print(f"\nfrom drop to outputs: {seconds:.1f} s")
    assert ids(published[0]) == [f"r{number}" for number in range(1, 11)]
    assert seconds < 30  # the target is 15; a busy machine may take longer


def test_submit_and_wait_tells_by_its_exit_code_how_it_went(stack: Stack) -> None:
    bad_line = '{"custom_id": "bad"}\n'
    files = {
        "good": stack.file("good.jsonl", chats(20, "good", "hosted")),
        "some": stack.file("some.jsonl", chats(2, "some") + bad_line),
        "none": stack.file("none.jsonl", bad_line),
    }
    waiting = {name: stack.start("submit", path, "--wait", "--json") for name, path in files.items()}
    second = stack.start("submit", files["good"], "--wait", "--json")
    documents = {name: json.loads(process.communicate(timeout=120)[0]) for name, process in waiting.items()}
    also = json.loads(second.communicate(timeout=120)[0])
    assert {name: process.returncode for name, process in waiting.items()} == {"good": 0, "some": 1, "none": 2}
    assert (second.returncode, also["key"], also["state"]) == (0, documents["good"]["key"], "completed")
    assert {name: document["state"] for name, document in documents.items()} == {
        "good": "completed",
        "some": "completed",
        "none": "failed",
    }
    assert (documents["some"]["succeeded"], documents["some"]["failed"]) == (2, 1)
    assert "None of the 1 lines is valid" in documents["none"]["error"]
    assert stack.server.asked.count("good") == 20  # two asked for it, one did it


def test_waiting_ends_where_the_run_fails_before_it_comes_to_the_batch(stack: Stack) -> None:
    batch = stack.store.register(stack.file("early.jsonl", chats(2, "early"))).batch
    models = stack.settings.models_file.read_text()
    stack.file("models.yaml", "models: [")
    try:
        code, _, errors = stack.call("retry", batch.key, "--wait")
    finally:
        stack.file("models.yaml", models)
    assert code == 2
    assert "was failure; the web UI has its log" in errors


# --- From the UI ----------------------------------------------------------------------------------------------------

_SELECTOR = {"repositoryLocationName": "vllm_batch_pipelines", "repositoryName": "__repository__"}
_ADD = """mutation($selector: RepositorySelector!, $key: String!) { addDynamicPartition(
    repositorySelector: $selector, partitionsDefName: "batch_files", partitionKey: $key) { __typename } }"""
_MATERIALIZE = """mutation($params: ExecutionParams!) { launchPipelineExecution(executionParams: $params) {
    __typename ... on LaunchRunSuccess { run { runId } } ... on PythonError { message } } }"""
_BACKFILL = """mutation($params: LaunchBackfillParams!) { launchPartitionBackfill(backfillParams: $params) {
    __typename ... on LaunchBackfillSuccess { backfillId } ... on PythonError { message } } }"""


def add_partition(stack: Stack, key: str) -> None:
    answer = stack.graphql(_ADD, selector=_SELECTOR, key=key)["addDynamicPartition"]
    assert answer["__typename"] == "AddDynamicPartitionSuccess", answer


def materialize(stack: Stack, key: str) -> str:
    """As the button of the UI does it; the id of the run."""
    selection = [{"path": [name]} for name in BATCH_ASSETS]
    selector = _SELECTOR | {"pipelineName": "__ASSET_JOB", "assetSelection": selection}
    tags = [{"key": "dagster/partition", "value": key}]
    params = {"selector": selector, "runConfigData": {}, "executionMetadata": {"tags": tags}}
    answer = stack.graphql(_MATERIALIZE, params=params)["launchPipelineExecution"]
    assert answer["__typename"] == "LaunchRunSuccess", answer
    return str(answer["run"]["runId"])


def wait_for_run(stack: Stack, run_id: str, seconds: float = 60) -> DagsterRun:
    with instance_env(stack.settings) as instance:

        def ended() -> DagsterRun | None:
            run = instance.get_run_by_id(run_id)
            return run if run is not None and run.is_finished else None

        run = wait_until(ended, seconds)
        assert run is not None
        return run


def test_the_ui_materializes_one_partition_and_an_unknown_key_fails_with_what_to_do(stack: Stack) -> None:
    batch = stack.store.register(stack.file("ui.jsonl", chats(3, "ui"))).batch
    for key in (batch.key, "typed-by-hand"):
        add_partition(stack, key)
    good, unknown = materialize(stack, batch.key), materialize(stack, "typed-by-hand")
    assert wait_for_run(stack, good).status is DagsterRunStatus.SUCCESS
    assert ids(batch.output_dir / "output.jsonl") == ["r1", "r2", "r3"]
    assert wait_for_run(stack, unknown).status is DagsterRunStatus.FAILURE
    with instance_env(stack.settings) as instance:
        told = "\n".join(str(entry.dagster_event) for entry in instance.all_logs(unknown) if entry.dagster_event)
    assert "No batch is registered under 'typed-by-hand'" in told
    assert "register_files" in told


def test_a_backfill_runs_each_partition(stack: Stack) -> None:
    batches = [stack.store.register(stack.file(f"{name}.jsonl", chats(3, name))).batch for name in ("first", "second")]
    keys = [batch.key for batch in batches]
    for key in keys:
        add_partition(stack, key)
    selection = [{"path": [name]} for name in BATCH_ASSETS]
    params = {"assetSelection": selection, "partitionNames": keys}
    answer = stack.graphql(_BACKFILL, params=params)["launchPartitionBackfill"]
    assert answer["__typename"] == "LaunchBackfillSuccess", answer
    of_backfill = {"dagster/backfill": answer["backfillId"]}
    with instance_env(stack.settings) as instance:

        def ended() -> list[DagsterRun]:
            runs = list(instance.get_runs(RunsFilter(tags=of_backfill)))
            return runs if len(runs) == len(keys) and all(run.is_finished for run in runs) else []

        runs = wait_until(ended, 90)
    assert sorted(run.tags["dagster/partition"] for run in runs) == sorted(keys)
    for run in runs:
        # A sweep that saw the new partition in that moment may have started it too: then it was the one to do it.
        assert run.status is DagsterRunStatus.SUCCESS or "vllm_batch/locked" in run.tags
    for batch in batches:
        stack.finished(batch, 30)
        assert ids(batch.output_dir / "output.jsonl") == ["r1", "r2", "r3"]


def test_another_site_cannot_start_anything(stack: Stack) -> None:
    batch = stack.store.register(stack.file("forged.jsonl", chats(3, "forged"))).batch
    with pytest.raises(urllib.error.HTTPError) as refusal:
        stack.graphql(_ADD, {"Origin": "http://evil.example"}, selector=_SELECTOR, key=batch.key)
    assert refusal.value.code == 403
    with instance_env(stack.settings) as instance:
        assert batch.key not in instance.get_dynamic_partitions("batch_files")


# --- What dies, and what goes on ------------------------------------------------------------------------------------


def test_a_cancelled_batch_rests_until_it_is_retried_and_a_killed_one_goes_on_by_itself(stack: Stack) -> None:
    terminal = Terminal()
    waiting = stack.start("submit", stack.held_file("cancelled"), *OPTIONS, "--wait", stderr=terminal.write_to)
    wait_until(lambda: f"{ANSWERED_FIRST}/30" in terminal.shown, 60)
    (cancelled,) = [batch for batch in stack.store if batch.spec.source_name == "cancelled.jsonl"]
    stack.wait_until_held(cancelled)
    code, _, errors = stack.call("cancel", cancelled.key)
    assert code == 0, errors
    assert "cancelled run" in errors
    wait_until(lambda: cancelled.locked_by() is None, 30)
    assert waiting.wait(60) == 3, terminal.shown
    waiting.communicate()
    terminal.close()
    runs_when_cancelled = [run.status for run in stack.runs(cancelled.key)]
    assert runs_when_cancelled[-1] is DagsterRunStatus.CANCELED

    killed = stack.begin_held_batch("killed")
    worker = int((killed.locked_by() or {})["pid"])
    os.kill(worker, signal.SIGKILL)
    wait_until(lambda: killed.locked_by() is None)
    wait_until(lambda: killed.locked_by() is not None, SWEEP_SECONDS)
    assert [run.status for run in stack.runs(cancelled.key)] == runs_when_cancelled  # that sweep left it alone
    stack.server.gate.set()
    stack.finished(killed, 60)
    answered_once_each(stack, killed, "killed")

    code, _, errors = stack.call("retry", cancelled.key, "--wait")
    assert code == 0, errors
    answered_once_each(stack, cancelled, "cancelled")


def test_batches_go_on_after_a_power_cut_and_after_ctrl_c(stack: Stack) -> None:
    cut_off = stack.begin_held_batch("power-cut")
    assert any("postgres" in command for command in stack.processes().values())
    stack.kill_everything()
    wait_until(lambda: cut_off.locked_by() is None)

    stack.up()
    interrupted = stack.begin_held_batch("interrupted")
    assert stack.process is not None
    port = urlsplit(stack.url).port or 0
    os.killpg(stack.process.pid, signal.SIGINT)
    assert stack.process.wait(60) == 0, stack.log.read_text()
    assert stack.processes() == {}
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", port)) != 0
    assert committed_rows(interrupted) == ANSWERED_FIRST

    stack.server.gate.set()
    stack.up()
    for name, batch in {"power-cut": cut_off, "interrupted": interrupted}.items():
        stack.finished(batch, SWEEP_SECONDS)
        answered_once_each(stack, batch, name)
    for batch, first_end in ((cut_off, DagsterRunStatus.FAILURE), (interrupted, DagsterRunStatus.CANCELED)):
        wait_for_run(stack, stack.runs(batch.key)[0].run_id)
        ends = [run.status for run in stack.runs(batch.key)]
        assert ends[0] is DagsterRunStatus.SUCCESS
        assert ends[-1] in (first_end, DagsterRunStatus.CANCELED)  # the first Ctrl-C may have come before a sweep


def test_the_definitions_load_without_a_word_of_warning() -> None:
    """Warnings that come up in our own modules are shown by `-W default`; Dagster's own log is not looked at."""
    with tempfile.TemporaryDirectory(prefix="vb-") as home:
        done = subprocess.run(
            [sys.executable, "-W", "default", "-m", "dagster", "definitions", "validate", "-w", "workspace.yaml"],
            cwd=ROOT,
            env=os.environ | {"DAGSTER_HOME": home, "VLLM_BATCH_DATA": home, "VLLM_BATCH_RUNTIME_DIR": f"{home}/r"},
            capture_output=True,
            text=True,
            timeout=120,
        )
    told = done.stdout + done.stderr
    assert done.returncode == 0, told
    assert "Validation successful" in told
    ours = [line for line in told.splitlines() if line.startswith(f"{ROOT}/") and ".venv" not in line]
    assert ours == []
    assert "partitions_def on an AssetCheckSpec" not in told
