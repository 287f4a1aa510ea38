"""webhook_deliveries through the real definitions and a real instance, at a real receiver."""

import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from dagster import (
    AssetKey,
    AutomationConditionSensorDefinition,
    DagsterInstance,
    DefaultSensorStatus,
    ExecuteInProcessResult,
    RunsFilter,
    evaluate_automation_conditions,
)

from resources.batch_store.batch import Batch
from resources.progress import Progress
from resources.webhooks.resource import WebhooksResource
from tests.helpers import World, new_world
from tests.receiver import SECRET, Receiver, Say

pytestmark = pytest.mark.e2e

DELIVERIES = AssetKey("webhook_deliveries")
PATH = "/services/T0/very-secret"


@contextmanager
def told(root: Path, instance: DagsterInstance, url: str, **fields: Any) -> Iterator[World]:
    """A world whose batches are told to a receiver that may be asked once."""
    target = {"url": url + PATH, "secret": SECRET, "allow_insecure": True, "max_attempts": 1, "all_batches": True}
    root.mkdir(exist_ok=True)
    (root / "targets.yaml").write_text(yaml.safe_dump({"webhooks": {"ops": target | fields}}))
    with new_world(root, instance) as world:
        yield world


def deliver(world: World, batch: Batch, **tags: str) -> ExecuteInProcessResult:
    """A run of the asset alone, as automation and the UI's button start it."""
    return world.definitions.resolve_implicit_global_asset_job_def().execute_in_process(
        instance=world.instance,
        partition_key=batch.key,
        asset_selection=[DELIVERIES],
        raise_on_error=False,
        tags=tags,
    )


def checked(result: ExecuteInProcessResult) -> list[tuple[bool, str]]:
    return [(found.passed, found.description or "") for found in result.get_asset_check_evaluations()]


def test_nothing_of_webhooks_is_there_until_one_is_defined(world: World) -> None:
    repository = world.definitions.get_repository_def()
    assert not repository.asset_graph.has(DELIVERIES)
    assert {"deliver_webhooks", "redeliver_webhooks"}.isdisjoint(job.name for job in repository.get_all_jobs())
    assert {sensor.name for sensor in repository.sensor_defs} == {"inbox", "submitted", "automation", "cut_off"}


def test_with_a_webhook_the_asset_its_jobs_and_running_sensors_are_there(
    tmp_path: Path, instance: DagsterInstance
) -> None:
    with told(tmp_path, instance, "http://127.0.0.1:9") as world:
        repository = world.definitions.get_repository_def()
        node = repository.asset_graph.get(DELIVERIES)
        assert node.pools == {"webhooks"}
        assert {"deliver_webhooks", "redeliver_webhooks"} <= {job.name for job in repository.get_all_jobs()}
        sensors = {sensor.name: sensor for sensor in repository.sensor_defs}
        assert isinstance(sensors["automation"], AutomationConditionSensorDefinition)
        for name in ("automation", "announcements"):
            assert sensors[name].default_status is DefaultSensorStatus.RUNNING


def test_batches_that_finish_are_each_told_once(tmp_path: Path, instance: DagsterInstance) -> None:
    with Receiver() as receiver, told(tmp_path, instance, receiver.url) as world:
        before = evaluate_automation_conditions(world.definitions, instance)
        batches = [world.register(f"b{number}.jsonl", world.chats(1, f"text {number}")) for number in range(4)]
        unfinished = world.register("unfinished.jsonl", world.chats(1, "never run"))
        for batch in batches:
            assert world.run(batch.key).success
        evaluated = evaluate_automation_conditions(world.definitions, instance, cursor=before.cursor)
        requested = evaluated.get_requested_partitions(DELIVERIES)
        assert {batch.key for batch in batches} <= requested
        assert unfinished.key not in requested
        for batch in batches:
            result = deliver(world, batch)
            assert result.success
            assert checked(result) == [(True, "1 delivered.")]
        for batch in batches:
            assert deliver(world, batch).success
        after = evaluate_automation_conditions(world.definitions, instance, cursor=evaluated.cursor)
        assert after.get_requested_partitions(DELIVERIES).isdisjoint({batch.key for batch in batches})
    assert Counter(found.content["data"]["id"] for found in receiver.received) == {b.key: 1 for b in batches}


def test_a_delivery_that_is_used_up_is_red_harms_nothing_and_can_be_run_again_alone(
    tmp_path: Path, instance: DagsterInstance
) -> None:
    with Receiver(otherwise=Say(503, body=b"closed")) as receiver, told(tmp_path, instance, receiver.url) as world:
        batch = world.register("a.jsonl", world.chats(2))
        assert world.run(batch.key).success
        published = {path: path.read_bytes() for path in batch.output_dir.rglob("*") if path.is_file()}
        lost = deliver(world, batch)
        assert not lost.success
        ((passed, description),) = checked(lost)
        assert not passed
        assert "`ops` did not take batch.completed in 1 attempts: HTTP 503: closed" in description
        assert lost.asset_materializations_for_node("webhook_deliveries") == []
        assert {path: path.read_bytes() for path in published} == published
        assert world.run(batch.key).success

        receiver.otherwise = Say(200)
        again = deliver(world, batch)
        assert again.success
        assert checked(again) == [(True, "1 delivered.")]
        assert deliver(world, batch).success
    assert len(receiver.received) == 2
    assert len(set(receiver.ids)) == 1


def test_no_secret_is_in_anything_that_dagster_keeps(tmp_path: Path, instance: DagsterInstance) -> None:
    with Receiver() as receiver, told(tmp_path, instance, receiver.url) as world:
        receiver.otherwise = Say(400, body=f"{receiver.url}{PATH} {SECRET}".encode())
        batch = world.register("a.jsonl", world.chats(1))
        assert world.run(batch.key).success
        result = deliver(world, batch)
        run = instance.get_run_by_id(result.run_id)
        assert run is not None
        kept = f"{run}{run.run_config}{run.tags}" + "".join(
            f"{entry.message}{entry.user_message}{entry.dagster_event}{entry.error_info}"
            for entry in instance.all_logs(result.run_id)
        )
        schema = json.dumps(str(world.definitions.resources))
        assert "did not take batch.completed" in kept
        for secret in ("very-secret", SECRET.removeprefix("whsec_")):
            assert secret not in kept
            assert secret not in schema


def test_a_batch_without_outputs_is_told_in_words(tmp_path: Path, instance: DagsterInstance) -> None:
    with told(tmp_path, instance, "http://127.0.0.1:9") as world:
        result = deliver(world, world.register("a.jsonl", world.chats(1)))
        (failed,) = [event for event in result.all_events if event.event_type_value == "STEP_FAILURE"]
        data = failed.step_failure_data.user_failure_data
        assert data is not None
        assert "it has no outputs yet; materialize batch_output first" in str(data.description)


def test_batches_that_were_complete_long_before_are_not_told_by_automation(
    tmp_path: Path, instance: DagsterInstance
) -> None:
    """As when webhooks are turned on beside years of batches; a person who materializes one has it told."""
    with Receiver() as receiver, told(tmp_path, instance, receiver.url) as world:
        batch = world.register("old.jsonl", world.chats(1))
        world.finish(batch)
        then = time.time() - 8 * 24 * 3600
        os.utime(batch.output_dir / "summary.json", (then, then))
        old = deliver(world, batch, **{"dagster/from_automation_condition": "true"})
        assert old.success
        assert receiver.received == []
        assert "nobody is told" in checked(old)[0][1]
        assert deliver(world, batch).success
    assert len(receiver.received) == 1


# --- Jobs -----------------------------------------------------------------------------------------------------------


def test_dead_letters_are_sent_again_by_a_job(tmp_path: Path, instance: DagsterInstance) -> None:
    with Receiver([500, 500]) as receiver, told(tmp_path, instance, receiver.url) as world:
        batch = world.register("a.jsonl", world.chats(1))
        world.finish(batch)
        assert not deliver(world, batch).success
        job = world.job("redeliver_webhooks")
        assert not job.execute_in_process(instance=instance, raise_on_error=False).success
        config = {"ops": {"send_again": {"config": {"event_ids": [receiver.ids[0]]}}}}
        assert job.execute_in_process(instance=instance, run_config=config).success
        assert job.execute_in_process(instance=instance).success
    assert len(receiver.received) == 3
    assert len({found.body for found in receiver.received}) == 1


# --- Progress -------------------------------------------------------------------------------------------------------


def announcer(
    world: World, batch: Batch, clock: Callable[[], float], enabled: bool = True
) -> Callable[[Progress], None]:
    resource = WebhooksResource(data_root=str(world.settings.data_root), enabled=enabled)
    return resource.progress_announcer(batch, "run-1", clock)


def waiting(world: World) -> list[float]:
    box = world.settings.data_root / "webhooks" / "outbox" / "ops"
    found = [json.loads(path.read_bytes())["data"]["progress"]["percent"] for path in box.glob("*.json")]
    return sorted(found)


def test_progress_is_left_at_most_as_often_as_the_target_says(tmp_path: Path, instance: DagsterInstance) -> None:
    events = ["batch.progress", "batch.completed"]
    with told(tmp_path, instance, "http://127.0.0.1:9", events=events, progress_seconds=30) as world:
        batch = world.register("a.jsonl", world.chats(1))
        now, seen = 0.0, []
        tell = announcer(world, batch, lambda: now)
        for second in range(0, 100, 5):
            now = float(second)
            tell(Progress("answer", second, 100))
            seen.append(waiting(world))
        assert [found for place, found in enumerate(seen) if place == 0 or found != seen[place - 1]] == [
            [],
            [30.0],
            [60.0],
            [90.0],
        ]


@pytest.mark.parametrize("events", [["batch.completed"], ["batch.progress"]])
def test_progress_is_opt_in_and_off_with_the_rest(tmp_path: Path, instance: DagsterInstance, events: list[str]) -> None:
    with told(tmp_path, instance, "http://127.0.0.1:9", events=events) as world:
        batch = world.register("a.jsonl", world.chats(1))
        now = 0.0
        tell = announcer(world, batch, lambda: now, enabled=events == ["batch.completed"])
        now = 1000.0
        tell(Progress("answer", 1, 2))
        assert waiting(world) == []


def test_targets_that_cannot_be_read_do_not_fail_a_batch(tmp_path: Path, instance: DagsterInstance) -> None:
    with told(tmp_path, instance, "http://127.0.0.1:9") as world:
        (tmp_path / "targets.yaml").write_text('webhooks: {ops: {url: "https://x.example", secret: "${NOT_THERE}"}}')
        batch = world.register("a.jsonl", world.chats(1))
        assert world.run(batch.key).success
        lost = deliver(world, batch)
        assert not lost.success
        runs = instance.get_runs(RunsFilter(run_ids=[lost.run_id]))
        assert runs[0].status.value == "FAILURE"
