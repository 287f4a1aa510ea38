"""Our own vLLM server: real answers, real deaths. About a minute of loading for each start on two cores."""

import asyncio
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from resources.engine import processes
from resources.engine.catalog import ModelEntry, Residency
from resources.engine.endpoint import Endpoint
from resources.engine.host_folder import HostFolder
from resources.engine.hosts import Hosts
from resources.engine.protocol import EngineRequest, EngineResponse
from resources.engine.vllm_server import VllmServer
from resources.errors import EngineStartFailed
from tests.engine_world import engine_world
from tests.helpers import wait_until

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

ROOT = Path(__file__).resolve().parents[2]
RUN = """
import json, signal, sys
from pathlib import Path
from resources.engine.catalog import ModelEntry
from resources.engine.vllm_server import VllmServer
folder = Path(sys.argv[1])
server = VllmServer(ModelEntry.model_validate_json(sys.argv[2]), runtime_dir=folder, log_dir=folder)
server.start()
print(json.dumps({"host": server.host_pid, "warm": server.warm}), flush=True)
signal.pause()
"""

# vLLM refuses sleep mode on a CPU, but has its endpoints there: all happens but the moving of memory.
WITHOUT_SLEEP_MODE = """
import runpy, sys
sys.argv.remove("--enable-sleep-mode")
runpy.run_module("vllm.entrypoints.openai.api_server", run_name="__main__")
"""
EMBEDDER = ROOT / "models" / "all-minilm-l6-v2"


@pytest.fixture
def folder() -> Iterator[Path]:
    made = Path(tempfile.mkdtemp(dir="/tmp", prefix="vb"))
    yield made
    shutil.rmtree(made)


def ask(server: VllmServer, url: str, **body: Any) -> EngineResponse:
    async def go() -> EngineResponse:
        async with Endpoint(socket_path=server.socket_path) as endpoint:
            return await endpoint.ask(EngineRequest(1, url, json.dumps(body).encode(), "batch-1"))

    return asyncio.run(go())


def chat(server: VllmServer, content: object, model: str = "smollm2-135m") -> EngineResponse:
    messages = [{"role": "user", "content": content}]
    return ask(server, "/v1/chat/completions", model=model, messages=messages, max_tokens=12, temperature=0)


def our_record(folder: Path) -> processes.Record:
    (path,) = (folder / "servers").iterdir()
    events = HostFolder(path).events
    record = events.read().record
    events.close()
    assert record
    return record


def members(record: processes.Record) -> list[int]:
    """Every process of the server's session, whoever it belongs to; seen with eyes of our own."""
    return [p.pid for p in processes.processes() if record.pid in (p.session, p.group) and not p.dead]


def locks_are_free(folder: Path) -> bool:
    for file in (folder / "devices").glob("*.lock"):
        with file.open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
    return True


@pytest.mark.parametrize("model", ["smollm2-135m", "smollm"])
def test_a_chat_is_answered_under_the_name_and_the_alias(vllm_server: VllmServer, model: str) -> None:
    response = chat(vllm_server, "What is the capital of France?", model)
    answer = json.loads(response.body)
    assert (response.status, response.request_id) == (200, "batch-1")
    assert "Paris" in answer["choices"][0]["message"]["content"]


def test_what_vllm_refuses_comes_back_as_it_says(vllm_server: VllmServer) -> None:
    response = chat(vllm_server, "hello", "another-model")
    assert response.status == 404
    assert "another-model" in json.loads(response.body)["error"]["message"]


def test_the_log_is_private_and_holds_no_request(vllm_server: VllmServer) -> None:
    assert chat(vllm_server, "xylophone").status == 200
    assert vllm_server.log_path.stat().st_mode & 0o777 == 0o600
    text = vllm_server.log_path.read_text()
    assert "xylophone" not in text
    assert "POST /v1" not in text


def test_media_is_not_fetched(vllm_server: VllmServer) -> None:
    picture = {"type": "image_url", "image_url": {"url": "http://127.0.0.1:9/picture.png"}}
    response = chat(vllm_server, [{"type": "text", "text": "what is this?"}, picture])
    assert 400 <= response.status < 500


@pytest.mark.parametrize(
    ("update", "said"),
    [
        ({"engine_args": {"no_such_argument": 3}}, "unrecognized arguments: --no-such-argument=3"),
        ({"env": {"VLLM_CPU_KVCACHE_SPACE": "4000"}}, "is less than requested memory for kv"),
    ],
    ids=["a wrong argument", "too little memory"],
)
def test_why_a_server_does_not_start_is_told_in_the_words_of_vllm(
    demo_entry: ModelEntry, folder: Path, update: dict[str, Any], said: str
) -> None:
    entry = demo_entry.model_copy(update=update)
    server = VllmServer(entry, runtime_dir=folder, log_dir=folder)
    with pytest.raises(EngineStartFailed, match=said):
        server.start()
    wait_until(lambda: locks_are_free(folder))


@contextmanager
def run(folder: Path, entry: ModelEntry) -> Iterator[tuple[subprocess.Popen[bytes], dict[str, Any]]]:
    """A run in a process of its own whose server is up, and what it says."""
    process = subprocess.Popen(
        [sys.executable, "-c", RUN, str(folder), entry.model_dump_json()],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE,
    )  # fmt: skip
    try:
        assert process.stdout
        with process.stdout as out:
            yield process, json.loads(out.readline())
    finally:
        process.kill()
        process.wait()


def see_nothing_left(record: processes.Record, folder: Path) -> None:
    wait_until(lambda: not members(record) and locks_are_free(folder), 30)
    assert not list((folder / "servers").iterdir())


def test_after_its_run_is_killed_a_server_is_warm_for_the_next_and_ends_after_the_last(
    demo_entry: ModelEntry, folder: Path
) -> None:
    entry = demo_entry.model_copy(update={"keep_alive": 4})
    with run(folder, entry) as (_, told):
        assert not told["warm"]
    record = our_record(folder)
    with VllmServer(entry, runtime_dir=folder, log_dir=folder) as server:
        server.start()
        assert server.warm
        assert chat(server, "What is the capital of France?").status == 200
        assert our_record(folder) == record
    see_nothing_left(record, folder)


@pytest.mark.parametrize("victims", [["host"], ["run", "host", "server"]], ids="+".join)
def test_a_sigkill_leaves_no_process_and_no_lock(demo_entry: ModelEntry, folder: Path, victims: list[str]) -> None:
    with run(folder, demo_entry) as (process, told):
        record = our_record(folder)
        assert len(members(record)) >= 3  # the API server, its engine core, and at least one worker
        pids = {"run": process.pid, "host": told["host"], "server": record.pid}
        for victim in victims:
            os.kill(pids[victim], signal.SIGSTOP)
        for victim in victims:
            os.kill(pids[victim], signal.SIGKILL)
        see_nothing_left(record, folder)


@pytest.mark.parametrize("model", ["chat", "embeddings"])
def test_the_endpoints_of_sleep_mode_are_what_the_host_takes_them_for(demo_entry: ModelEntry, model: str) -> None:
    """Everything of it that there is on a CPU. That a GPU's memory is freed and filled again is not seen here."""
    embedder = ModelEntry(name="minilm", source=str(EMBEDDER), engine_args={"dtype": "float32", "enforce_eager": True})
    entry = (demo_entry if model == "chat" else embedder).model_copy(
        update={"residency": Residency.SLEEP, "env": {"VLLM_CPU_KVCACHE_SPACE": "2"}}
    )
    command = [sys.executable, "-P", "-c", WITHOUT_SLEEP_MODE]
    with engine_world(gpus=1) as world, stopped_at_last(world.hosts):

        def real() -> VllmServer:
            folder = world.folder
            return VllmServer(entry, runtime_dir=folder, log_dir=folder, gpus=lambda: world.gpus, command=command)

        with real() as server:
            server.start()
        record = our_record(world.folder)
        with world.server(name="other") as other:
            other.start()
            assert world.see(entry.name, "asleep")
        with real() as server:
            server.start()
            assert server.woken, server.log_tail()
            if model == "chat":
                answer = json.loads(chat(server, "What is the capital of France?").body)
                assert "Paris" in answer["choices"][0]["message"]["content"]
            else:
                assert ask(server, "/v1/embeddings", model="minilm", input="a").status == 200
    assert not members(record)


@contextmanager
def stopped_at_last(hosts: Hosts) -> Iterator[None]:
    """A real server's processes are ended by its host; the world of the stand-in would not know them."""
    try:
        yield
    finally:
        hosts.stop([status.id for status in hosts.status()], now=True)
        wait_until(lambda: not hosts.status(), 60)
