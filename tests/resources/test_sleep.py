"""Models that sleep to make room: stand-in servers under real hosts. No GPU, and no real sleep, is in these tests."""

import logging
import os
import signal
import threading
from collections.abc import Iterator
from dataclasses import replace

import pytest

from resources.answering import ModelReport
from resources.engine.factory import running
from resources.engine.vllm_server import VllmServer
from resources.errors import BatchStopped, EngineStartFailed
from tests.engine_world import EngineWorld, Starting, engine_world
from tests.helpers import wait_until

pytestmark = pytest.mark.e2e


@pytest.fixture
def world() -> Iterator[EngineWorld]:
    with engine_world(gpus=1) as made:
        yield made


@pytest.fixture
def two_gpus() -> Iterator[EngineWorld]:
    with engine_world(gpus=2) as made:
        yield made


def sleeper(world: EngineWorld, name: str, mode: str = "good", keep_alive: float = 60, **more: object) -> VllmServer:
    return world.server(mode, name, keep_alive=keep_alive, residency="sleep", **more)  # type: ignore[arg-type]


def swap(first: VllmServer, second: VllmServer) -> VllmServer:
    """Start the first, and the second as soon as it is let go; the second."""
    first.start()
    waiting = Starting(second)
    waiting.says("waiting")
    first.release()
    return waiting.join()


def put_to_sleep(world: EngineWorld, name: str, mode: str = "good", keep_alive: float = 60) -> None:
    """Have that model asleep, and nothing else."""
    with swap(sleeper(world, name, mode, keep_alive), world.server(name="other")):
        world.see(name, "asleep")
    wait_until(lambda: world.status("other") is None and world.lock_is_free("GPU-0"), 15)


def server_pid(world: EngineWorld, name: str) -> int:
    record = world.told(name).record
    assert record
    return record.pid


# --- Swaps ----------------------------------------------------------------------------------------------------------


def test_two_models_by_turns_are_loaded_once_each_and_woken_after_that(world: EngineWorld) -> None:
    with sleeper(world, "a") as a:
        a.start()
        assert (a.warm, a.woken) == (False, False)
    with sleeper(world, "b") as b:
        b.start()
        assert b.replaced == ["a"]
        asleep = world.see("a", "asleep")
        assert asleep.stops_in is not None
        assert 50 < asleep.stops_in <= 60
        assert not world.lock_is_free("GPU-0")
        assert world.hosts.states() == {sleeper(world, "a").settings(): "asleep", b.settings(): "warm"}
    with sleeper(world, "a") as a:
        a.start()
        assert (a.warm, a.woken, a.replaced) == (False, True, ["b"])
        assert 0 < a.load_seconds < 20
        engine = running(a, threading.Event())
        assert (engine.warm, engine.woken, engine.load_seconds) == (False, True, a.load_seconds)
        with sleeper(world, "a") as second:
            second.start()
            assert (second.warm, second.woken, a.shared) == (True, False, True)
    assert world.starts == ["a GPU-0", "b GPU-0"]
    assert world.calls == ["a /sleep?level=1", "b /sleep?level=1", "a /wake_up"]
    world.hosts.stop_idle()
    world.see_all_gone()


def test_a_model_of_vectors_may_differ_in_their_last_digits(world: EngineWorld) -> None:
    put_to_sleep(world, "a", "embeds")
    with sleeper(world, "a", "embeds") as a:
        a.start()
        assert a.woken


def test_many_who_want_a_sleeping_model_wake_it_once(world: EngineWorld) -> None:
    put_to_sleep(world, "a")
    starting = [Starting(sleeper(world, "a")) for _ in range(8)]
    servers = [start.join() for start in starting]
    assert len({server.socket_path for server in servers}) == 1
    assert world.starts == ["a GPU-0", "other GPU-0"]
    assert world.calls == ["a /sleep?level=1", "a /wake_up"]
    assert not world.lock_is_free("GPU-0")
    for server in servers:
        server.release()


def test_many_runs_of_three_models_load_each_once_and_never_two_are_on_the_device(world: EngineWorld) -> None:
    left = [Starting(sleeper(world, f"m{number % 3}")) for number in range(12)]
    while left:
        wait_until(lambda: any(start.server.alive for start in left), 30)
        done = [start for start in left if start.server.alive]
        assert len({start.server.entry.name for start in done}) == 1
        for start in done:
            start.join().release()
            left.remove(start)
    assert sorted(world.starts) == ["m0 GPU-0", "m1 GPU-0", "m2 GPU-0"]


def test_a_sleeping_model_waits_for_its_turn(world: EngineWorld) -> None:
    put_to_sleep(world, "a")
    with world.server(name="b") as b:
        b.start()
        second = Starting(world.server(name="c", who="the run of c"))
        second.says("in use by a test")
        third = Starting(sleeper(world, "a"))
        third.says("its turn after the run of c")
    second.join()
    assert third.waits
    second.server.release()
    assert third.join().woken
    third.server.release()


def test_a_model_that_sleeps_where_another_runs_is_loaded_on_a_free_device(two_gpus: EngineWorld) -> None:
    with sleeper(two_gpus, "a") as a, two_gpus.server(name="long", keep_alive=60) as long:
        a.start()
        long.start()
        a.release()
        with two_gpus.server(name="c") as c:  # takes the one that is idle
            c.start()
            two_gpus.see("a", "asleep")
            long.release()
            two_gpus.hosts.stop_idle()
            with sleeper(two_gpus, "a") as again:
                again.start()
                assert not again.woken
                assert two_gpus.starts[-1] == "a GPU-1"
            wait_until(lambda: [s.devices for s in two_gpus.hosts.status() if s.model == "a"] == [["GPU-1"]], 15)


def test_on_a_cpu_the_server_stops_and_that_is_said(caplog: pytest.LogCaptureFixture) -> None:
    with engine_world() as world, caplog.at_level(logging.WARNING):
        with sleeper(world, "a") as a:
            a.start()
        assert "`residency: sleep` of a: vLLM's sleep mode needs a GPU" in caplog.text
        with world.server(name="b") as b:
            b.start()
            assert world.status("a") is None
        assert world.calls == []


def test_a_report_says_how_the_engine_came_up() -> None:
    report = ModelReport("m", "vllm", "g", 3, asked=3, load_seconds=2.34)
    assert report.start == "cold, loaded in 2.3 s"
    assert replace(report, woken=True).start == "woken in 2.3 s"
    assert replace(report, load_seconds=0.0, warm=True).start == "warm"
    assert replace(report, load_seconds=0.0, asked=0).start == "not needed"


def test_residency_is_part_of_what_a_server_is(world: EngineWorld) -> None:
    assert sleeper(world, "a").settings() != world.server(name="a", keep_alive=60).settings()


# --- What is not woken ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "said"),
    [
        ("other-tokens", "its answer after a sleep is not the one before"),
        ("fails-at-wake", "it did not wake"),
        ("hangs-at-wake", "it did not wake"),
    ],
)
def test_a_server_that_does_not_wake_as_it_was_is_started_again(world: EngineWorld, mode: str, said: str) -> None:
    with sleeper(world, "a", mode, sleep_timeout=2) as a:
        a.start()
    with world.server(name="b") as b:
        b.start()
    with sleeper(world, "a", mode) as again:
        start = Starting(again)
        start.join()
        assert (again.woken, again.alive) == (False, True)
        assert [line for line in start.lines if f"({said}); another one is started" in line]
        log = again.log_path.with_name("a.log.1").read_text()
        assert f"engine host: {said}; the server is not started again by itself" in log
    assert world.starts == ["a GPU-0", "b GPU-0", "a GPU-0"]


@pytest.mark.parametrize("mode", ["hangs-at-sleep", "stays-awake", "no-canary"])
def test_a_server_that_cannot_sleep_is_stopped(world: EngineWorld, mode: str) -> None:
    with sleeper(world, "a", mode, sleep_timeout=1) as a:
        a.start()
    with world.server(name="b") as b:
        b.start()
        assert world.status("a") is None
        assert len(world.servers()) == 2
    assert "a /wake_up" not in world.calls


def test_a_model_that_was_changed_is_not_woken_but_replaced(world: EngineWorld) -> None:
    put_to_sleep(world, "a")
    with sleeper(world, "a", env={"VLLM_LOGGING_LEVEL": "DEBUG"}) as changed:
        changed.start()
        assert not changed.woken
        wait_until(lambda: len(world.hosts.status()) == 1, 15)
    with sleeper(world, "a") as back:
        back.start()
        assert not back.woken
    assert world.starts == ["a GPU-0", "other GPU-0", "a GPU-0", "a GPU-0"]
    assert world.calls == ["a /sleep?level=1"]  # to sleep instead of making room for itself helps nobody


def test_sleepers_are_stopped_where_what_they_keep_is_in_the_way(world: EngineWorld) -> None:
    put_to_sleep(world, "a")
    with world.server("crowded", "b") as b:
        start = Starting(b)
        start.join()
        assert world.status("a") is None
        assert [line for line in start.lines if "did not start beside a, asleep" in line]
    assert world.starts[-2:] == ["b GPU-0", "b GPU-0"]


def test_a_model_that_never_starts_fails_with_its_own_reason(world: EngineWorld) -> None:
    put_to_sleep(world, "a")
    with pytest.raises(EngineStartFailed, match="no memory for that"):
        world.server("refuses", "b").start()
    assert world.starts[-2:] == ["b GPU-0", "b GPU-0"]


# --- The end of a sleep ---------------------------------------------------------------------------------------------


def test_a_sleeping_server_ends_after_its_time(world: EngineWorld) -> None:
    with sleeper(world, "a", keep_alive=3) as a, world.server(name="b") as b:
        swap(a, b)
        world.see("a", "asleep")
        wait_until(lambda: world.status("a") is None, 20)
        assert b.alive
        assert len(world.servers()) == 2
    world.see_all_gone()


def test_a_sleeping_server_stays_for_those_who_wait_for_it(world: EngineWorld) -> None:
    with sleeper(world, "a", keep_alive=3) as a, world.server(name="b") as b:
        swap(a, b)
        third = Starting(sleeper(world, "a", keep_alive=0))
        third.says("in use by a test")
        wait_until(lambda: (found := world.status("a")) and found.state == "asleep" and found.stops_in == 0, 20)
        b.release()
        assert third.join().woken
        third.server.release()
    world.see_all_gone()


@pytest.mark.parametrize("victims", [["server"], ["host"], ["guardian"], ["host", "guardian", "server"]], ids="+".join)
def test_a_sigkill_while_asleep_leaves_nothing(world: EngineWorld, victims: list[str]) -> None:
    put_to_sleep(world, "a")
    host = world.see("a", "asleep").pid
    assert host
    pids = {"server": server_pid(world, "a"), "host": host, "guardian": world.guardian(host)}
    for victim in victims:
        os.kill(pids[victim], signal.SIGSTOP)
    for victim in victims:
        os.kill(pids[victim], signal.SIGKILL)
    wait_until(lambda: not world.hosts_and_guardians(), 15)
    world.hosts.reap()
    world.see_all_gone()
    with sleeper(world, "a") as again:
        again.start()
        assert not again.woken


def test_when_the_run_is_killed_that_had_a_model_sleep_that_goes_on(world: EngineWorld) -> None:
    with sleeper(world, "a") as a:
        a.start()
    run, _ = world.run("b", keep_alive=0)
    world.see("a", "asleep")
    run.kill()
    wait_until(lambda: world.status("b") is None, 15)
    with sleeper(world, "a") as again:
        again.start()
        assert again.woken
    world.hosts.stop_idle()
    world.see_all_gone()


@pytest.mark.parametrize("victim", ["host", "server"])
def test_a_sigkill_while_falling_asleep_makes_room_too(world: EngineWorld, victim: str) -> None:
    with sleeper(world, "a", "hangs-at-sleep") as a:
        a.start()
    other = Starting(world.server(name="other"))
    host = world.see("a", "falling asleep").pid
    assert host
    assert not world.lock_is_free("GPU-0")
    os.kill(host if victim == "host" else server_pid(world, "a"), signal.SIGKILL)
    other.join().release()
    world.see_all_gone()


@pytest.mark.parametrize("victim", ["host", "server"])
def test_a_sigkill_while_waking_starts_another_server(world: EngineWorld, victim: str) -> None:
    put_to_sleep(world, "a", "hangs-at-wake")
    again = Starting(sleeper(world, "a", "hangs-at-wake"))
    host = world.see("a", "waking").pid
    assert host
    wait_until(lambda: not world.lock_is_free("GPU-0"))
    os.kill(host if victim == "host" else server_pid(world, "a"), signal.SIGKILL)
    assert not again.join().woken
    assert world.starts[-1] == "a GPU-0"
    again.server.release()
    world.hosts.stop_idle()
    world.see_all_gone()


@pytest.mark.parametrize("state", ["asleep", "falling asleep", "waking"])
def test_a_server_is_stopped_in_any_state(world: EngineWorld, state: str) -> None:
    modes = {"asleep": "good", "falling asleep": "hangs-at-sleep", "waking": "hangs-at-wake"}
    with sleeper(world, "a", modes[state]) as a:
        a.start()
    other = Starting(world.server(name="other"))
    if state != "falling asleep":
        other.join().release()
        world.see("a", "asleep")
    again = Starting(sleeper(world, "a", modes[state])) if state == "waking" else None
    found = world.see("a", state)
    if again:
        with pytest.raises(BatchStopped):
            again.stop()
    world.hosts.stop([found.id])
    if state == "falling asleep":
        other.join().release()
    world.see_all_gone()
