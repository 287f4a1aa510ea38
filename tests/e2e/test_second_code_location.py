"""The example of a code location of one's own, in its own process beside ours."""

import os
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from dagster import AssetKey

from tests.helpers import PARTITIONS, ROOT, World, chat, new_instance, new_world, wait_until
from vllm_batch_pipelines.processes import end_all, session_members, start_session

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

EXAMPLE = ROOT / "examples" / "second_code_location"
WORKSPACE = str(EXAMPLE / "workspace.yaml")


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    """With an instance of its own: in that of other tests the daemon would run what theirs have left to do."""
    with new_instance() as instance, new_world(tmp_path, instance) as made:
        yield made


def environment(world: World) -> dict[str, str]:
    return {
        **os.environ,  # the world's settings
        "PYTHONPATH": f"{ROOT}{os.pathsep}{EXAMPLE}",
        "DAGSTER_HOME": world.instance.root_directory,
        "TICKETS_DB": f"sqlite:///{world.root}/tickets.db",
    }


@contextmanager
def daemon(world: World) -> Iterator[subprocess.Popen[bytes]]:
    """Ended with its code servers, which outlive a daemon that only gets a signal."""
    command = [sys.executable, "-m", "dagster._daemon", "run", "-w", WORKSPACE]
    process, identity = start_session(command, environment(world), world.root / "daemon.log")
    try:
        yield process
    finally:
        mark = f"DAGSTER_HOME={world.instance.root_directory}"

        def members() -> list[int]:
            process.poll()
            return session_members(identity, mark)

        end_all(members, lambda: 5)
        process.wait(10)


def test_both_code_locations_load(world: World) -> None:
    command = [sys.executable, "-m", "dagster", "definitions", "validate", "-w", WORKSPACE]
    done = subprocess.run(
        command, env=environment(world), cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_its_assets_follow_a_batch_that_completes(world: World) -> None:
    """The batch is answered here; everything after it is the daemon's doing."""
    lines = [chat(f"ticket-{number}-en", f"hello ({world.root})") for number in (4711, 4712)]
    batch = world.register("tickets.jsonl", "".join([*lines, chat("another", model="nobody")]), metadata={"team": "a"})
    own = AssetKey("ticket_report")

    def reported() -> bool:
        return batch.key in world.instance.get_materialized_partitions(own)

    with daemon(world) as process:
        wait_until(lambda: _ticked(world) or process.poll() is not None, 120)
        assert world.run(batch.key).success
        assert wait_until(lambda: reported() or process.poll() is not None, 150), "it never ran"
    assert batch.key in world.instance.get_dynamic_partitions(PARTITIONS)
    with closing(sqlite3.connect(world.root / "tickets.db")) as connection:
        found = connection.execute("SELECT team, number, language, error FROM tickets ORDER BY line").fetchall()
    assert found == [("a", 4711, "en", None), ("a", 4712, "en", None), ("a", None, None, "model_not_found")]
    event = world.instance.get_latest_materialization_event(own)
    assert event is not None
    assert event.asset_materialization is not None
    shown = {name: value.value for name, value in event.asset_materialization.metadata.items()}
    assert shown.items() >= {"answered": 2, "failed": 1}.items()


def _ticked(world: World) -> bool:
    """Whether the automation sensor of the second location has looked at the world once."""
    return any(state.instigator_name == "ticket_automation" for state in world.instance.all_instigator_state())
