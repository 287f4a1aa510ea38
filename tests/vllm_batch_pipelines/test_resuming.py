"""What comes after a batch and was cut off is run again, by itself; what failed by itself is left to people."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from dagster import AssetKey, DagsterInstance, DagsterRun, DagsterRunStatus, RunRequest, build_sensor_context
from dagster._core.definitions.partitions.context import partition_loading_context
from dagster._core.test_utils import create_run_for_test

from tests.helpers import PARTITIONS, World, new_world
from tests.receiver import SECRET, Receiver
from tests.vllm_batch_pipelines.test_announcing import end
from vllm_batch_pipelines.resuming import LOST_TIMES_TAG, MOST_TIMES, close_dead_runs, resume_cut_off
from vllm_batch_pipelines.stack import INTERRUPTED_TAG
from vllm_batch_pipelines.starting import PARTITION_TAG

pytestmark = pytest.mark.e2e

DELIVERIES, OUTPUT = AssetKey("webhook_deliveries"), AssetKey("batch_output")
FAILURE, CANCELED, STARTED = DagsterRunStatus.FAILURE, DagsterRunStatus.CANCELED, DagsterRunStatus.STARTED
STOPPED = {INTERRUPTED_TAG: "stack stopped"}


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with Receiver() as made:
        yield made


@pytest.fixture
def told(tmp_path: Path, instance: DagsterInstance, receiver: Receiver) -> Iterator[World]:
    target = {"url": receiver.url, "secret": SECRET, "allow_insecure": True, "max_attempts": 1, "all_batches": True}
    (tmp_path / "targets.yaml").write_text(yaml.safe_dump({"webhooks": {"ops": target}}))
    with new_world(tmp_path, instance) as world:
        yield world


def record(world: World, key: str, status: DagsterRunStatus, asset: AssetKey = DELIVERIES, **tags: str) -> DagsterRun:
    run = create_run_for_test(
        world.instance, job_name="__ASSET_JOB", tags={PARTITION_TAG: key, **tags}, asset_selection=frozenset({asset})
    )
    end(world, run, status)
    return run


def wanted(world: World, key: str) -> list[RunRequest]:
    found = resume_cut_off(world.instance, {DELIVERIES, OUTPUT}, None)
    return [one for one in found.runs if one.partition_key == key]


def registered(world: World, name: str = "a") -> str:
    key: str = world.register(f"{name}.jsonl", world.chats(1, name)).key
    world.instance.add_dynamic_partitions(PARTITIONS, [key])
    return key


def test_what_a_stop_or_a_dead_process_cut_off_is_asked_for_once(told: World) -> None:
    stopped, died = registered(told, "a"), registered(told, "b")
    runs = {stopped: record(told, stopped, CANCELED, **STOPPED), died: record(told, died, FAILURE)}
    for key, run in runs.items():
        (request,) = wanted(told, key)
        assert (request.run_key, request.asset_selection) == (f"again:{run.run_id}", [DELIVERIES])
        assert [one.run_key for one in wanted(told, key)] == [request.run_key]  # by which a repeat is known
        record(told, key, STARTED)
        assert wanted(told, key) == []


def test_what_a_person_cancelled_and_batches_themselves_are_left_alone(told: World) -> None:
    key = registered(told)
    record(told, key, CANCELED)
    record(told, key, CANCELED, OUTPUT, **STOPPED)
    assert wanted(told, key) == []


def test_what_is_not_there_any_more_is_not_asked_for(told: World) -> None:
    gone, off = registered(told, "a"), registered(told, "b")
    record(told, gone, CANCELED, **STOPPED)
    record(told, off, CANCELED, AssetKey("handler_that_was_taken_out"), **STOPPED)
    told.instance.delete_dynamic_partition(PARTITIONS, gone)
    assert wanted(told, gone) == wanted(told, off) == []


def test_what_failed_by_itself_is_left_to_people(told: World, receiver: Receiver) -> None:
    receiver.script = [404]
    batch = told.register("a.jsonl", told.chats(1))
    told.finish(batch)
    told.instance.add_dynamic_partitions(PARTITIONS, [batch.key])
    job = told.definitions.resolve_implicit_global_asset_job_def()
    assert not job.execute_in_process(
        instance=told.instance, partition_key=batch.key, asset_selection=[DELIVERIES], raise_on_error=False
    ).success
    assert wanted(told, batch.key) == []


def test_what_loses_its_process_again_and_again_is_left_alone(told: World) -> None:
    key = registered(told)
    tags: dict[str, str] = {}
    for times in range(1, MOST_TIMES + 1):
        record(told, key, FAILURE, **tags)
        asked = wanted(told, key)
        if times < MOST_TIMES:
            tags = {LOST_TIMES_TAG: asked[0].tags[LOST_TIMES_TAG]}
    assert asked == []


def test_runs_that_a_power_cut_left_going_on_are_closed_and_asked_for(told: World) -> None:
    key = registered(told)
    left, batch_run = record(told, key, STARTED), record(told, key, STARTED, OUTPUT)
    close_dead_runs(told.instance)
    statuses = [told.instance.get_run_by_id(run.run_id) for run in (left, batch_run)]
    assert [run and run.status for run in statuses] == [CANCELED, STARTED]  # the sweep knows of the batch's
    assert len(wanted(told, key)) == 1
    end(told, batch_run, FAILURE)


def test_the_sensor_asks_for_a_run_that_dagster_takes(told: World) -> None:
    batch = told.register("a.jsonl", told.chats(1))
    told.finish(batch)
    told.instance.add_dynamic_partitions(PARTITIONS, [batch.key])
    run = record(told, batch.key, CANCELED, **STOPPED)
    repository = told.definitions.get_repository_def()
    context = build_sensor_context(instance=told.instance, repository_def=repository, sensor_name="cut_off")
    with partition_loading_context(dynamic_partitions_store=told.instance):  # as the code server has it
        tick = repository.get_sensor_def("cut_off").evaluate_tick(context)
    asked = [request for request in tick.run_requests or [] if request.run_key == f"again:{run.run_id}"]
    assert [(request.partition_key, request.asset_selection) for request in asked] == [(batch.key, [DELIVERIES])]
