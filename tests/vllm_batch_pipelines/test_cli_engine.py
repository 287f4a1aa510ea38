"""`vllm-batch engine`: what it shows of real hosts with stand-in servers, and what it stops."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner, Result

from resources.engine.catalog import load_catalog
from resources.engine.host_folder import HostFolder
from resources.engine.notes import try_lock
from resources.engine.vllm_server import VllmServer
from resources.settings import settings
from tests.engine_world import EngineWorld, Starting, engine_world
from tests.helpers import wait_until
from vllm_batch_pipelines.cli.main import app
from vllm_batch_pipelines.stack import stop_idle_servers

pytestmark = pytest.mark.e2e


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[EngineWorld]:
    """A runtime folder that the command line uses too."""
    with engine_world(gpus=2) as made:
        models = {"first": {"source": "org/model", "aliases": ["one"]}, "dry-run": {"engine": "null"}}
        (tmp_path / "models.yaml").write_text(yaml.safe_dump({"models": models}))
        monkeypatch.setenv("VLLM_BATCH_RUNTIME_DIR", str(made.folder))
        monkeypatch.setenv("VLLM_BATCH_DATA", str(tmp_path / "data"))
        monkeypatch.setenv("VLLM_BATCH_MODELS_FILE", str(tmp_path / "models.yaml"))
        settings.cache_clear()
        yield made
    settings.cache_clear()


def engine(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["engine", *arguments])


def test_status_without_a_server_says_so(world: EngineWorld) -> None:
    assert "No server is up" in engine("status").stdout
    assert json.loads(engine("status", "--json").stdout) == {"servers": [], "waiting": []}
    assert engine("stop").exit_code == 0


def test_status_tells_who_uses_what_who_waits_and_when_an_idle_one_stops(world: EngineWorld) -> None:
    with world.server(name="first", who="batch-1, run abc") as first:
        first.start()
        with world.server(name="idle", keep_alive=3600) as idle:
            idle.start()
        wait_until(lambda: (found := world.status("idle")) and found.stops_in)
        waiting = Starting(world.server(name="large", needs=2, who="batch-2"))
        waiting.says("waiting")
        document = json.loads(engine("status", "--json").stdout)
        (used,) = [server for server in document["servers"] if server["model"] == "first"]
        assert (used["devices"], used["state"], used["pid"]) == (["GPU-0"], "ready", first.host_pid)
        assert [lease["who"] for lease in used["leases"]] == ["batch-1, run abc"]
        (ticket,) = document["waiting"]
        assert (ticket["model"], ticket["who"]) == ("large", "batch-2")
        assert "in use by batch-1, run abc" in ticket["why"]
        shown = " ".join(engine("status").stdout.split())
        assert "batch-2 waits" in shown
        with pytest.raises(Exception, match="stopped"):
            waiting.stop()


def test_an_idle_server_is_stopped_and_one_in_use_only_by_force(world: EngineWorld) -> None:
    with world.server(name="idle", keep_alive=3600) as idle:
        idle.start()
    with world.server(name="first", who="batch-1") as first:
        first.start()
        assert " ".join(engine("status").stdout.split()).count("idle, stops in 60 min") == 1
        stopped = engine("stop")
        assert stopped.exit_code == 1
        assert "Stopped idle." in stopped.stderr
        assert "first is in use by batch-1" in stopped.stderr
        assert world.status("idle") is None
        assert first.alive
        assert engine("stop", "nobody").exit_code == 2
        assert engine("stop", "one", "--force").exit_code == 0
        wait_until(lambda: not first.alive, 15)


def test_a_sleeping_server_is_shown_and_stopped_like_an_idle_one(
    world: EngineWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    for stop in (lambda: engine("stop", "one").stderr, lambda: stopped_by_the_stack()):
        with world.server(name="first", keep_alive=3600, residency="sleep") as first:
            first.start()
        with world.server(name="used") as used:
            used.start()
            world.see("first", "asleep")
            assert " ".join(engine("status").stdout.split()).count("asleep, stops in 60 min") == 1
            said = stop()
            assert "first" in said
            assert "used" not in said
            assert world.status("first") is None
            assert used.alive


def stopped_by_the_stack() -> str:
    said: list[str] = []
    stop_idle_servers(settings(), said.append)
    return " ".join(said)


def test_the_list_of_models_says_which_sleep(world: EngineWorld, tmp_path: Path) -> None:
    entry = load_catalog(tmp_path / "models.yaml").get("first")
    wanted = VllmServer(entry, runtime_dir=world.folder, log_dir=tmp_path).settings()
    folder = HostFolder(world.hosts.servers_dir / "00000000")
    folder.path.mkdir()
    lock = try_lock(folder.lock_path)
    assert lock is not None
    folder.describe(model="first", settings=wanted, devices=["GPU-0"], log="log", created_at=0.0)
    folder.events.path.write_text(json.dumps({"event": "rest", "at": 0.0, "what": "asleep"}) + "\n")
    folder.ask_to_sleep()
    listed = CliRunner().invoke(app, ["models", "list"]).stdout.splitlines()
    assert [line.split()[-1] for line in listed if line.split()[:1] == ["first"]] == ["asleep"]
    document = json.loads(CliRunner().invoke(app, ["models", "list", "--json"]).stdout)
    assert {model["name"]: (model["warm"], model["asleep"]) for model in document} == {
        "first": (False, True),
        "dry-run": (False, False),
    }
    os.close(lock)


def test_logs_shows_the_end_of_a_server_log(world: EngineWorld) -> None:
    assert engine("logs").exit_code == 2
    with world.server(name="first") as first:
        first.start()
        shown = engine("logs", "first", "-n", "5")
        assert shown.stdout == "loaded\n"
        assert str(first.log_path) in shown.stderr


def test_end_of_the_stack_stops_idle_servers_alone(world: EngineWorld) -> None:
    with world.server(name="idle", keep_alive=3600) as idle:
        idle.start()
    with world.server(name="first") as first:
        first.start()
        said: list[str] = []
        stop_idle_servers(settings(), said.append)
        assert said == ["Stopping the idle server of idle."]
        assert [host.model for host in world.hosts.status()] == ["first"]
        assert first.alive
