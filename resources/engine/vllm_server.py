"""A run's hold on a vLLM server of ours: leased from the engine host that keeps it, started where there is none.

`host.py` tells how long a server lives, and `turns.py` who gets it when; here is what one run sees of it.
"""

import contextlib
import hashlib
import json
import logging
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from resources.chunk_store.fingerprint import engine_versions, fingerprint_inputs
from resources.engine import host, host_calls, host_folder, processes
from resources.engine.catalog import ModelEntry, Residency
from resources.engine.devices import CPU, installed_gpus, visible_devices
from resources.engine.host_folder import HostFolder, Told
from resources.engine.hosts import Hosts
from resources.engine.turns import Held, Wanted, lease
from resources.engine.vllm_command import (
    NO_SLEEP_ON_CPU,
    SLEEP_ARGUMENTS,
    SLEEP_ENVIRONMENT,
    VLLM_COMMAND,
    cpu_environment,
    server_arguments,
    server_environment,
)
from resources.errors import BatchStopped, EngineStartFailed, SettingsError

log = logging.getLogger(__name__)

SOCKET_PATH_BYTES = 107  # sun_path in unix(7), less the closing zero
STOP_GRACE_SECONDS = 10.0
SLEEP_SECONDS = 300.0  # for the weights of the largest GPU on their way to slow memory
PROGRESS_SECONDS = 5.0
_LOOK_SECONDS = 0.1
_TRIES = 3

# A line that names an exception (after vLLM's own prefix, perhaps) or is argparse's last word.
_CAUSE = re.compile(r"^(\(.*?\) )?(ERROR [^\]]*\] )?([\w.]*(Error|Exception)|\S+\.py: error): \S")
# Of the environment. Which devices may be used is looked at for each host, and a token changes no answer.
_DECIDES = re.compile(r"^(?!CUDA_VISIBLE_DEVICES$|.*TOKEN)(VLLM_|HF_|CUDA_|TORCH|OMP_|NCCL_)")


class VllmServer:
    """One model's server, for one run. `start`, `restart` and `release` are called from one thread at a time.

    Args:
        entry: the model's entry in the catalog; for an adapter, that of its base model.
        runtime_dir: private folder of this machine for sockets, device locks and state (`Settings.runtime_root`).
        log_dir: where `<model>.log` and the one before it (`.1`) are kept.
        who: what others are told about who uses the server.
        keep_alive: seconds that it stays after us at most; no more than the entry says.
        gpus: index to UUID, as `installed_gpus` gives them.
        command: what is started; the arguments of vLLM's server are added. Another one is a stand-in for tests.
        stop_grace: seconds that the server has to end by itself when asked to.
        sleep_timeout: seconds that it may take to fall asleep, and to wake.

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
        who: str = "a run",
        keep_alive: float | None = None,
        gpus: Callable[[], Mapping[str, str]] = installed_gpus,
        command: Sequence[str] = VLLM_COMMAND,
        stop_grace: float = STOP_GRACE_SECONDS,
        sleep_timeout: float = SLEEP_SECONDS,
    ) -> None:
        self.entry = entry
        self.log_path = log_dir.absolute() / f"{log_name(entry.name)}.log"
        self.load_seconds = 0.0
        self.warm = self.woken = False
        self.replaced: list[str] = []
        self._who, self._gpus, self._stop_grace = who, gpus, stop_grace
        self._sleep_timeout = sleep_timeout if entry.residency is Residency.SLEEP else 0.0
        self._started_on: list[str] = []
        self._keep_alive = entry.keep_alive if keep_alive is None else min(keep_alive, entry.keep_alive)
        self._arguments = [*command, *server_arguments(entry)]
        longest = f"{runtime_dir.absolute()}/servers/{'x' * 8}/{'x' * 36}"  # a host's id; a UUID (vLLM's own sockets)
        if len(os.fsencode(longest)) > SOCKET_PATH_BYTES:
            spare = SOCKET_PATH_BYTES - len(longest) + len(str(runtime_dir.absolute()))
            raise SettingsError(
                f"The runtime folder {runtime_dir} is too long for Unix sockets: set VLLM_BATCH_RUNTIME_DIR to a "
                f"folder of at most {spare} bytes."
            )
        self._hosts = Hosts(runtime_dir)
        self._held: Held | None = None
        self._log: FileIO | None = None
        self._end: str | None = None
        self._alone = self._was_shared = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    @property
    def socket_path(self) -> Path:
        """Where the server listens. Another one after each start."""
        return self._folder.socket_path

    @property
    def host_pid(self) -> int | None:
        told = self._told()
        return told.host.pid if told.host else None

    @property
    def alive(self) -> bool:
        """The server is up, as far as is known at this moment."""
        return self._held is not None and self.end_reason is None and self._told().ready

    @property
    def shared(self) -> bool:
        """Another run uses the server too, or has since we do."""
        self._was_shared |= self._held is not None and not self._held.was_alone
        return self._was_shared

    @property
    def end_reason(self) -> str | None:
        """How the server ended, in words; None while it lives."""
        if self._end is None and self._held is not None:
            self._end = self._see_end(self._told())
        return self._end

    def log_tail(self, lines: int = 25) -> str:
        """The last lines of this server's log: until `release` even when a later server has taken the file's name."""
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
        """Have a server that answers, one that is up already or a new one. Does nothing when we have.

        Waits first for who is in the way, without a limit, then for the server, `startup_timeout` seconds at most.
        Whatever is raised, here or by an argument, no lease is left.

        Args:
            should_stop: asked a few times a second.
            progress: gets a line for people every few seconds.

        Raises:
            EngineStartFailed: with the reason, the log's last lines, and where the log is.
            BatchStopped: `should_stop` said so.
        """
        if not self.alive:
            self._start(_Reporter(self.entry.name, should_stop, progress))

    def restart(
        self,
        *,
        should_stop: Callable[[], bool] = lambda: False,
        progress: Callable[[str], None] = lambda line: None,
    ) -> None:
        """After a death, or a server that does not answer: have another one, alone, until `release`.

        Who finds out which of its requests kills servers must be alone with one: so nobody else's server dies of them,
        and nobody else's requests are taken for the cause. Others wait for us; if we were alone before, those who wait
        already do so too.
        """
        known_bad = self._held.folder.id if self._held else None
        at_once = self._held is not None and self._alone
        if self._held and self.end_reason is None:
            self._hosts.stop([self._held.folder.id])  # it hangs: nobody else is to get it
        self._start(_Reporter(self.entry.name, should_stop, progress), alone=True, at_once=at_once, not_host=known_bad)

    def release(self) -> None:
        """Let the server go; its host keeps it for a while. Does nothing when we have none."""
        if self._held is None:
            return
        if self._told().end is None and self.end_reason is not None:
            self._hosts.reap()  # the host is dead, and perhaps its guardian: see to what they left
        self.shared  # noqa: B018 (seen for the last time)
        self._held.release()
        self._end = self._end or "released"
        if self._log:
            self._log.close()
        self._held = self._log = None

    # --- Starting -----------------------------------------------------------------------------------------------------

    def _start(self, reporter: "_Reporter", **how: Any) -> None:
        self.release()
        self._alone = bool(how.get("alone"))
        for attempt in range(_TRIES):
            self._end, self._was_shared = None, False
            self._held = self._lease(reporter, **how)
            last = attempt == _TRIES - 1
            try:
                self._wait_until_ready(reporter)
            except _GoneMeanwhile:
                self.release()
                if last:
                    raise self._start_failed("its host went away, again and again") from None
                reporter.gone(self.end_reason or "")
                how["at_once"] = True  # it had its turn
            except EngineStartFailed:
                self.release()
                if last or not (stopped := self._hosts.stop_asleep(self._started_on)):
                    raise
                reporter.gone(f"it did not start beside {', '.join(stopped)}, asleep on its device and now stopped")
            except BaseException:
                self.release()
                raise
            else:
                return

    def _lease(self, reporter: "_Reporter", **how: Any) -> Held:
        folder = self.entry.local_source
        if folder and not (folder / "config.json").is_file():
            raise EngineStartFailed(f"No model at {folder} (config.json is not there), for `{self.entry.name}`.")
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        environment = server_environment(self.entry, os.environ)
        wanted = Wanted(
            model=self.entry.name,
            settings=self.settings(environment),
            devices=visible_devices(self.entry, environment, self._gpus()),
            needed=self.entry.devices_needed,
            who=self._who,
            keep_alive=self._keep_alive,
            **how,
        )
        if wanted.devices == [CPU]:
            wanted = _on_one_device(wanted)
            if self._sleep_timeout:
                log.warning("`residency: sleep` of %s: %s", self.entry.name, NO_SLEEP_ON_CPU)

        def launch(folder: HostFolder, devices: list[str]) -> dict[str, Any]:
            own = cpu_environment(self.entry) | environment if devices == [CPU] else dict(environment)
            if devices != [CPU]:
                own["CUDA_VISIBLE_DEVICES"] = ",".join(devices)
            own["VLLM_RPC_BASE_PATH"] = str(folder.path)  # its own sockets, by default open to all in /tmp
            sleeps = self._sleep_timeout > 0 and devices != [CPU]
            own |= SLEEP_ENVIRONMENT if sleeps else {}
            self._started_on = devices
            return {
                "command": [*self._arguments, *SLEEP_ARGUMENTS * sleeps, "--uds", str(folder.socket_path)],
                "env": own,
                "log": str(self.log_path),
                "grace": self._stop_grace,
                "startup_timeout": self.entry.startup_timeout,
                "keep_alive": self._keep_alive,
                "names": [self.entry.name, *self.entry.adapters],
                "sleep_timeout": self._sleep_timeout if sleeps else 0.0,
            }

        self._started_on = []
        held = lease(self._hosts, wanted, launch, reporter.waiting)
        told = held.folder.events.told
        self.warm = not held.started and told.ready
        self.woken = told.load_seconds is not None and not (held.started or told.ready)
        self.replaced = held.replaced
        return held

    def settings(self, environment: Mapping[str, str] | None = None) -> str:
        """A hash of all that decides what a server is: entry, model files, arguments, versions, and our own code."""
        environment = server_environment(self.entry, os.environ) if environment is None else environment
        decides = {name: value for name, value in environment.items() if _DECIDES.match(name)}
        return _hash(
            fingerprint_inputs(self.entry),
            self._arguments,
            self.entry.env,
            self.entry.residency,
            decides,
            engine_versions(self.entry),
            _code(),
        )

    def _wait_until_ready(self, reporter: "_Reporter") -> None:
        assert self._held
        begun = time.monotonic()
        while True:
            told = self._told()
            if self._log is None and told.record:
                with contextlib.suppress(OSError):
                    self._log = FileIO(self._held.folder.spec.get("log", self.log_path))
            if reason := self.end_reason:
                if self._told().crashed and not (self.warm or self.woken):
                    raise self._start_failed(reason)
                raise _GoneMeanwhile
            if told.ready:
                taken = told.wake_seconds if self.woken else told.load_seconds
                self.load_seconds = 0.0 if self.warm else taken or 0.0
                return
            since = time.time() - told.started_at if told.started_at and not self.woken else time.monotonic() - begun
            reporter.loading(since, "waking" if self.woken else "loading")
            time.sleep(_LOOK_SECONDS)

    # --- What the host says -------------------------------------------------------------------------------------------

    @property
    def _folder(self) -> HostFolder:
        if self._held is None:
            raise RuntimeError(f"the server of `{self.entry.name}` was not started")
        return self._held.folder

    def _told(self) -> Told:
        return self._held.folder.events.read() if self._held else Told()

    def _see_end(self, told: Told) -> str | None:
        if told.end:
            return told.end
        if told.record and told.record.identity.known_dead:
            # Before the host has seen it: it tells the reason in a moment, unless it is dead itself.
            deadline = time.monotonic() + 2 * host.POLL_SECONDS
            while not (told := self._told()).end and time.monotonic() < deadline:
                time.sleep(0.02)
            return told.end or "its engine host is gone"
        if (told.host and told.host.known_dead) or not self._folder.is_alive:
            return self._told().end or "its engine host is gone"
        return None

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


class _GoneMeanwhile(Exception):
    """The server that we were given stopped before it could be used, by no fault of its own."""


class _Reporter:
    """Tells every few seconds what goes on, and raises BatchStopped when that is wanted."""

    def __init__(self, model: str, should_stop: Callable[[], bool], progress: Callable[[str], None]) -> None:
        self._model, self._should_stop, self._progress = model, should_stop, progress
        self._begun = time.monotonic()
        self._told_at, self._told = float("-inf"), ""

    def waiting(self, for_what: str) -> None:
        self._tell(f"waiting for {for_what}", time.monotonic() - self._begun)

    def loading(self, seconds: float, what: str) -> None:
        self._tell(f"{what} {self._model}", seconds)

    def gone(self, why: str) -> None:
        log.warning("the server of %s is gone (%s); another one is started", self._model, why)
        self._progress(f"the server of {self._model} is gone ({why}); another one is started")

    def _tell(self, what: str, seconds: float) -> None:
        if self._should_stop():
            raise BatchStopped(f"stopped while {what}")
        if what != self._told or time.monotonic() - self._told_at >= PROGRESS_SECONDS:
            self._progress(f"{what}: {seconds:.0f} s")
            self._told_at, self._told = time.monotonic(), what


def log_name(model: str) -> str:
    """A model's name as one of a file."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", model)


def _on_one_device(wanted: Wanted) -> Wanted:
    """A CPU is one device, whatever the entry splits over its parts."""
    return Wanted(**{**wanted.__dict__, "needed": 1})


def _code() -> str:
    """Our own part of a host: another version of it is not trusted to do what we expect."""
    files = (host, host_calls, host_folder, processes)
    return _hash([Path(module.__file__ or "").read_text() for module in files])


def _hash(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _tail(file: int, lines: int) -> str:
    size = os.fstat(file).st_size
    start = max(0, size - 256 * 1024)
    text = os.pread(file, size - start, start).decode("utf-8", "replace")
    return "\n".join(text.splitlines()[-lines:])
