"""From a catalog entry to an engine that answers: the one place that knows which engine is which."""

import os
import threading
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from resources.engine.catalog import EngineKind, ModelEntry
from resources.engine.devices import installed_gpus
from resources.engine.endpoint import Endpoint
from resources.engine.hosts import Hosts
from resources.engine.null import NullEngine
from resources.engine.protocol import Engine, RunningEngine
from resources.engine.vllm_server import VllmServer
from resources.errors import EngineStartFailed


@dataclass(frozen=True)
class EngineStarter:
    """Starts the engine of a catalog entry, for as long as its context lasts.

    `runtime_dir` holds sockets and device locks, `log_dir` the logs of servers that we own. `who` is what others are
    told about who uses a server, and `keep_alive` for how many seconds it stays at most when they are done.
    """

    runtime_dir: Path
    log_dir: Path
    who: str = "a run"
    keep_alive: float | None = None

    @contextmanager
    def start(
        self, entry: ModelEntry, stop: threading.Event, waiting: Callable[[str], None]
    ) -> Iterator[RunningEngine]:
        """Raises EngineStartFailed with what a person can do; BatchStopped when `stop` comes first."""
        if entry.engine is EngineKind.NULL:
            yield RunningEngine(_null, in_process=True)
        elif entry.engine is EngineKind.OPENAI:
            yield RunningEngine(lambda: Endpoint(base_url=entry.base_url, api_key=_key(entry)))
        else:
            with self._server(entry) as server:
                server.start(should_stop=stop.is_set, progress=waiting)

                yield running(server, stop)

    def warm(self, entries: Iterable[ModelEntry]) -> set[str]:
        """The names of those whose server is up or coming up."""
        return {name for name, state in self.states(entries).items() if state == "warm"}

    def states(self, entries: Iterable[ModelEntry]) -> dict[str, str]:
        """`warm` or `asleep`, for the names of those that have a server."""
        ours = [entry for entry in entries if entry.engine is EngineKind.VLLM]
        states = Hosts(self.runtime_dir).states() if ours else {}
        found = {entry.name: states.get(self._server(entry).settings()) for entry in ours} if states else {}
        return {name: state for name, state in found.items() if state}

    @property
    def devices(self) -> int:
        """How many devices this machine has for servers of ours."""
        return _devices()

    def _server(self, entry: ModelEntry) -> VllmServer:
        return VllmServer(
            entry.server_entry,
            runtime_dir=self.runtime_dir,
            log_dir=self.log_dir,
            who=self.who,
            keep_alive=self.keep_alive,
        )


def running(server: VllmServer, stop: threading.Event) -> RunningEngine:
    """A server of ours that is up, as a dispatcher takes it."""
    name = server.entry.name

    def died() -> str | None:
        reason = server.end_reason
        return f"The vLLM server of `{name}` is gone ({reason}).\n{server.log_tail()}" if reason else None

    def restart(note: Callable[[str], None]) -> None:
        server.restart(should_stop=stop.is_set, progress=note)

    return RunningEngine(
        connect=lambda: Endpoint(socket_path=server.socket_path),
        load_seconds=server.load_seconds,
        warm=server.warm,
        woken=server.woken,
        replaced=tuple(server.replaced),
        died=died,
        restart=restart,
        shared=lambda: server.shared,
        most_running=server.entry.most_running,
    )


@lru_cache(maxsize=1)
def _devices() -> int:
    return len(installed_gpus()) or 1


@asynccontextmanager
async def _null() -> AsyncIterator[Engine]:
    yield NullEngine()


def _key(entry: ModelEntry) -> str | None:
    if entry.api_key_env is None:
        return None
    key = os.environ.get(entry.api_key_env)
    if not key:
        raise EngineStartFailed(f"Model `{entry.name}` needs a key in the environment variable {entry.api_key_env}.")
    return key
