"""`vllm-batch engine`: what it shows of real hosts with stand-in servers, and what it stops."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner, Result

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
