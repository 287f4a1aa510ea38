"""The life of a server and its supervisor, with a stand-in server: real processes, real signals, real locks."""

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from resources.engine import supervisor
from resources.engine.catalog import ModelEntry
from resources.engine.vllm_server import (
    VllmServer,
    choose_devices,
    cpu_environment,
    server_arguments,
    server_environment,
)
from resources.errors import BatchStopped, CatalogError, EngineStartFailed, SettingsError
from tests.helpers import wait_until

pytestmark = pytest.mark.e2e


ROOT = Path(__file__).resolve().parents[2]

# Answers every GET with 200 on the socket that `--uds` names, and has a child; both carry the socket's path in their
# command lines. `--mode` makes it misbehave.
STAND_IN = """
import os, signal, socket, subprocess, sys
path = sys.argv[sys.argv.index("--uds") + 1]
mode = next((a.split("=")[1] for a in sys.argv if a.startswith("--mode=")), "good")
if mode == "stubborn":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
if mode == "refuses":
    print("(EngineCore pid=7) ERROR 11-21 01:45:23 [core.py:1] ValueError: no memory for that", flush=True)
    print("who passed it on\\n" * 40, end="", flush=True)
    sys.exit(3)
child = [sys.executable, "-S", "-c", "import time; time.sleep(600)", path]
subprocess.Popen(child, start_new_session=mode == "strays")
print("loaded", flush=True)
if mode == "mute":
    signal.pause()
listener = socket.socket(socket.AF_UNIX)
listener.bind(path)
listener.listen()
while True:
    connection, _ = listener.accept()
    connection.recv(65536)
    connection.sendall(b"HTTP/1.1 200 OK\\r\\nContent-Length: 0\\r\\n\\r\\n")
    connection.close()
"""

# A run: starts the stand-in, says so, and lives until it is killed.
OWNER = """
import json, os, signal, sys
from pathlib import Path
from resources.engine.catalog import ModelEntry
from resources.engine.vllm_server import VllmServer
world = Path(os.environ["WORLD"])
server = VllmServer(ModelEntry(name="first", source="org/first"), runtime_dir=world, log_dir=world / "logs",
                    command=[sys.executable, "-S", os.environ["STAND_IN"]], stop_grace=0.5)
server.start()
if os.environ.get("FORKS") and os.fork() == 0:
    os.close(1)
    signal.pause()  # a copy of the run that holds its end of the pipe
print(json.dumps({"supervisor": server.supervisor_pid}), flush=True)
signal.pause()
"""


class World:
    """A runtime folder with everything that goes on in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.stand_in = folder / "stand_in.py"
        self.stand_in.write_text(STAND_IN)
        self.devices = folder / "devices"
        self._owners: list[subprocess.Popen[str]] = []

    def server(self, mode: str = "good", name: str = "second", **entry: Any) -> VllmServer:
        return VllmServer(
            ModelEntry(name=name, source="org/model", engine_args={"mode": mode}, **entry),
            runtime_dir=self.folder,
            log_dir=self.folder / "logs",
            command=[sys.executable, "-S", str(self.stand_in)],
            stop_grace=0.5,
        )

    def owner(self, **environ: str) -> tuple[subprocess.Popen[str], int]:
        """A run in a process of its own whose server is up; the process and its supervisor's number."""
        world = {"WORLD": str(self.folder), "STAND_IN": str(self.stand_in), "PYTHONPATH": str(ROOT)}
        process = subprocess.Popen(
            [sys.executable, "-c", OWNER], env={**os.environ, **world, **environ}, stdout=subprocess.PIPE, text=True,
            start_new_session=True,
        )  # fmt: skip
        self._owners.append(process)
        assert process.stdout
        return process, json.loads(process.stdout.readline())["supervisor"]

    def processes(self) -> list[int]:
        """The stand-in and its child: living processes with a socket of this world in their command lines."""
        found = []
        for process in supervisor.processes():
            try:
                line = Path(f"/proc/{process.pid}/cmdline").read_bytes()
            except OSError:
                continue
            if os.fsencode(self.folder / "servers") in line and not process.dead:
                found.append(process.pid)
        return found

    def lock_is_free(self) -> bool:
        with (self.devices / "cpu.lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            return True

    def record(self) -> supervisor.Record:
        record = supervisor.read_record(supervisor.read_state(self.devices / "cpu.json"))
        assert record
        return record

    def all_gone(self) -> bool:
        return not self.processes() and self.lock_is_free()

    def close(self) -> None:
        for owner in self._owners:
            # The owner leads its session: what it forked goes with it.
            for process in supervisor.processes():
                if process.session == owner.pid and not process.dead:
                    os.kill(process.pid, signal.SIGKILL)
            owner.wait()
            assert owner.stdout
            owner.stdout.close()
        supervisor.end_processes(self.processes)


@pytest.fixture
def world() -> Iterator[World]:
    folder = Path(tempfile.mkdtemp(dir="/tmp", prefix="vb"))
    world = World(folder)
    yield world
    world.close()
    shutil.rmtree(folder)


def bystander() -> tuple[subprocess.Popen[bytes], supervisor.Process]:
    """A process that is none of ours, leading a session of its own."""
    process = subprocess.Popen(["sleep", "600"], start_new_session=True)
    seen = supervisor.look_up(process.pid)
    assert seen
    return process, seen


# --- A life without accidents ---------------------------------------------------------------------------------------


def test_start_and_stop(world: World) -> None:
    lines: list[str] = []
    with world.server(name="org/some-model") as server:
        server.start(progress=lines.append)
        assert server.alive
        assert server.load_seconds is not None
        assert lines[0].startswith("loading org/some-model: ")
        assert len(world.processes()) == 2
        assert not world.lock_is_free()
        state = supervisor.read_state(world.devices / "cpu.json")
        assert (state["owner_pid"], state["model"]) == (os.getpid(), "org/some-model")
        assert server.log_tail() == "loaded"
        assert server.log_path.name == "org-some-model.log"
        assert server.log_path.stat().st_mode & 0o777 == 0o600
        assert server.socket_path.parent.stat().st_mode & 0o777 == 0o700
    assert world.all_gone()
    assert server.end_reason == "stopped"
    assert not (world.devices / "cpu.json").exists()
    assert not list((world.folder / "servers").iterdir())


def test_starting_twice_is_one_start_and_stopping_twice_one_stop(world: World) -> None:
    server = world.server()
    server.start()
    before = world.processes()
    server.start()
    assert world.processes() == before
    server.stop()
    server.stop()
    assert world.all_gone()


def test_a_server_can_be_started_again_and_keeps_the_log_before(world: World) -> None:
    with world.server() as server:
        server.start()
        first = server.socket_path
        os.kill(world.record().pid, signal.SIGKILL)
        wait_until(lambda: not server.alive)
        server.start()
        assert server.alive
        assert server.socket_path != first
        assert server.log_path.with_name("second.log.1").read_text() == "loaded\n"


def test_the_server_inherits_no_lock_and_none_of_our_files(world: World) -> None:
    with world.server() as server:
        server.start()
        for pid in world.processes():
            files = [str(link.readlink()) for link in Path(f"/proc/{pid}/fd").iterdir()]
            assert not [name for name in files if "lock" in name or name.startswith("pipe:")]


# --- Starts that fail -----------------------------------------------------------------------------------------------


def test_a_server_that_exits_gives_reason_cause_and_the_end_of_its_log(world: World) -> None:
    server = world.server("refuses")
    with pytest.raises(EngineStartFailed) as error:
        server.start()
    message = str(error.value)
    assert "`second` did not start: exit code 3" in message
    assert "ValueError: no memory for that" in message
    assert str(server.log_path) in message
    assert message.count("who passed it on") == 25 + 1  # the line after the cause, too
    assert world.all_gone()


def test_a_command_that_is_not_there_is_named(world: World) -> None:
    entry = ModelEntry(name="m", source="org/m")
    server = VllmServer(entry, runtime_dir=world.folder, log_dir=world.folder, command=["/no/such/program"])
    with pytest.raises(EngineStartFailed, match="/no/such/program"):
        server.start()
    assert world.all_gone()


def test_a_model_folder_that_is_not_there_is_named_before_anything_starts(world: World) -> None:
    entry = ModelEntry(name="m", source=str(world.folder / "no-model"))
    with pytest.raises(EngineStartFailed, match=r"no-model \(config.json is not there\)"):
        VllmServer(entry, runtime_dir=world.folder, log_dir=world.folder).start()


def test_a_server_that_never_answers_is_given_up(world: World) -> None:
    with pytest.raises(EngineStartFailed, match=r"not ready after 0\.5 s"):
        world.server("mute", startup_timeout=0.5).start()
    assert world.all_gone()


def test_a_stop_while_loading_leaves_nothing(world: World) -> None:
    with pytest.raises(BatchStopped):
        world.server("mute").start(should_stop=lambda: len(world.processes()) == 2)
    assert world.all_gone()


def test_an_interrupt_while_loading_leaves_nothing(world: World) -> None:
    def interrupt() -> bool:
        if len(world.processes()) == 2:
            raise KeyboardInterrupt
        return False

    with pytest.raises(KeyboardInterrupt):
        world.server("mute").start(should_stop=interrupt)
    assert world.all_gone()


def test_a_runtime_folder_too_long_for_sockets_is_refused(world: World) -> None:
    with pytest.raises(SettingsError, match="at most 53 bytes"):
        VllmServer(ModelEntry(name="m", source="o/m"), runtime_dir=world.folder / ("x" * 60), log_dir=world.folder)


def test_a_runtime_folder_behind_a_link_is_refused(world: World) -> None:
    link = world.folder / "link"
    link.symlink_to(world.folder)
    with pytest.raises(SettingsError, match="somebody else"):
        VllmServer(ModelEntry(name="m", source="o/m"), runtime_dir=link, log_dir=world.folder)


# --- Deaths ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["stubborn", "strays"])
def test_stop_ends_what_ignores_sigterm_or_left_the_session(world: World, mode: str) -> None:
    server = world.server(mode)
    server.start()
    assert len(world.processes()) == 2
    server.stop()
    assert world.all_gone()


@pytest.mark.parametrize("mode", ["good", "strays"])
def test_when_the_server_is_killed_the_rest_of_it_goes_and_we_are_told(world: World, mode: str) -> None:
    with world.server(mode) as server:
        server.start()
        os.kill(world.record().pid, signal.SIGKILL)
        wait_until(world.all_gone)
        assert not server.alive
        assert server.end_reason == "killed by signal 9"
        assert server.log_tail() == "loaded"


def test_when_the_run_is_killed_everything_goes(world: World) -> None:
    owner, _ = world.owner()
    assert len(world.processes()) == 2
    owner.kill()
    wait_until(world.all_gone, 15)


def test_when_the_run_is_killed_but_a_fork_of_it_holds_the_pipe_everything_goes(world: World) -> None:
    owner, _ = world.owner(FORKS="yes")
    owner.kill()
    wait_until(world.all_gone, 15)


def test_when_the_supervisor_is_killed_everything_goes(world: World) -> None:
    with world.server() as server:
        server.start()
        assert server.supervisor_pid
        os.kill(server.supervisor_pid, signal.SIGKILL)
        wait_until(world.all_gone, 15)
        wait_until(lambda: not server.alive)
        assert server.end_reason == "its supervisor is gone"


def test_a_supervisor_that_is_asked_to_terminate_ends_its_server(world: World) -> None:
    with world.server() as server:
        server.start()
        assert server.supervisor_pid
        os.kill(server.supervisor_pid, signal.SIGTERM)
        wait_until(world.all_gone)


def test_when_run_and_supervisor_are_killed_together_the_next_start_ends_what_they_left(world: World) -> None:
    owner, supervisor_pid = world.owner()
    os.kill(owner.pid, signal.SIGSTOP)  # so that it cannot see its supervisor die
    os.kill(supervisor_pid, signal.SIGKILL)
    owner.kill()
    wait_until(lambda: len(world.processes()) == 1)  # the kernel ends the server; nobody is left to end its child
    (orphan,) = world.processes()
    assert world.lock_is_free()
    with world.server() as server:
        server.start()
        assert orphan not in world.processes()
        assert len(world.processes()) == 2
    assert world.all_gone()


# --- State that lies ------------------------------------------------------------------------------------------------


def leave_state(world: World, /, **changes: Any) -> None:
    """A state file as a dead supervisor leaves it."""
    record = supervisor.Record(supervisor.world(), 1, 1, "0:0", str(world.folder / "servers" / "gone"))
    world.devices.mkdir(exist_ok=True)
    state = {"owner_pid": 1, "supervisor_pid": 1, "model": "old", "server": record._replace(**changes)._asdict()}
    (world.devices / "cpu.json").write_text(json.dumps(state))


@pytest.mark.parametrize("lie", ["another boot", "another start time"])
def test_a_process_that_only_has_the_number_is_left_alone(world: World, lie: str) -> None:
    process, seen = bystander()
    try:
        if lie == "another boot":
            leave_state(world, world="another boot", pid=seen.pid, start_time=seen.start_time)
        else:
            leave_state(world, pid=seen.pid, start_time=seen.start_time - 1)
        with world.server() as server:
            server.start()
            assert process.poll() is None
    finally:
        process.kill()
        process.wait()


def test_a_session_whose_leader_is_gone_is_only_ours_if_it_writes_to_our_log(world: World) -> None:
    leader = subprocess.Popen(["sh", "-c", "sleep 600 & echo $!"], start_new_session=True, stdout=subprocess.PIPE)
    assert leader.stdout
    orphan = int(leader.stdout.readline())
    leader.wait()
    leader.stdout.close()
    try:
        leave_state(world, pid=leader.pid)
        with world.server() as server:
            server.start()
            assert supervisor.look_up(orphan)
    finally:
        os.kill(orphan, signal.SIGKILL)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"server": {"pid": 1}}', '{"server": null}'])
def test_a_state_file_that_says_nothing_is_no_obstacle(world: World, text: str) -> None:
    world.devices.mkdir()
    (world.devices / "cpu.json").write_text(text)
    with world.server() as server:
        server.start()
        assert server.alive


# --- Two at once ----------------------------------------------------------------------------------------------------


def test_a_second_start_waits_for_the_device_and_says_for_whom(world: World) -> None:
    owner, _ = world.owner()
    lines: list[str] = []
    second = world.server()
    start = threading.Thread(target=second.start, kwargs={"progress": lines.append}, daemon=True)
    before = world.processes()
    start.start()
    wait_until(lambda: any("waiting" in line for line in lines), 15)
    assert f"waiting for device cpu, held by process {owner.pid} (model first)" in lines[-1]
    assert world.processes() == before
    owner.kill()
    start.join(20)
    assert second.alive
    assert not set(before) & set(world.processes())
    second.stop()
    assert world.all_gone()


def test_a_start_that_waits_can_be_stopped_and_leaves_the_first_alone(world: World) -> None:
    with world.server(name="first") as first:
        first.start()
        second = world.server()
        with pytest.raises(BatchStopped):
            second.start(should_stop=lambda: second.supervisor_pid is not None)
        assert first.alive
        assert len(world.processes()) == 2


def test_of_eight_starts_at_once_one_server_runs_at_a_time(world: World) -> None:
    most = []

    def one(number: int) -> None:
        with world.server(name=f"m{number}") as server:
            server.start()
            most.append(len(world.processes()))

    threads = [threading.Thread(target=one, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert most == [2] * 8
    assert world.all_gone()


# --- What is started ------------------------------------------------------------------------------------------------


def test_arguments_of_an_entry() -> None:
    entry = ModelEntry(
        name="m", source="org/model", revision="abc", aliases=("a", "b"),
        engine_args={
            "max_model_len": 1024, "enforce_eager": True, "enable_prefix_caching": False, "dtype": "float32",
            "seed": -1, "hf_overrides": {"x": 1}, "lora_modules": [{"name": "l", "path": "p"}, "n=q"],
            "middleware": ["m.A", "m.B"], "compilation_config.mode": 3, "allowed_origins": ["*"],
        },
    )  # fmt: skip
    expected = textwrap.dedent("""
        --model org/model --served-model-name m a b --revision=abc --allowed-media-domains none.invalid
        --enable-request-id-headers --disable-uvicorn-access-log --max-model-len=1024 --enforce-eager
        --no-enable-prefix-caching --dtype=float32 --seed=-1 --hf-overrides={"x":1}
        --lora-modules {"name":"l","path":"p"} n=q --middleware=m.A --middleware=m.B --compilation-config.mode=3
        --allowed-origins=["*"]
    """).split()
    assert [argument.replace(" ", "") for argument in server_arguments(entry)] == expected


def test_media_domains_of_an_entry_are_passed_on() -> None:
    arguments = server_arguments(ModelEntry(name="m", source="o/m", allowed_media_domains=("a.org", "b.org")))
    at = arguments.index("--allowed-media-domains")
    assert arguments[at + 1 : at + 3] == ["a.org", "b.org"]


@pytest.mark.parametrize("key", ["uds", "served_model_name", "port"])
def test_arguments_that_are_ours_are_refused(key: str) -> None:
    with pytest.raises(CatalogError, match="take it out"):
        server_arguments(ModelEntry(name="m", source="o/m", engine_args={key: "x"}))


def test_environment_keeps_our_secrets_and_the_entry_wins() -> None:
    ours = {
        "PATH": "/bin", "DAGSTER_POSTGRES_URL": "s", "VLLM_BATCH_DATA": "s", "OPENAI_API_KEY": "s", "VLLM_API_KEY": "s",
        "LABEL_STUDIO_TOKEN": "s", "PGPASSWORD": "s", "HF_TOKEN": "hub", "VLLM_LOGGING_LEVEL": "INFO",
    }  # fmt: skip
    entry = ModelEntry(name="m", source="o/m", env={"VLLM_LOGGING_LEVEL": "DEBUG", "VLLM_API_KEY": "wanted"})
    environment = server_environment(entry, ours)
    assert "s" not in environment.values()
    assert environment["HF_TOKEN"] == "hub"
    assert environment["VLLM_LOGGING_LEVEL"] == "DEBUG"
    assert environment["VLLM_API_KEY"] == "wanted"
    assert environment["VLLM_NO_USAGE_STATS"] == environment["DO_NOT_TRACK"] == "1"
    assert "HF_HUB_OFFLINE" not in environment
    assert server_environment(ModelEntry(name="m", source="/models/m"), {})["HF_HUB_OFFLINE"] == "1"


def test_cpu_threads_are_bound_to_the_cpus_this_process_may_use() -> None:
    cpus = ",".join(str(cpu) for cpu in sorted(os.sched_getaffinity(0)))
    environment = cpu_environment(ModelEntry(name="m", source="o/m"))
    assert environment == {"VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_CPU_OMP_THREADS_BIND": cpus}


@pytest.mark.parametrize(
    ("chosen", "size", "expected"),
    [
        (None, 1, ["GPU-a"]),
        (None, 2, ["GPU-a", "GPU-b"]),
        ("1", 1, ["GPU-b"]),
        ("1,0", 2, ["GPU-b", "GPU-a"]),
        ("GPU-b", 1, ["GPU-b"]),
        ("", 1, ["cpu"]),
        ("7", 1, ["cpu"]),
    ],
)
def test_devices_are_the_first_visible_ones(chosen: str | None, size: int, expected: list[str]) -> None:
    entry = ModelEntry(name="m", source="o/m", engine_args={"tensor_parallel_size": size})
    environ = {} if chosen is None else {"CUDA_VISIBLE_DEVICES": chosen}
    assert choose_devices(entry, environ, {"0": "GPU-a", "1": "GPU-b"}) == expected


def test_too_few_devices_are_an_error_and_none_is_the_cpu() -> None:
    entry = ModelEntry(name="m", source="o/m", engine_args={"tensor-parallel-size": 3})
    with pytest.raises(EngineStartFailed, match="needs 3 GPUs; 2 are visible"):
        choose_devices(entry, {}, {"0": "GPU-a", "1": "GPU-b"})
    assert choose_devices(entry, {}, {}) == ["cpu"]
