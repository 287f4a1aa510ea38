"""What `vllm-batch up` runs: PostgreSQL, the web UI and the daemon of one data root, started, watched and stopped.

State of a stack, in its folder of the runtime folder:

    up.lock        held by the running `up` (flock): one a data root
    stack.json     pid, start and URL of `up`, and every session it has started; what a SIGKILLed `up` leaves behind is
                   found by it, and by nothing else
    postgres-url   see resources/postgres.py

When `up` is SIGKILLed, the web server and the daemon get SIGTERM from the kernel; runs in progress end their work under
their code server, and PostgreSQL stays for them. The next `up` or `down` interrupts such runs, ends what is left of the
sessions and takes PostgreSQL over.
"""

import fcntl
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from pydantic import SecretStr

from resources.engine.hosts import Hosts
from resources.errors import BatchError, SettingsError
from resources.filesystem import refuse_remote_filesystem
from resources.handlers.loading import load_handlers
from resources.label_studio import local_server
from resources.label_studio.connection import connection_of, is_curation_on, target_names
from resources.postgres import EmbeddedPostgres, find_postgres_url, runtime_folder
from resources.settings import Settings
from resources.targets import all_targets
from vllm_batch_pipelines.processes import ProcessIdentity, end_all, identify, session_members, start_session

if TYPE_CHECKING:
    from dagster import DagsterInstance

POOL_LIMITS = {"gpu": 4, "label_studio": 1, "webhooks": 4}
INTERRUPTED_TAG = "vllm_batch/interrupted"

_ROOT = Path(__file__).resolve().parents[1]
_HOST = "127.0.0.1"
_READY_SECONDS = 180
_RUNS_SECONDS = 10
_SERVERS_SECONDS = 15
_GRACE_SECONDS = 3
_MOST_RESTARTS = 5  # within _RESTART_WINDOW_SECONDS
_RESTART_WINDOW_SECONDS = 600

Say = Callable[[str], None]


def stack_state(settings: Settings) -> dict[str, Any] | None:
    """``pid``, ``url`` (None while it starts) and ``started_at`` of the running `up` of this data root, if one runs."""
    state = _State.read(settings)
    if state is None or not state.owner.is_alive():
        return None
    return {"pid": state.owner.pid, "url": state.url, "started_at": state.started_at}


@contextmanager
def instance_env(settings: Settings) -> Iterator["DagsterInstance"]:
    """The Dagster instance of this data root, with the environment set that Dagster reads it from, for as long.

    Raises:
        SettingsError: no PostgreSQL is there: the stack does not run and no URL is set.
    """
    url = find_postgres_url(settings)
    if url is None:
        raise SettingsError("The stack is not running. Start it with `vllm-batch up`, or set DAGSTER_POSTGRES_URL.")
    _write_dagster_yaml(settings)
    with _environment(_dagster_environment(settings, url)):
        from dagster import DagsterInstance

        with DagsterInstance.get() as instance:
            yield instance


class Stack:
    """One `up`: `run` starts everything, waits for a signal, and stops everything.

    SIGINT, SIGTERM and SIGHUP stop it cleanly within about 15 s: runs in progress are marked and interrupted, so that
    they commit what is finished, then all processes end. A second signal ends everything at once.
    """

    def __init__(
        self, settings: Settings, workspace: Path | None = None, say: Say = print, *, with_label_studio: bool = False
    ) -> None:
        self._settings = settings
        self._with_label_studio = with_label_studio
        self._workspace = workspace or _ROOT / "workspace.yaml"
        self._say = say
        self._logs = settings.data_root / "logs"
        self._state = _State(identify(os.getpid()) or ProcessIdentity(os.getpid(), "?"), _now())
        self._children: list[_Child] = []
        self._postgres: EmbeddedPostgres | None = None
        self._postgres_url = ""
        self._port = 0
        self._signals_seen = 0

    def run(self) -> None:
        """Start, serve until a signal comes, stop.

        Raises:
            SettingsError: the stack cannot be started as it is set; says what to do.
            BatchError: a part did not come up, or died again and again; carries the end of its log.
        """
        refuse_remote_filesystem(self._settings.data_root)
        self._refuse_what_is_missing()
        with ExitStack() as cleanup:
            cleanup.enter_context(self._signals())
            cleanup.enter_context(_up_lock(self._settings))
            end_leftovers(self._settings, self._say)
            self._port = _free_port(self._settings.port, "VLLM_BATCH_PORT or --port (0 takes a free one)")
            if self._with_label_studio:
                _free_port(self._settings.label_studio_port, "VLLM_BATCH_LABEL_STUDIO_PORT")
            self._make_folders()
            self._state.write(self._settings)
            cleanup.callback(_State.remove, self._settings)
            cleanup.callback(self._shut_down)
            self._start()
            if not self._is_stopping():
                self._announce()
            self._supervise()

    def _refuse_what_is_missing(self) -> None:
        """Targets, secrets, schemas, handlers: told now, not at the first delivery or import."""
        targets = all_targets(self._settings)
        load_handlers(self._settings.result_handlers)
        if is_curation_on(self._settings, bool(targets.label_studio)):
            for name in target_names(self._settings, targets):
                connection_of(name, self._settings, targets)

    def _is_stopping(self) -> bool:
        return self._signals_seen > 0

    def _is_hurried(self) -> bool:
        return self._signals_seen > 1

    def _make_folders(self) -> None:
        for folder in (self._settings.data_root, self._settings.inbox_dir, self._settings.dagster_home_dir, self._logs):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        _write_dagster_yaml(self._settings)

    def _start(self) -> None:
        if self._settings.dagster_postgres_url is not None:
            self._postgres_url = self._settings.dagster_postgres_url.get_secret_value()
        else:
            self._say("Starting PostgreSQL ...")
            self._postgres = EmbeddedPostgres(self._settings.data_root, self._settings.runtime_root)
            self._postgres_url = self._postgres.start()
        from vllm_batch_pipelines.resuming import close_dead_runs

        self._say("Starting the web UI and the daemon ...")
        # Loaded here first: the tables are made once, before several processes would make them at the same time.
        with self._instance() as instance:
            for pool, limit in POOL_LIMITS.items():
                instance.event_log_storage.set_concurrency_slots(pool, limit)
            close_dead_runs(instance)  # what an earlier stack started is ended by now
            started = time.time()
            self._start_children()
            self._wait_until_ready(instance, started)

    def _start_children(self) -> None:
        python, workspace = sys.executable, str(self._workspace)
        url_file = self._url_file
        url_file.unlink(missing_ok=True)
        web = [python, "-m", "vllm_batch_pipelines.web", "--port", str(self._port), "-w", workspace]
        daemon = [python, "-m", "dagster._daemon", "run", "-w", workspace]
        environment = dict(os.environ) | _dagster_environment(self._settings, self._postgres_url)
        self._add_child("webserver", [*web, "--url-file", str(url_file)], environment)
        self._add_child("daemon", daemon, environment)
        if self._with_label_studio:
            server = local_server.environment(local_server.data_folder(self._settings))
            mark = {"DAGSTER_HOME": environment["DAGSTER_HOME"]}  # by which the processes of a session are known
            self._add_child("label-studio", local_server.command(self._settings.label_studio_port), server | mark)

    def _add_child(self, name: str, command: list[str], environment: Mapping[str, str]) -> None:
        child = _Child(name, command, environment, self._logs / f"{name}.log")
        self._children.append(child)
        self._launch(child)

    def _launch(self, child: "_Child") -> None:
        self._state.sessions.append(child.start())
        self._state.write(self._settings)

    def _wait_until_ready(self, instance: "DagsterInstance", started: float) -> None:
        deadline = time.monotonic() + _READY_SECONDS
        while not self._is_stopping():
            for child in self._children:
                if not child.is_running:
                    raise BatchError(
                        f"The {child.name} ended while it started. The end of {child.log}:\n{child.last_lines()}"
                    )
            beats = instance.get_daemon_heartbeats()
            is_beating = any(beat.timestamp >= started for beat in beats.values())
            is_reviewable = not self._with_label_studio or _answers(f"{self._label_studio_url}/health")
            if is_beating and is_reviewable and self._url_file.exists() and _answers(f"{self._url}/server_info"):
                self._state.url = self._url
                self._state.write(self._settings)
                return
            if time.monotonic() > deadline:
                raise BatchError(f"The stack was not up after {_READY_SECONDS} s. Look into {self._logs}.")
            time.sleep(0.2)

    def _announce(self) -> None:
        for location, error in _load_errors(self._url):
            self._say(f"WARNING: code location {location} did not load: {error}")
        self._say(
            f"\nUp: {self._url}\n"
            f"Inbox: {self._settings.inbox_dir}\n"
            f"Logs: {self._logs}\n{self._label_studio_line()}\n"
            "Next: drop a .jsonl file into the inbox, or run `vllm-batch submit FILE`. Ctrl-C stops everything."
        )

    def _supervise(self) -> None:
        while not self._is_stopping():
            time.sleep(0.2)
            if self._postgres is not None and not self._postgres.is_running:
                self._say("PostgreSQL has ended; starting it again.")
                self._postgres.start()
            for child in self._children:
                if child.is_running:
                    continue
                wait_seconds = child.next_restart()
                if wait_seconds is None:
                    raise BatchError(
                        f"The {child.name} ended {_MOST_RESTARTS + 1} times; giving up. The end of {child.log}:\n"
                        f"{child.last_lines()}"
                    )
                self._say(f"The {child.name} has ended (see {child.log}); starting it again in {wait_seconds:.0f} s.")
                _sleep_unless(self._is_stopping, wait_seconds)
                if not self._is_stopping():
                    self._launch(child)

    def _shut_down(self) -> None:
        self._say("\nStopping ...")
        unfinished = [] if self._is_hurried() else self._end_runs()
        end_all(self._members, lambda: 0 if self._is_hurried() else _GRACE_SECONDS)
        if unfinished:
            with self._reporting("Runs could not be closed"), self._instance() as instance:
                _close_runs(instance, unfinished)
        if self._postgres is not None:
            self._postgres.stop()
        self._url_file.unlink(missing_ok=True)
        with self._reporting("Idle model servers could not be stopped"):
            stop_idle_servers(self._settings, self._say, self._is_hurried)
        self._say("Stopped.")

    def _end_runs(self) -> list[str]:
        """Have the runs in progress end; returns those that did not."""
        # The daemon goes first, or it would start the next runs of the queue. Its code server stays for its runs.
        for child in self._children:
            if child.name == "daemon":
                child.terminate()
        unfinished: list[str] = []
        has_database = self._postgres is None or self._postgres.is_running
        if self._children and has_database:
            with self._reporting("Runs could not be interrupted"), self._instance() as instance:
                unfinished = interrupt_runs(instance, _RUNS_SECONDS, self._say, self._is_hurried)
        return unfinished

    @contextmanager
    def _reporting(self, what: str) -> Iterator[None]:
        """Whatever fails while the stack stops, the rest of it is stopped all the same."""
        try:
            yield
        except Exception as error:
            self._say(f"{what}: {error}")

    def _members(self) -> list[int]:
        for child in self._children:
            child.reap()
        return _session_processes(self._settings, self._state.sessions)

    @contextmanager
    def _instance(self) -> Iterator["DagsterInstance"]:
        secret = self._settings.model_copy(update={"dagster_postgres_url": SecretStr(self._postgres_url)})
        with instance_env(secret) as instance:
            yield instance

    @property
    def _url(self) -> str:
        return f"http://{_HOST}:{self._port}"

    @property
    def _label_studio_url(self) -> str:
        return local_server.address(self._settings.label_studio_port)

    def _label_studio_line(self) -> str:
        if not self._with_label_studio:
            return ""
        folder = local_server.data_folder(self._settings)
        user = local_server.Account.of(folder).user
        return f"Label Studio: {self._label_studio_url}, user {user}, password in {folder / 'account.json'}\n"

    @property
    def _url_file(self) -> Path:
        return _folder(self._settings) / "web-url"

    @contextmanager
    def _signals(self) -> Iterator[None]:
        def on_signal(_number: int, _frame: FrameType | None) -> None:
            self._signals_seen += 1

        before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def stop_idle_servers(settings: Settings, say: Say, is_hurried: Callable[[], bool] = lambda: False) -> None:
    """Stop the model servers of this user that no run uses, whichever data root they were started for."""
    hosts = Hosts(settings.runtime_root)
    if not (stopped := hosts.stop_idle()):
        return
    say(f"Stopping the idle server of {', '.join(stopped)}.")
    _sleep_unless(
        lambda: is_hurried() or not any(host.state == "stopping" for host in hosts.status()), _SERVERS_SECONDS
    )


def stop_stack(settings: Settings, say: Say = print, wait_seconds: float = 45) -> bool:
    """Stop the running `up` of this data root, or what a killed one has left; False where there was neither.

    Raises:
        BatchError: it did not stop in time.
    """
    state = _State.read(settings)
    if state is not None and state.owner.is_alive():
        say(f"Stopping the stack (pid {state.owner.pid}) ...")
        os.kill(state.owner.pid, signal.SIGTERM)
        deadline = time.monotonic() + wait_seconds
        while state.owner.is_alive():
            if time.monotonic() > deadline:
                raise BatchError(
                    f"`vllm-batch up` (pid {state.owner.pid}) has not stopped after {wait_seconds:.0f} s. "
                    "Run this again to make it end everything at once."
                )
            time.sleep(0.1)
        return True
    with _up_lock(settings):
        found = end_leftovers(settings, say)
    stop_idle_servers(settings, say)
    return found


def end_leftovers(settings: Settings, say: Say = print) -> bool:
    """End what a killed `up` has left: its runs, its processes, its PostgreSQL. The caller holds the lock of `up`."""
    state = _State.read(settings)
    postgres = EmbeddedPostgres(settings.data_root, settings.runtime_root)
    was_running = postgres.pgdata.exists() and postgres.is_running
    if state is None and not was_running:
        return False
    say("An earlier `vllm-batch up` was killed; ending what it left.")
    if state is not None and _session_processes(settings, state.sessions):
        try:
            with instance_env(settings) as instance:
                interrupt_runs(instance, _RUNS_SECONDS, say)
        except Exception as error:
            say(f"Runs could not be interrupted: {error}")
        end_all(lambda: _session_processes(settings, state.sessions), lambda: _GRACE_SECONDS)
    if postgres.pgdata.exists():
        postgres.stop()
    _State.remove(settings)
    return True


def interrupt_runs(
    instance: "DagsterInstance", seconds: float, say: Say, is_hurried: Callable[[], bool] = lambda: False
) -> list[str]:
    """Mark the runs in progress as interrupted by us, ask them to end, wait; returns the ids of those that did not."""
    from dagster import DagsterRunStatus, RunsFilter

    in_progress = RunsFilter(statuses=[DagsterRunStatus.STARTING, DagsterRunStatus.STARTED, DagsterRunStatus.CANCELING])
    asked: set[str] = set()
    deadline = time.monotonic() + seconds
    while runs := [run.run_id for run in instance.get_runs(in_progress)]:
        if is_hurried() or time.monotonic() > deadline:
            return runs
        for run_id in set(runs) - asked:
            instance.add_run_tags(run_id, {INTERRUPTED_TAG: "stack stopped"})
            try:
                if instance.run_launcher.terminate(run_id):
                    say(f"Run {run_id[:8]} was asked to stop; what is finished is kept.")
                    asked.add(run_id)
            except Exception as error:  # its code server is gone: nothing is left to ask
                say(f"Run {run_id[:8]} cannot be asked to stop ({type(error).__name__}).")
                asked.add(run_id)
        time.sleep(0.2)
    return []


def _close_runs(instance: "DagsterInstance", run_ids: list[str]) -> None:
    """Record the end of runs whose processes were ended before they could record it."""
    for run_id in run_ids:
        run = instance.get_run_by_id(run_id)
        if run is not None and not run.is_finished:
            instance.report_run_canceled(run, "The stack was stopped; the run's process did not end in time.")


@dataclass
class _State:
    """stack.json."""

    owner: ProcessIdentity
    started_at: str
    url: str | None = None
    sessions: list[ProcessIdentity] = field(default_factory=list)

    @staticmethod
    def _file(settings: Settings) -> Path:
        return _folder(settings) / "stack.json"

    @classmethod
    def read(cls, settings: Settings) -> "_State | None":
        try:
            found = json.loads(cls._file(settings).read_text("utf-8"))
        except FileNotFoundError:
            return None
        sessions = [ProcessIdentity(**session) for session in found.pop("sessions")]
        return cls(owner=ProcessIdentity(**found.pop("owner")), sessions=sessions, **found)

    def write(self, settings: Settings) -> None:
        file = self._file(settings)
        draft = file.with_name(file.name + ".new")
        draft.write_text(json.dumps(asdict(self)), "utf-8")
        draft.rename(file)

    @classmethod
    def remove(cls, settings: Settings) -> None:
        cls._file(settings).unlink(missing_ok=True)


class _Child:
    """The web server or the daemon: its command, its present process, and how often it died lately."""

    def __init__(self, name: str, command: list[str], environment: Mapping[str, str], log: Path) -> None:
        self.name = name
        self.log = log
        self._command = command
        self._environment = environment
        self._process: subprocess.Popen[bytes] | None = None
        self._deaths: list[float] = []

    def start(self) -> ProcessIdentity:
        self._process, identity = start_session(self._command, self._environment, self.log)
        return identity

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def reap(self) -> None:
        if self._process is not None:
            self._process.poll()

    def terminate(self) -> None:
        if self.is_running and self._process is not None:
            self._process.terminate()

    def next_restart(self) -> float | None:
        """Seconds to wait before it is started again; None when it died too often."""
        now = time.monotonic()
        self._deaths = [death for death in self._deaths if now - death < _RESTART_WINDOW_SECONDS] + [now]
        return None if len(self._deaths) > _MOST_RESTARTS else 2.0 ** (len(self._deaths) - 1)

    def last_lines(self, count: int = 20) -> str:
        return "\n".join(self.log.read_text("utf-8", "replace").splitlines()[-count:])


@contextmanager
def _up_lock(settings: Settings) -> Iterator[None]:
    with (_folder(settings) / "up.lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            state = stack_state(settings)
            where = f" (pid {state['pid']}, {state['url'] or 'starting'})" if state else ""
            raise SettingsError(
                f"`vllm-batch up` already runs for {settings.data_root}{where}. Use it, stop it with "
                "`vllm-batch down`, or set VLLM_BATCH_DATA to another folder."
            ) from None
        yield


def _folder(settings: Settings) -> Path:
    return runtime_folder(settings.data_root, settings.runtime_root)


def _session_processes(settings: Settings, sessions: list[ProcessIdentity]) -> list[int]:
    mark = f"DAGSTER_HOME={settings.dagster_home_dir}"
    return [pid for session in sessions for pid in session_members(session, mark)]


def _free_port(port: int, settings: str) -> int:
    with socket.socket(socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((_HOST, port))
        except OSError as error:
            raise SettingsError(
                f"Port {port} of {_HOST} cannot be used ({error.strerror}). Choose another with {settings}."
            ) from error
        found: int = probe.getsockname()[1]
        return found


def _write_dagster_yaml(settings: Settings) -> None:
    source, home = _ROOT / "dagster.yaml", settings.dagster_home_dir
    if not source.is_file():
        raise SettingsError(f"{source} is missing. Run from a checkout of the project (`pip install -e .`).")
    home.mkdir(mode=0o700, parents=True, exist_ok=True)
    target = home / "dagster.yaml"
    if not target.exists() or target.read_bytes() != source.read_bytes():
        draft = home / "dagster.yaml.new"
        shutil.copyfile(source, draft)
        draft.rename(target)


def _dagster_environment(settings: Settings, postgres_url: str) -> dict[str, str]:
    return {
        "DAGSTER_HOME": str(settings.dagster_home_dir),
        "DAGSTER_POSTGRES_URL": postgres_url,
        "DAGSTER_DISABLE_TELEMETRY": "1",
        "PYTHONUNBUFFERED": "1",
    }


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _answers(url: str) -> bool:
    try:
        with _request(url):
            return True
    except OSError:
        return False


def _load_errors(url: str) -> list[tuple[str, str]]:
    """(location, message) for every code location that did not load."""
    query = """{ workspaceOrError { ... on Workspace { locationEntries {
        name locationOrLoadError { ... on PythonError { message } } } } } }"""
    try:
        with _request(f"{url}/graphql", json.dumps({"query": query}).encode()) as response:
            entries = json.load(response)["data"]["workspaceOrError"]["locationEntries"]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    return [
        (entry["name"], entry["locationOrLoadError"]["message"].strip())
        for entry in entries
        if "message" in (entry["locationOrLoadError"] or {})
    ]


def _request(url: str, body: bytes | None = None) -> Any:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # loopback never goes by a proxy
    return opener.open(urllib.request.Request(url, body, {"Content-Type": "application/json"}), timeout=10)


def _sleep_unless(is_over: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not is_over() and time.monotonic() < deadline:
        time.sleep(0.1)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
