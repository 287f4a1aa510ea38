"""The asset `exports` through the real definitions: what it does for a batch, and what a person sees of it."""

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import yaml
from dagster import (
    AssetKey,
    DagsterInstance,
    DefaultSensorStatus,
    ExecuteInProcessResult,
    evaluate_automation_conditions,
)

from resources.batch_store.batch import Batch
from resources.batch_store.store import BatchStore
from resources.errors import SettingsError
from resources.targets import load_targets
from tests.helpers import PARTITIONS, World, chats, new_world

pytestmark = pytest.mark.e2e

SECRET = "s3cret-word"
NOBODY = f"postgresql://somebody:{SECRET}@127.0.0.1:1/nothing"


@pytest.fixture
def world(tmp_path: Path, instance: DagsterInstance) -> Iterator[World]:
    """Two targets: a table in SQLite, and another at an address that a variable holds; nobody is there."""
    targets = {
        "near": {"url": f"sqlite:///{tmp_path}/near.db", "table": "results"},
        "far": {"url": "${FAR_URL}", "table": "results", "timeout": 60},
    }
    (tmp_path / "targets.yaml").write_text(yaml.safe_dump({"exports": targets}))
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("FAR_URL", NOBODY)
        with new_world(tmp_path, instance) as made:
            yield made


def published(world: World, *names: str) -> Batch:
    """A batch of three lines that names these targets, done up to its outputs."""
    path = world.root / "in.jsonl"
    path.write_text(chats(3, f"hello ({world.root})"))
    store = BatchStore(world.settings.data_root, load_targets(world.settings.targets_file))
    batch = store.register(path, {"exports": list(names)} if names else {}).batch
    world.instance.add_dynamic_partitions(PARTITIONS, [batch.key])
    assert world.run(batch.key).success
    return batch


def export(world: World, batch: Batch) -> ExecuteInProcessResult:
    """Materialize the asset alone, as the UI does."""
    job = world.definitions.resolve_implicit_global_asset_job_def()
    return job.execute_in_process(
        instance=world.instance,
        partition_key=batch.key,
        asset_selection=[AssetKey("exports")],
        raise_on_error=False,
    )


def rows(database: Path) -> int:
    with closing(sqlite3.connect(database)) as connection:
        found: int = connection.execute("SELECT count(*) FROM results").fetchone()[0]
    return found


def check(result: ExecuteInProcessResult) -> tuple[bool, str]:
    (found,) = result.get_asset_check_evaluations()
    assert found.check_name == "exported"
    return found.passed, str(found.description)


def failure(result: ExecuteInProcessResult) -> str:
    (failed,) = [event for event in result.all_events if event.event_type_value == "STEP_FAILURE"]
    return str(failed.step_failure_data.user_failure_data.description)


def exported(result: ExecuteInProcessResult) -> dict[str, Any]:
    (found,) = result.asset_materializations_for_node("exports")
    return {record.data["target"]: record.data["written now"] for record in found.metadata["targets"].records}


def test_rows_are_where_the_batch_says_and_once_only(world: World) -> None:
    batch = published(world, "near")
    first = export(world, batch)
    assert check(first) == (True, "All targets have all rows.")
    assert exported(first) == {"near": "yes"}
    assert rows(world.root / "near.db") == 3
    assert exported(export(world, batch)) == {"near": "no, was there"}


def test_a_batch_that_names_no_target_is_left_alone_and_says_so(world: World) -> None:
    result = export(world, published(world))
    assert check(result) == (True, "The batch names no target.")
    (found,) = result.asset_materializations_for_node("exports")
    assert "names no target" in str(found.metadata["note"].value)


def test_one_target_that_fails_is_named_and_the_other_has_its_rows(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = published(world, "far", "near")
    failed = export(world, batch)
    assert not failed.success
    assert failure(failed).startswith("1 of 2 exports failed, the others are done; run this asset again for what is ")
    assert "far: postgresql://127.0.0.1/nothing table results: OperationalError" in failure(failed)
    assert not check(failed)[0]
    assert rows(world.root / "near.db") == 3

    monkeypatch.setenv("FAR_URL", f"sqlite:///{world.root}/far.db")
    again = export(world, batch)
    assert check(again)[0]
    assert exported(again) == {"far": "yes", "near": "no, was there"}
    assert rows(world.root / "far.db") == 3


def test_no_secret_is_in_what_dagster_keeps(world: World, capfd: pytest.CaptureFixture[str]) -> None:
    batch = published(world, "far")
    result = export(world, batch)
    logs = [str(entry) for entry in world.instance.all_logs(result.run_id)]
    assert any("OperationalError" in entry for entry in logs)
    run = world.instance.get_run_by_id(result.run_id)
    assert SECRET not in "".join([*logs, str(run), *capfd.readouterr()])


def test_a_target_that_is_gone_since_is_named(world: World) -> None:
    batch = published(world, "near", "far")
    world.settings.targets_file.write_text(f"exports: {{near: {{url: 'sqlite:///{world.root}/near.db', table: t}}}}")
    assert "far: there is no such target in `exports`" in failure(export(world, batch))


def test_a_batch_without_outputs_fails_with_what_to_do(world: World) -> None:
    batch = world.register("in.jsonl", world.chats(1))
    options = batch.spec.options.model_copy(update={"exports": ("near",)})
    (batch.root / "batch.json").write_text(batch.spec.model_copy(update={"options": options}).model_dump_json())
    assert "it has no outputs yet; materialize batch_output first" in failure(export(world, batch))


def test_it_is_requested_as_soon_as_the_outputs_are_there(world: World) -> None:
    before = evaluate_automation_conditions(world.definitions, world.instance)
    batch = published(world, "near")
    requested = evaluate_automation_conditions(world.definitions, world.instance, cursor=before.cursor)
    assert batch.key in requested.get_requested_partitions(AssetKey("exports"))
    (sensor,) = [sensor for sensor in world.definitions.sensors or [] if sensor.name == "automation"]
    assert sensor.default_status is DefaultSensorStatus.RUNNING


def test_without_targets_there_is_no_such_asset(tmp_path: Path, instance: DagsterInstance) -> None:
    with new_world(tmp_path, instance) as world:
        assert AssetKey("exports") not in world.definitions.resolve_asset_graph().get_all_asset_keys()


def test_a_secret_that_is_missing_leaves_the_definitions_whole_and_is_told_by_who_needs_it(
    tmp_path: Path, instance: DagsterInstance
) -> None:
    (tmp_path / "targets.yaml").write_text("exports: {x: {url: '${NOT_SET_ANYWHERE}', table: t}}")
    with (
        new_world(tmp_path, instance) as world,
        pytest.raises(SettingsError, match=r"`exports.x.url` needs the environment variable NOT_SET_ANYWHERE"),
    ):
        load_targets(world.settings.targets_file)
