"""The life of a server under its host: starts, leases, idling, and every way to die."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from resources.engine import processes
from resources.engine.catalog import ModelEntry
from resources.engine.host_folder import HostFolder
from resources.engine.vllm_server import VllmServer
from resources.errors import BatchStopped, EngineStartFailed, SettingsError
from tests.engine_world import GONE_SECONDS, EngineWorld, engine_world
from tests.helpers import wait_until

pytestmark = pytest.mark.e2e


@pytest.fixture
def world() -> Iterator[EngineWorld]:
    with engine_world() as made:
        yield made


# --- A life without accidents ---------------------------------------------------------------------------------------


def test_start_and_release(world: EngineWorld) -> None:
    lines: list[str] = []
    with world.server(name="org/some-model", who="batch-1") as server:
        server.start(progress=lines.append)
        assert server.alive
        assert (server.warm, server.load_seconds > 0) == (False, True)
        assert lines[0].startswith("loading org/some-model: ")
        assert (len(world.servers()), len(world.hosts_and_guardians())) == (2, 2)
        assert not world.lock_is_free()
        status = world.status("org/some-model")
        assert status
        assert (status.state, status.devices, status.pid) == ("ready", ["cpu"], server.host_pid)
        assert [(lease["who"], lease["pid"]) for lease in status.leases] == [("batch-1", os.getpid())]
        assert server.log_tail() == "loaded"
        assert server.log_path.name == "org-some-model.log"
        assert server.log_path.stat().st_mode & 0o777 == 0o600
        assert server.socket_path.parent.stat().st_mode & 0o777 == 0o700
    assert server.end_reason == "released"
    world.see_all_gone()


def test_starting_twice_is_one_start_and_releasing_twice_one_release(world: EngineWorld) -> None:
    server = world.server()
    server.start()
    before = world.servers()
    server.start()
    assert world.servers() == before
    server.release()
    server.release()
    world.see_all_gone()


def test_a_server_can_be_started_again_and_keeps_the_log_before(world: EngineWorld) -> None:
    with world.server() as server:
        server.start()
        first = server.socket_path
        record = world.told().record
        assert record
        os.kill(record.pid, signal.SIGKILL)
        wait_until(lambda: not server.alive)
        server.start()
        assert server.alive
        assert server.socket_path != first
        before = server.log_path.with_name("second.log.1").read_text()
        assert before.startswith("loaded\nengine host: killed by signal 9; the server is not started again")


def test_the_server_inherits_no_lock_and_none_of_our_files(world: EngineWorld) -> None:
    with world.server() as server:
        server.start()
        for pid in world.servers():
            files = [str(link.readlink()) for link in Path(f"/proc/{pid}/fd").iterdir()]
            assert not [name for name in files if "lock" in name or "lease" in name or name.startswith("pipe:")]


def test_the_host_has_no_environment_of_ours(world: EngineWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    with world.server() as server:
        server.start()
        for pid in world.hosts_and_guardians():
            assert Path(f"/proc/{pid}/environ").read_bytes().strip(b"\0") == b""
        stored = [path for path in server.socket_path.parent.rglob("*") if path.is_file()]
        assert stored
        assert not [path for path in stored if b"secret" in path.read_bytes()]


# --- Warm -----------------------------------------------------------------------------------------------------------


def test_the_next_run_finds_the_server_warm_whichever_process_it_is(world: EngineWorld) -> None:
    run, _ = world.run("first", keep_alive=60)
    run.kill()
    wait_until(lambda: (found := world.status("first")) and found.idle_for is not None)
    status = world.status("first")
    assert status
    assert status.stops_in is not None
    assert 50 < status.stops_in <= 60
    with world.server(name="first", keep_alive=60) as server:
        server.start()
        assert (server.warm, server.load_seconds) == (True, 0.0)
    assert len(world.starts) == 1
    assert len(world.servers()) == 2


def test_without_a_lease_for_its_time_the_host_ends_the_server_and_itself(world: EngineWorld) -> None:
    with world.server(keep_alive=0.5) as server:
        server.start()
    world.see_all_gone()


def test_a_lone_run_keeps_the_server_for_less_and_never_for_more_than_the_entry_says(world: EngineWorld) -> None:
    common: dict[str, Any] = {"runtime_dir": world.folder, "log_dir": world.folder}
    command = {"command": [sys.executable, "-S", str(world.stand_in)]}
    entry = ModelEntry(name="m", source="o/m", keep_alive=300)
    with VllmServer(entry, keep_alive=60, **common, **command) as server:
        server.start()
    wait_until(lambda: (found := world.status("m")) and found.stops_in)
    status = world.status("m")
    assert status
    assert status.stops_in is not None
    assert 50 < status.stops_in <= 60


def test_runs_on_one_model_share_one_server_and_know_of_one_another(world: EngineWorld) -> None:
    with world.server(who="one") as one:
        one.start()
        assert not one.shared
        with world.server(who="two") as two:
            two.start()
            assert two.socket_path == one.socket_path
            assert (one.shared, two.shared) == (True, True)
            status = world.status("second")
            assert status
            assert [lease["who"] for lease in status.leases] == ["one", "two"]
        assert one.alive
        assert one.shared
    assert len(world.starts) == 1
    world.see_all_gone()


def test_a_server_of_other_settings_is_not_used(world: EngineWorld) -> None:
    with world.server(keep_alive=60) as server:
        server.start()
    with world.server(keep_alive=60, env={"VLLM_LOGGING_LEVEL": "DEBUG"}) as changed:
        changed.start()
        assert not changed.warm
        assert len(world.servers()) == 2
    assert len(world.starts) == 2


def test_a_host_of_another_version_is_replaced(world: EngineWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    with world.server(keep_alive=60) as server:
        server.start()
    monkeypatch.setattr("resources.engine.vllm_server._code", lambda: "another version")
    with world.server(keep_alive=60) as server:
        server.start()
        assert not server.warm
        assert len(world.servers()) == 2


# --- Starts that fail -----------------------------------------------------------------------------------------------


def test_a_server_that_exits_gives_reason_cause_and_the_end_of_its_log(world: EngineWorld) -> None:
    server = world.server("refuses")
    with pytest.raises(EngineStartFailed) as error:
        server.start()
    message = str(error.value)
    assert "`second` did not start: exit code 3" in message
    assert "ValueError: no memory for that" in message
    assert str(server.log_path) in message
    assert message.count("who passed it on") in (25, 26)  # the line after the cause, too; the host's own word
    world.see_all_gone()
    with world.server(name="another") as another:
        another.start()


def test_a_command_that_is_not_there_is_named(world: EngineWorld) -> None:
    entry = ModelEntry(name="m", source="org/m")
    server = VllmServer(entry, runtime_dir=world.folder, log_dir=world.folder, command=["/no/such/program"])
    with pytest.raises(EngineStartFailed, match="/no/such/program"):
        server.start()
    world.see_all_gone()


def test_a_model_folder_that_is_not_there_is_named_before_anything_starts(world: EngineWorld) -> None:
    entry = ModelEntry(name="m", source=str(world.folder / "no-model"))
    with pytest.raises(EngineStartFailed, match=r"no-model \(config.json is not there\)"):
        VllmServer(entry, runtime_dir=world.folder, log_dir=world.folder).start()


def test_a_server_that_never_answers_is_given_up(world: EngineWorld) -> None:
    with pytest.raises(EngineStartFailed, match=r"not ready after 0\.5 s"):
        world.server("mute", startup_timeout=0.5).start()
    world.see_all_gone()


def test_a_stop_while_loading_leaves_nothing(world: EngineWorld) -> None:
    with pytest.raises(BatchStopped):
        world.server("mute", keep_alive=60).start(should_stop=lambda: len(world.servers()) == 2)
    world.see_all_gone()


def test_an_interrupt_while_loading_leaves_nothing(world: EngineWorld) -> None:
    def interrupt() -> bool:
        if len(world.servers()) == 2:
            raise KeyboardInterrupt
        return False

    with pytest.raises(KeyboardInterrupt):
        world.server("mute", keep_alive=60).start(should_stop=interrupt)
    world.see_all_gone()


def test_a_runtime_folder_too_long_for_sockets_is_refused(world: EngineWorld) -> None:
    with pytest.raises(SettingsError, match="at most 53 bytes"):
        VllmServer(ModelEntry(name="m", source="o/m"), runtime_dir=world.folder / ("x" * 60), log_dir=world.folder)


def test_a_runtime_folder_behind_a_link_is_refused(world: EngineWorld) -> None:
    link = world.folder / "link"
    link.symlink_to(world.folder)
    with pytest.raises(SettingsError, match="somebody else"):
        VllmServer(ModelEntry(name="m", source="o/m"), runtime_dir=link, log_dir=world.folder)


# --- Deaths ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["stubborn", "strays"])
def test_what_ignores_sigterm_or_left_the_session_is_ended_too(world: EngineWorld, mode: str) -> None:
    with world.server(mode) as server:
        server.start()
        assert len(world.servers()) == 2
    world.see_all_gone()


@pytest.mark.parametrize("mode", ["good", "strays"])
def test_when_the_server_is_killed_the_rest_of_it_goes_and_we_are_told(world: EngineWorld, mode: str) -> None:
    with world.server(mode, keep_alive=60) as server:
        server.start()
        record = world.told().record
        assert record
        os.kill(record.pid, signal.SIGKILL)
        assert wait_until(lambda: server.end_reason) == "killed by signal 9"
        assert not server.alive
        world.see_all_gone()
        assert server.log_tail().startswith("loaded\nengine host: killed by signal 9")
    assert len(world.starts) == 1


def test_when_the_run_is_killed_its_lease_goes_with_it(world: EngineWorld) -> None:
    run, _ = world.run()
    assert len(world.servers()) == 2
    run.kill()
    world.see_all_gone()


def test_when_the_run_is_killed_but_a_fork_of_it_has_the_lease_open_it_goes_too(world: EngineWorld) -> None:
    run, _ = world.run(FORKS="yes")
    run.kill()
    run.wait()
    world.see_all_gone()


@pytest.mark.parametrize("victim", ["host", "guardian"])
@pytest.mark.parametrize("mode", ["good", "strays"])
def test_when_host_or_guardian_is_killed_everything_goes(world: EngineWorld, mode: str, victim: str) -> None:
    with world.server(mode, keep_alive=60) as server:
        server.start()
        host = server.host_pid
        assert host
        os.kill(host if victim == "host" else world.guardian(host), signal.SIGKILL)
        wait_until(lambda: not server.alive)
        wait_until(lambda: not world.servers() and not world.hosts_and_guardians(), GONE_SECONDS)
        assert server.end_reason in ("its engine host is gone", "stopped", "killed by signal 9")
    world.hosts.reap()
    world.see_all_gone()


def test_a_host_that_is_asked_to_terminate_ends_its_server(world: EngineWorld) -> None:
    with world.server(keep_alive=60) as server:
        server.start()
        assert server.host_pid
        os.kill(server.host_pid, signal.SIGTERM)
        world.see_all_gone()


def test_when_run_and_host_are_killed_together_nothing_is_left(world: EngineWorld) -> None:
    run, host = world.run(keep_alive=60)
    os.kill(run.pid, signal.SIGSTOP)  # so that it cannot see its host die
    os.kill(host, signal.SIGKILL)
    run.kill()
    world.see_all_gone()


def test_when_run_host_and_server_are_killed_together_nothing_is_left(world: EngineWorld) -> None:
    run, host = world.run(keep_alive=60)
    record = world.told().record
    assert record
    for pid in (run.pid, host):
        os.kill(pid, signal.SIGSTOP)
    for pid in (record.pid, host, run.pid):
        os.kill(pid, signal.SIGKILL)
    world.see_all_gone()


def test_when_run_host_and_guardian_are_killed_together_the_next_start_ends_what_they_left(world: EngineWorld) -> None:
    run, host = world.run(keep_alive=60)
    guardian = world.guardian(host)
    for pid in (run.pid, host, guardian):
        os.kill(pid, signal.SIGSTOP)  # so that none sees another die
    for pid in (guardian, host, run.pid):
        os.kill(pid, signal.SIGKILL)
    wait_until(lambda: len(world.servers()) == 1)  # the kernel ends the server; nobody is left to end its child
    (orphan,) = world.servers()
    assert world.lock_is_free()
    with world.server() as server:
        server.start()
        assert orphan not in world.servers()
        assert len(world.servers()) == 2
    world.see_all_gone()


# --- State that lies ------------------------------------------------------------------------------------------------


def bystander() -> tuple[subprocess.Popen[bytes], processes.Process]:
    """A process that is none of ours, leading a session of its own."""
    process = subprocess.Popen(["sleep", "600"], start_new_session=True)
    seen = processes.look_up(process.pid)
    assert seen
    return process, seen


def leave_folder(world: EngineWorld, /, events: str | None = None, **changes: Any) -> HostFolder:
    """The folder of a host that is dead, guardian and all: of an earlier boot, say."""
    folder = HostFolder(world.hosts.servers_dir / "00000000")
    folder.path.mkdir()
    folder.lock_path.touch()
    folder.describe(model="old", settings="s", devices=["cpu"], log="log", created_at=0.0)
    record = processes.Record(processes.world(), 1, 1, "0:0", str(folder.path))._replace(**changes)
    event = json.dumps({"event": "started", "at": 0.0, "record": record})
    folder.events.path.write_text(event + "\n" if events is None else events)
    return folder


@pytest.mark.parametrize("lie", ["another boot", "another start time"])
def test_a_process_that_only_has_the_number_is_left_alone(world: EngineWorld, lie: str) -> None:
    process, seen = bystander()
    try:
        if lie == "another boot":
            leave_folder(world, world="another boot", pid=seen.pid, start_time=seen.start_time)
        else:
            leave_folder(world, pid=seen.pid, start_time=seen.start_time - 1)
        with world.server() as server:
            server.start()
            assert process.poll() is None
    finally:
        process.kill()
        process.wait()
    world.see_all_gone()


def test_a_session_whose_leader_is_gone_is_only_ours_if_it_writes_to_our_log(world: EngineWorld) -> None:
    leader = subprocess.Popen(["sh", "-c", "sleep 600 & echo $!"], start_new_session=True, stdout=subprocess.PIPE)
    assert leader.stdout
    orphan = int(leader.stdout.readline())
    leader.wait()
    leader.stdout.close()
    try:
        leave_folder(world, pid=leader.pid)
        with world.server() as server:
            server.start()
            assert processes.look_up(orphan)
    finally:
        os.kill(orphan, signal.SIGKILL)


@pytest.mark.parametrize("text", ["", "{", "[]\n", "{}\n", '{"event": "started", "record": [1]}\n'])
def test_events_that_say_nothing_are_no_obstacle(world: EngineWorld, text: str) -> None:
    folder = leave_folder(world, events=text)
    with world.server() as server:
        server.start()
        assert server.alive
        assert not folder.path.exists()


def test_a_lease_of_an_earlier_boot_holds_nothing(world: EngineWorld) -> None:
    folder = leave_folder(world, world="another boot")
    (folder.leases_dir / "000001").write_text(json.dumps({"identity": ["another boot", 1, 1], "who": "old"}))
    assert folder.leases() == []
    assert world.hosts.status() == []
    with world.server() as server:
        server.start()
        assert server.alive
