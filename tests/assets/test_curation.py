"""From a batch to gold stars through the real definitions, a real instance and a real Label Studio."""

import importlib
import json
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from dagster import AssetKey, DagsterInstance, ExecuteInProcessResult, SensorResult, build_sensor_context

from resources.label_studio.local_server import Server
from resources.label_studio.reviews import open_reviews
from resources.webhooks.target import STARS
from tests.helpers import World, chat, new_world, read_jsonl
from tests.receiver import SECRET, Receiver
from tests.reviewing import Reviewing
from vllm_batch_pipelines import curation

pytestmark = [pytest.mark.label_studio, pytest.mark.e2e]


@pytest.fixture
def reviewed_world(
    tmp_path: Path, instance: DagsterInstance, label_studio_server: Server, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[World, Reviewing]]:
    """A world whose settings name the real server, and a project of the test's own there."""
    reviewing = Reviewing(label_studio_server, tmp_path)
    monkeypatch.setenv("VLLM_BATCH_LABEL_STUDIO_URL", label_studio_server.url)
    monkeypatch.setenv("VLLM_BATCH_LABEL_STUDIO_API_KEY", label_studio_server.account.token)
    monkeypatch.setenv("VLLM_BATCH_LABEL_STUDIO_PROJECT", reviewing.title)
    with new_world(tmp_path, instance) as world:
        yield world, reviewing


def materialize(world: World, *names: str | AssetKey, key: str | None = None, config: Any = None) -> Any:
    keys = [AssetKey(name) if isinstance(name, str) else name for name in names]
    job = world.definitions.resolve_implicit_global_asset_job_def()
    return job.get_subset(asset_selection=set(keys)).execute_in_process(
        instance=world.instance, partition_key=key, run_config=config, raise_on_error=False
    )


def metadata(result: ExecuteInProcessResult, *key: str) -> dict[str, Any]:
    (found,) = [
        event.event_specific_data.materialization  # type: ignore[union-attr]
        for event in result.all_events
        if event.is_step_materialization and event.asset_key == AssetKey(key)
    ]
    return {name: value.value for name, value in found.metadata.items()}


def tick(world: World, cursor: str | None = None) -> SensorResult:
    result = curation.annotations(build_sensor_context(instance=world.instance, cursor=cursor))
    assert isinstance(result, SensorResult)
    return result


def test_a_batch_becomes_tasks_stars_and_datasets(reviewed_world: tuple[World, Reviewing]) -> None:
    world, reviewing = reviewed_world
    batch = world.register("a.jsonl", "".join(chat(f"r{n}", f"{n} of {world.root}") for n in range(3)))
    assert world.run(batch.key).success
    imported = materialize(world, "label_studio_tasks", key=batch.key)
    assert imported.success
    found = metadata(imported, "label_studio_tasks")
    assert (found["rows"], found["tasks"], found["imported_now"]) == (3, 3, 3)
    assert found["project"] == f"{reviewing.server.url}/projects/{reviewing.project['id']}/data"
    (check,) = imported.get_asset_check_evaluations()
    assert check.passed
    assert check.partition == batch.key

    first = tick(world)
    assert not first.run_requests
    for task in reviewing.tasks():
        reviewing.annotate(task["id"], final_response=f"mended {task['data']['line']}", rating=5, gold_star=True)
    second = tick(world, first.cursor)
    assert len(second.run_requests or []) == 1
    assert not tick(world, second.cursor).run_requests

    read = world.job("gold_star_job").execute_in_process(instance=world.instance, raise_on_error=False)
    assert read.success
    assert metadata(read, "label_studio_annotations")["annotations"] == 3
    (numbers,) = metadata(read, "label_studio_annotations")["quality_numbers"]
    assert (numbers["edit_rate"], numbers["gold_rate"]) == (1.0, 1.0)
    assert metadata(read, "gold_stars")["gold_stars"] == 3
    assert metadata(read, "gold_star_dataset", "dpo")["examples"] == 3
    latest = world.settings.data_root / "datasets" / "default" / "dpo" / "latest"
    lines = read_jsonl(latest / "train.jsonl") + read_jsonl(latest / "validation.jsonl")
    assert sorted(line["chosen"] for line in lines) == ["mended 1", "mended 2", "mended 3"]
    assert not tick(world).run_requests
    events = list(open_reviews(world.settings.data_root, "default").changes())
    assert [event["type"] for event in events] == ["gold_star.created"] * 3
    token = reviewing.server.account.token
    assert not any(token in str(event) for result in (imported, read) for event in result.all_events)


def test_the_check_tells_rows_that_are_no_tasks(reviewed_world: tuple[World, Reviewing]) -> None:
    world, reviewing = reviewed_world
    batch = world.register("a.jsonl", world.chats(2))
    world.run(batch.key)
    materialize(world, "label_studio_tasks", key=batch.key)
    reviewing.delete("tasks", reviewing.tasks()[0]["id"])
    again = materialize(world, "label_studio_tasks", key=batch.key)
    assert metadata(again, "label_studio_tasks")["deleted_by_people"] == 1
    (check,) = again.get_asset_check_evaluations()
    assert check.passed
    assert "1 deleted by people" in (check.description or "")
    config = {"ops": {"label_studio_tasks": {"config": {"reimport_deleted": True}}}}
    back = materialize(world, "label_studio_tasks", key=batch.key, config=config)
    assert metadata(back, "label_studio_tasks")["imported_now"] == 1


def test_a_server_that_is_away_fails_the_run_with_what_to_do_and_not_the_sensor(
    reviewed_world: tuple[World, Reviewing], monkeypatch: pytest.MonkeyPatch
) -> None:
    world, _ = reviewed_world
    batch = world.register("a.jsonl", world.chats(1))
    world.run(batch.key)
    assert materialize(world, "label_studio_tasks", key=batch.key).success
    monkeypatch.setenv("VLLM_BATCH_LABEL_STUDIO_API_KEY", "wrong")
    from resources.settings import settings

    settings.cache_clear()
    result = materialize(world, "label_studio_tasks", key=batch.key)
    assert not result.success
    (failed,) = [event for event in result.all_events if event.event_type_value == "STEP_FAILURE"]
    assert "the token is not taken" in str(failed.step_failure_data.user_failure_data.description)
    assert "the token is not taken" in str(tick(world).skip_reason)


def test_the_night_reads_everything(reviewed_world: tuple[World, Reviewing]) -> None:
    world, reviewing = reviewed_world
    batch = world.register("a.jsonl", world.chats(2))
    world.run(batch.key)
    materialize(world, "label_studio_tasks", key=batch.key)
    for task in reviewing.tasks():
        reviewing.annotate(task["id"], gold_star=True)
    job = world.job("gold_star_job")
    assert job.execute_in_process(instance=world.instance).success
    reviewing.delete("tasks", reviewing.tasks()[0]["id"])
    config = json.loads(json.dumps(curation.NIGHT_CONFIG))
    read = job.execute_in_process(instance=world.instance, run_config=config)
    assert metadata(read, "gold_stars")["gold_stars"] == 1


def test_gold_stars_go_out_as_events_and_as_rows(reviewed_world: tuple[World, Reviewing], tmp_path: Path) -> None:
    _, reviewing = reviewed_world
    database = tmp_path / "stars.db"
    with Receiver() as receiver:
        hook = {"url": receiver.url, "secret": SECRET, "allow_insecure": True, "events": [*STARS]}
        tables = {
            "warehouse": {"url": f"sqlite:///{database}", "table": "results", "gold_stars_table": "stars"},
            "away": {"url": "postgresql://127.0.0.1:1/nothing", "table": "results", "gold_stars_table": "stars"},
            "no_stars": {"url": f"sqlite:///{database}", "table": "results"},
        }
        targets = {"webhooks": {"mirror": hook}, "exports": tables}
        (tmp_path / "targets.yaml").write_text(yaml.safe_dump(targets))
        definitions = importlib.reload(importlib.import_module("vllm_batch_pipelines.definitions")).defs
        world = replace(reviewed_world[0], definitions=definitions)

        def review() -> list[tuple[int, str]]:
            """Read the reviews, deliver what there is to tell; what the table holds then."""
            read = world.job("gold_star_job").execute_in_process(instance=world.instance, raise_on_error=False)
            (failed,) = [event for event in read.all_events if event.event_type_value == "STEP_FAILURE"]
            said = str(failed.step_failure_data.user_failure_data.description)
            assert said.startswith("1 of 2 tables failed, the others are done")
            assert "away, default: postgresql://127.0.0.1/nothing table stars: OperationalError" in said
            assert metadata(read, "gold_star_dataset", "chat")["examples"] == metadata(read, "gold_stars")["gold_stars"]
            assert world.job("deliver_webhooks").execute_in_process(instance=world.instance).success
            with closing(sqlite3.connect(database)) as connection:
                return connection.execute("SELECT line, final_response FROM stars ORDER BY line").fetchall()

        batch = world.register("a.jsonl", "".join(chat(f"r{n}", f"{n} of {world.root}") for n in range(3)))
        assert world.run(batch.key).success
        assert materialize(world, "label_studio_tasks", key=batch.key).success
        first, second = [
            reviewing.annotate(task["id"], final_response=f"mended {task['data']['line']}", gold_star=True)
            for task in reviewing.tasks()[:2]
        ]
        assert review() == [(1, "mended 1"), (2, "mended 2")]
        reviewing.change(first, final_response="mended 1")
        reviewing.change(second, final_response="better", gold_star=True)
        assert review() == [(2, "better")]
        kinds = {(one.content["type"], one.content["data"]["line"]) for one in receiver.received}
        assert kinds == {
            ("gold_star.created", 1), ("gold_star.created", 2), ("gold_star.removed", 1), ("gold_star.updated", 2),
        }  # fmt: skip
        assert review() == [(2, "better")]
        assert len(receiver.received) == len(kinds)


def test_curation_is_nowhere_in_the_definitions_until_it_is_set(world: World) -> None:
    names = {key.to_user_string() for key in world.definitions.resolve_all_asset_keys()}
    assert {name for name in names if not name.startswith("models/")} == {
        "batch_requests", "batch_results", "batch_output",
    }  # fmt: skip
