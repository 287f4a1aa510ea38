"""Engines that benchmarks measure: the demo model on a server of ours, other programs in process groups, and passes."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from benchmarks.common import ROOT, Unfit
from resources import pipeline
from resources.answering import ModelReport
from resources.batch_store.store import BatchStore
from resources.engine.catalog import Catalog, ModelEntry
from resources.engine.factory import EngineStarter, running
from resources.engine.host_folder import HostFolder
from resources.engine.protocol import RunningEngine
from resources.engine.vllm_command import cpu_environment, server_environment
from resources.engine.vllm_server import VllmServer

MODEL = "smollm2-135m"
MODEL_FOLDER = ROOT / "models" / MODEL
CHAT = "/v1/chat/completions"


def chat(custom_id: str, text: str, *, system: str | None = None, **body: Any) -> dict[str, Any]:
    """A greedy chat request that makes as many tokens as `max_tokens` says."""
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": text})
    fixed = {"model": MODEL, "messages": messages, "temperature": 0, "ignore_eos": True}
    return {"custom_id": custom_id, "method": "POST", "url": CHAT, "body": fixed | body}


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def demo_entry(**engine_args: Any) -> ModelEntry:
    """The demo model with these arguments of vLLM on top, and no `concurrency`, so that we follow the server."""
    if not (MODEL_FOLDER / "config.json").is_file():
        raise SystemExit(f"No demo model at {MODEL_FOLDER}: run `make demo-model`.")
    base = {"dtype": "float32", "enforce_eager": True, "max_model_len": 1024}
    return ModelEntry(name=MODEL, source=str(MODEL_FOLDER), engine_args=base | engine_args)


def vllm_environment(entry: ModelEntry) -> dict[str, str]:
    """What a vLLM of somebody else gets: the same as our server."""
    return cpu_environment(entry) | server_environment(entry, os.environ)


# --- A server of ours -------------------------------------------------------------------------------------------------


class Starter(EngineStarter):
    """Starts nothing: lends the server that is up."""

    def __init__(self, server: VllmServer) -> None:
        super().__init__(Path(), Path())
        object.__setattr__(self, "server", server)

    @contextmanager
    def start(
        self, entry: ModelEntry, stop: threading.Event, waiting: Callable[[str], None]
    ) -> Iterator[RunningEngine]:
        yield running(self.server, stop)  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Answered:
    """One pass of ours. `seconds` are those of check and answer."""

    seconds: float
    report: ModelReport


@dataclass(frozen=True)
class DemoServer:
    entry: ModelEntry
    server: VllmServer
    group: int
    work: Path

    def answer(self, rows: Sequence[dict[str, Any]], **options: Any) -> Answered:
        """Check and answer these requests as a batch of its own, on a fresh data root.

        Raises:
            Unfit: a request failed.
        """
        catalog = Catalog([self.entry])
        with tempfile.TemporaryDirectory(dir=self.work) as folder:
            file = write_jsonl(Path(folder) / "in.jsonl", rows)
            batch = BatchStore(Path(folder) / "data").register(file, options).batch
            with batch.lock("benchmark"):
                began = time.monotonic()
                pipeline.check(batch, catalog)
                report = pipeline.answer(batch, catalog, Starter(self.server))
                seconds = time.monotonic() - began
        model = report.models[0]
        if model.failed or model.retries or model.asked + model.copied != len(rows):
            raise Unfit(f"{model.failed} requests failed, {model.retries} were sent again: {model}")
        return Answered(seconds, model)

    def metrics(self) -> dict[str, float]:
        """vLLM's counters and gauges, by name without `vllm:`, summed over their labels."""
        found: dict[str, float] = {}
        for name, value in re.findall(r"^vllm:(\w+)(?:\{.*\})? ([0-9.e+-]+)\r?$", self._exposition(), re.M):
            found[name] = found.get(name, 0.0) + float(value)
        return found

    def labels(self, name: str) -> dict[str, str]:
        """The labels of a metric that stands once."""
        sample = re.search(rf"^vllm:{name}\{{(.*)\}} ", self._exposition(), re.M)
        return dict(re.findall(r'(\w+)="([^"]*)"', sample[1])) if sample else {}

    def _exposition(self) -> str:
        with contextlib.closing(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)) as connection:
            connection.settimeout(60)
            connection.connect(str(self.server.socket_path))
            connection.sendall(b"GET /metrics HTTP/1.0\r\nHost: localhost\r\n\r\n")
            return b"".join(iter(lambda: connection.recv(65536), b"")).decode()

    def finished_requests(self) -> int:
        """Requests that the engine has finished since it started, however they ended."""
        return int(self.metrics().get("request_success_total", 0))


@contextmanager
def demo_server(**engine_args: Any) -> Iterator[DemoServer]:
    """The demo model on vLLM's server, up and warm."""
    entry = demo_entry(**engine_args)
    with tempfile.TemporaryDirectory(prefix="vb-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        work = Path(folder)
        with VllmServer(entry, runtime_dir=work / "run", log_dir=work / "logs", keep_alive=0) as server:
            server.start()
            record = HostFolder(server.socket_path.parent).events.read().record
            assert record
            group = record.identity.pid
            found = DemoServer(entry, server, group, work)
            found.answer([chat(f"warm-{n}", f"Warm up {n}.", max_tokens=8) for n in range(8)])
            yield found


# --- Other programs ---------------------------------------------------------------------------------------------------


@contextmanager
def process_group(
    command: Sequence[str], *, env: dict[str, str], log: IO[bytes], talks: bool = False
) -> Iterator[subprocess.Popen[str]]:
    """A program in a group of its own, which is killed with all it started when the context ends, or when we do.

    Its words go to the log; with `talks`, those on standard output come to us."""
    process = subprocess.Popen(
        command,
        env=env,
        cwd=ROOT,
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE if talks else log,
        stderr=log,
        start_new_session=True,
    )
    guard = subprocess.Popen(
        ["sh", "-c", 'cat >/dev/null; kill -KILL -- "-$0"', str(process.pid)],
        stdin=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        guard.kill()
        guard.wait()
        for pipe in (process.stdin, process.stdout, guard.stdin):
            if pipe:
                with contextlib.suppress(OSError):
                    pipe.close()


def trouble(log: Path) -> str:
    """The first lines that name an error, which vLLM then passes on through pages, and the last lines."""
    lines = log.read_text(errors="replace").splitlines()
    first = [line for line in lines if re.search(r"\w(Error|Exception)\b: ", line)][:4]
    return "\n".join([*first, "...", *lines[-5:]])


class Turns:
    """Engines that are up side by side: those that are not being measured are stopped, and cost nothing."""

    def __init__(self, groups: dict[str, int]) -> None:
        self._groups = groups

    def only(self, name: str | None) -> None:
        """Let this one run; None stops all."""
        for other, group in self._groups.items():
            os.killpg(group, signal.SIGCONT if other == name else signal.SIGSTOP)

    def __enter__(self) -> "Turns":
        return self

    def __exit__(self, *_: object) -> None:
        for group in self._groups.values():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(group, signal.SIGCONT)
