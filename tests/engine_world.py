"""A runtime folder with stand-in servers under real engine hosts: real processes, real signals, real locks."""

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from resources.engine import processes
from resources.engine.catalog import ModelEntry
from resources.engine.host_folder import HostFolder, Told
from resources.engine.hosts import Hosts, HostStatus
from resources.engine.vllm_server import VllmServer
from tests.helpers import wait_until

ROOT = Path(__file__).resolve().parents[1]
STAND_IN = Path(__file__).with_name("stand_in_server.py")

# A run: has the stand-in started, says so, and lives until it is killed.
RUN = """
import json, os, signal, sys
from pathlib import Path
from resources.engine.catalog import ModelEntry
from resources.engine.vllm_server import VllmServer
world = Path(os.environ["WORLD"])
entry = ModelEntry(name=os.environ["MODEL"], source="org/model", keep_alive=float(os.environ["KEEP_ALIVE"]),
                   engine_args={"mode": "good"}, residency=os.environ.get("RESIDENCY", "stop"))
server = VllmServer(entry, runtime_dir=world, log_dir=world / "logs", who="the first run",
                    gpus=lambda: json.loads(os.environ["GPUS"]),
                    command=[sys.executable, "-S", os.environ["STAND_IN"]], stop_grace=0.5)
server.start()
if os.environ.get("FORKS") and os.fork() == 0:
    os.close(1)
    signal.pause()  # a copy of the run that has its lease open
print(json.dumps({"host": server.host_pid}), flush=True)
signal.pause()
"""

GONE_SECONDS = 15


class EngineWorld:
    """A runtime folder with everything that goes on in it. `gpus` are those that the machine seems to have."""

    def __init__(self, folder: Path, gpus: int = 0) -> None:
        self.folder = folder
        self.gpus = {str(n): f"GPU-{n}" for n in range(gpus)}
        self.stand_in = folder / "stand_in.py"
        shutil.copy(STAND_IN, self.stand_in)  # what it writes, it writes beside itself
        self.devices = folder / "devices"
        self.hosts = Hosts(folder)
        self._runs: list[subprocess.Popen[str]] = []

    def server(
        self,
        mode: str = "good",
        name: str = "second",
        who: str = "a test",
        needs: int = 1,
        sleep_timeout: float = 20,
        **entry: Any,
    ) -> VllmServer:
        """A run's hold on a stand-in; its host stops as soon as it is released, unless `keep_alive` says otherwise."""
        arguments = {"mode": mode, **({"tensor_parallel_size": needs} if needs > 1 else {})}
        return VllmServer(
            ModelEntry(name=name, source="org/model", engine_args=arguments, **{"keep_alive": 0, **entry}),
            runtime_dir=self.folder,
            log_dir=self.folder / "logs",
            who=who,
            gpus=lambda: self.gpus,
            command=[sys.executable, "-S", str(self.stand_in)],
            stop_grace=0.5,
            sleep_timeout=sleep_timeout,
        )

    def run(self, model: str = "first", keep_alive: float = 0, **environ: str) -> tuple[subprocess.Popen[str], int]:
        """A run in a process of its own whose server is up; the process and its host's number."""
        world = {"WORLD": str(self.folder), "STAND_IN": str(self.stand_in), "PYTHONPATH": str(ROOT), "MODEL": model}
        world["GPUS"] = json.dumps(self.gpus)
        process = subprocess.Popen(
            [sys.executable, "-c", RUN], env={**os.environ, **world, "KEEP_ALIVE": str(keep_alive), **environ},
            stdout=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip
        self._runs.append(process)
        assert process.stdout
        return process, json.loads(process.stdout.readline())["host"]

    # --- What goes on -------------------------------------------------------------------------------------------------

    def _ours(self, host: bool) -> list[int]:
        """Living processes with a folder of this world in their command lines: hosts and guardians, or all others."""
        found = []
        for process in processes.processes():
            try:
                line = Path(f"/proc/{process.pid}/cmdline").read_bytes()
            except OSError:
                continue
            if os.fsencode(self.folder / "servers") in line and not process.dead and (b"host.main" in line) == host:
                found.append(process.pid)
        return found

    def servers(self) -> list[int]:
        """Each stand-in and its child."""
        return self._ours(host=False)

    def hosts_and_guardians(self) -> list[int]:
        return self._ours(host=True)

    @property
    def starts(self) -> list[str]:
        """Model and devices of every server that was ever started."""
        return self._lines("starts")

    @property
    def calls(self) -> list[str]:
        """Model and path of every call to sleep or to wake that a server got."""
        return self._lines("calls")

    def _lines(self, name: str) -> list[str]:
        file = self.folder / name
        return file.read_text().splitlines() if file.exists() else []

    def see(self, model: str, state: str) -> HostStatus:
        """Wait until that model's host is in that state."""
        return wait_until(lambda: next((s for s in self.hosts.status() if (s.model, s.state) == (model, state)), None))

    def status(self, model: str) -> HostStatus | None:
        return next((status for status in self.hosts.status() if status.model == model), None)

    def told(self, model: str | None = None) -> Told:
        """What the one host, or that of a model, has said."""
        (found,) = [s for s in self.hosts.status() if model in (None, s.model)]
        events = HostFolder(self.hosts.servers_dir / found.id).events
        told = events.read()
        events.close()
        return told

    def guardian(self, host: int) -> int:
        found = processes.look_up(host)
        assert found
        return found.parent

    def lock_is_free(self, device: str = "cpu") -> bool:
        with (self.devices / f"{device}.lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            return True

    def all_gone(self) -> bool:
        free = all(map(self.lock_is_free, self.gpus.values() or ["cpu"]))
        return free and not self.servers() and not self.hosts_and_guardians()

    def see_all_gone(self) -> None:
        wait_until(self.all_gone, GONE_SECONDS)
        assert not list(self.hosts.servers_dir.iterdir())

    def close(self) -> None:
        for run in self._runs:
            # The run leads its session: what it forked goes with it.
            for process in processes.processes():
                if process.session == run.pid and not process.dead:
                    os.kill(process.pid, signal.SIGKILL)
            run.wait()
            assert run.stdout
            run.stdout.close()
        processes.end_processes(lambda: self.hosts_and_guardians() + self.servers())


@contextmanager
def engine_world(gpus: int = 0) -> Iterator[EngineWorld]:
    folder = Path(tempfile.mkdtemp(dir="/tmp", prefix="vb"))
    world = EngineWorld(folder, gpus)
    try:
        yield world
    finally:
        world.close()
        shutil.rmtree(folder)


class Starting:
    """A start (or a restart) in a thread of its own, with what it says."""

    def __init__(self, server: VllmServer, *, again: bool = False) -> None:
        self.server = server
        self._go = server.restart if again else server.start
        self.lines: list[str] = []
        self.error: BaseException | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._go(should_stop=self._stop.is_set, progress=self.lines.append)
        except BaseException as error:
            self.error = error

    def says(self, text: str) -> None:
        wait_until(lambda: any(text in line for line in self.lines), 15)

    @property
    def waits(self) -> bool:
        return self._thread.is_alive() and not self.server.alive

    def stop(self) -> None:
        self._stop.set()
        self.join()

    def join(self) -> VllmServer:
        self._thread.join(30)
        assert not self._thread.is_alive(), self.lines
        if self.error:
            raise self.error
        return self.server
