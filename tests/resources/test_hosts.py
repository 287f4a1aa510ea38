"""Several runs and several models: one server for one model, turns for many, and devices side by side."""

import os
import signal
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from resources.engine.catalog import Catalog, ModelEntry
from resources.engine.vllm_server import VllmServer
from resources.errors import BatchStopped, EngineStartFailed
from tests.engine_world import EngineWorld, Starting, engine_world
from tests.helpers import wait_until

pytestmark = pytest.mark.e2e


@pytest.fixture
def world() -> Iterator[EngineWorld]:
    with engine_world() as made:
        yield made


@pytest.fixture
def two_gpus() -> Iterator[EngineWorld]:
    with engine_world(gpus=2) as made:
        yield made


# --- One model ------------------------------------------------------------------------------------------------------


def test_eight_runs_at_once_have_one_server(world: EngineWorld) -> None:
    starting = [Starting(world.server(who=f"run {number}")) for number in range(8)]
    servers = [start.join() for start in starting]
    assert world.starts == ["second cpu"]
    assert len({server.socket_path for server in servers}) == 1
    assert sorted(server.warm for server in servers).count(False) >= 1
    assert len(world.servers()) == 2
    for server in servers:
        server.release()
    world.see_all_gone()


def test_all_who_wait_for_a_server_that_does_not_start_are_told_why(world: EngineWorld) -> None:
    mute = [Starting(world.server("mute", startup_timeout=3)) for _ in range(3)]
    for start in mute:
        with pytest.raises(EngineStartFailed, match="not ready after 3 s"):
            start.join()
    assert len(world.starts) == 1


# --- Many models, one device ----------------------------------------------------------------------------------------


def test_another_model_waits_for_the_lease_to_end_and_says_for_whom(world: EngineWorld) -> None:
    run, _ = world.run("first", keep_alive=60)
    second = Starting(world.server(who="the second run"))
    second.says(f"waiting for device cpu: model first, in use by the first run (process {run.pid})")
    (ticket,) = world.hosts.waiting()
    assert (ticket["model"], ticket["who"], ticket["devices"], ticket["pid"]) == (
        "second", "the second run", ["cpu"], os.getpid(),
    )  # fmt: skip
    assert len(world.servers()) == 2
    run.kill()
    server = second.join()
    assert server.replaced == ["first"]
    assert len(world.servers()) == 2
    assert world.hosts.waiting() == []
    server.release()
    world.see_all_gone()


def test_an_idle_server_makes_room_at_once(world: EngineWorld) -> None:
    with world.server(name="first", keep_alive=3600) as first:
        first.start()
    with world.server() as second:
        second.start()
        assert second.replaced == ["first"]
        assert len(world.servers()) == 2


def test_a_run_that_waits_can_be_stopped_and_leaves_the_first_alone(world: EngineWorld) -> None:
    with world.server(name="first") as first:
        first.start()
        second = Starting(world.server())
        second.says("waiting")
        with pytest.raises(BatchStopped):
            second.stop()
        assert first.alive
        assert len(world.servers()) == 2
        assert world.hosts.waiting() == []


def test_first_come_first_served_whatever_is_warm(world: EngineWorld) -> None:
    first = world.server(name="first")
    first.start()
    second = Starting(world.server(name="second", who="two"))
    second.says("waiting")
    late = Starting(world.server(name="first", who="late"))
    late.says("its turn after two")
    first.release()
    second.join()
    assert late.waits
    second.server.release()
    late.join().release()
    assert world.starts == ["first cpu", "second cpu", "first cpu"]


def test_a_run_that_is_killed_while_it_waits_holds_nobody_up(world: EngineWorld) -> None:
    first = world.server(name="first", keep_alive=60)
    first.start()
    ticket = world.hosts.queue_dir / "1-000001"
    ticket.write_text('{"identity": ["another boot", 1, 1], "devices": ["cpu"], "settings": "s"}')
    with world.server(name="first") as other:
        other.start()
        assert other.warm
    assert not ticket.exists()


def test_eight_models_at_once_each_get_their_turn_and_never_two_at_a_time(world: EngineWorld) -> None:
    starting = [Starting(world.server(name=f"m{number}")) for number in range(8)]
    left = list(starting)
    while left:
        wait_until(lambda: any(start.server.alive for start in left), 30)
        (up,) = [start for start in left if start.server.alive]
        assert len(world.servers()) == 2
        up.join().release()
        left.remove(up)
    assert len(world.starts) == 8
    world.see_all_gone()


# --- Deaths that are shared -----------------------------------------------------------------------------------------


def test_who_restarts_has_the_server_alone_and_others_wait_until_it_is_done(world: EngineWorld) -> None:
    one, two = world.server(who="one", keep_alive=60), world.server(who="two", keep_alive=60)
    one.start()
    two.start()
    record = world.told().record
    assert record
    os.kill(record.pid, signal.SIGKILL)
    wait_until(lambda: one.end_reason == two.end_reason == "killed by signal 9")
    one.restart()
    assert not one.shared
    second = Starting(two)
    second.says("in use by one")
    newcomer = Starting(world.server(who="newcomer", keep_alive=60))
    wait_until(lambda: newcomer.lines)
    assert second.waits
    assert not one.shared
    one.release()
    second.join()
    newcomer.join()
    assert len(world.starts) == 2


def test_two_that_restart_are_alone_one_after_the_other(world: EngineWorld) -> None:
    one, two = world.server(who="one", keep_alive=60), world.server(who="two", keep_alive=60)
    one.start()
    two.start()
    record = world.told().record
    assert record
    os.kill(record.pid, signal.SIGKILL)
    wait_until(lambda: one.end_reason and two.end_reason)
    one.restart()
    second = Starting(two, again=True)
    second.says("in use by one")
    late = Starting(world.server(who="late", keep_alive=60))
    late.says("its turn after two")
    one.release()
    second.join()
    assert (two.warm, two.shared, late.waits) == (True, False, True)
    two.release()
    late.join()
    assert len(world.starts) == 2


def test_who_was_alone_goes_on_alone_before_those_who_wait(world: EngineWorld) -> None:
    one = world.server(who="one", keep_alive=60)
    one.start()
    first_id = one.socket_path.parent.name
    one.restart()  # it lives, but does not answer: another one is wanted
    assert one.socket_path.parent.name != first_id
    second = Starting(world.server(who="two", keep_alive=60))
    second.says("in use by one")
    record = world.told().record
    assert record
    os.kill(record.pid, signal.SIGKILL)
    wait_until(lambda: one.end_reason)
    one.restart()
    assert one.alive
    assert second.waits
    one.release()
    second.join()
    assert len(world.starts) == 3


# --- Two devices ----------------------------------------------------------------------------------------------------


def test_two_models_run_side_by_side_on_two_gpus(two_gpus: EngineWorld) -> None:
    with two_gpus.server(name="first", keep_alive=60) as first, two_gpus.server(name="second") as second:
        first.start()
        second.start()
        assert first.alive
        assert two_gpus.starts == ["first GPU-0", "second GPU-1"]
        assert not two_gpus.lock_is_free("GPU-0")
        assert not two_gpus.lock_is_free("GPU-1")


def test_a_server_is_used_only_where_its_device_is_visible(
    two_gpus: EngineWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    with two_gpus.server(name="first", keep_alive=60) as second_gpu:
        second_gpu.start()
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    with two_gpus.server(name="first", keep_alive=60) as any_gpu:
        any_gpu.start()
        assert any_gpu.warm
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    with two_gpus.server(name="first", keep_alive=60) as first_gpu:
        first_gpu.start()
        assert not first_gpu.warm
    assert two_gpus.starts == ["first GPU-1", "first GPU-0"]


def test_free_devices_are_taken_before_idle_ones(two_gpus: EngineWorld) -> None:
    with two_gpus.server(name="first", keep_alive=60) as first:
        first.start()
    with two_gpus.server(name="second", keep_alive=60) as second:
        second.start()
    with two_gpus.server(name="third", keep_alive=60) as third:
        third.start()
        assert third.replaced == ["first"]  # idle for the longest
    assert two_gpus.starts == ["first GPU-0", "second GPU-1", "third GPU-0"]


def test_a_model_on_two_gpus_waits_for_both_and_is_not_kept_out(two_gpus: EngineWorld) -> None:
    first, second = two_gpus.server(name="first"), two_gpus.server(name="second")
    first.start()
    second.start()
    large = Starting(two_gpus.server(name="large", needs=2))
    large.says("model first, in use by a test")
    late = Starting(two_gpus.server(name="late"))
    late.says("its turn after a test")
    first.release()
    wait_until(lambda: two_gpus.lock_is_free("GPU-0"))
    assert late.waits
    second.release()
    large.join()
    assert two_gpus.starts[-1] == "large GPU-0,GPU-1"
    large.server.release()
    late.join().release()


# --- People ---------------------------------------------------------------------------------------------------------


def test_hosts_that_are_idle_can_be_stopped_and_those_in_use_are_left_alone(two_gpus: EngineWorld) -> None:
    with two_gpus.server(name="used") as used:
        used.start()
        with two_gpus.server(name="idle", keep_alive=3600) as idle:
            idle.start()
        assert two_gpus.hosts.stop_idle() == ["idle"]
        wait_until(lambda: two_gpus.lock_is_free("GPU-1"), 15)
        assert used.alive
        status = two_gpus.status("used")
        assert status
        two_gpus.hosts.stop([status.id], now=True)
        wait_until(lambda: not used.alive, 15)
        assert used.end_reason == "stopped"


# --- Adapters -------------------------------------------------------------------------------------------------------


def test_an_adapter_is_served_by_the_server_of_its_base(world: EngineWorld) -> None:
    catalog = Catalog([ModelEntry(name="base", source="org/model", adapters={"legal": "org/legal"}, keep_alive=60)])
    command = [sys.executable, "-S", str(world.stand_in)]
    common: dict[str, Any] = {"runtime_dir": world.folder, "log_dir": world.folder, "command": command}
    with VllmServer(catalog.get("base").server_entry, **common) as base:
        base.start()
        with VllmServer(catalog.get("legal").server_entry, **common) as legal:
            legal.start()
            assert legal.socket_path == base.socket_path
            assert legal.warm
    assert world.starts == ["base cpu"]
