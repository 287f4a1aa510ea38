"""How dropped files and start requests become runs, and what the sweep starts, leaves alone and cleans up."""

import json
import os
import shutil
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from dagster import (
    AssetMaterialization,
    DagsterEvent,
    DagsterRun,
    DagsterRunStatus,
    ExecuteInProcessResult,
    RunRequest,
    RunsFilter,
    ScheduleDefinition,
    SensorResult,
    build_schedule_context,
    build_sensor_context,
)
from dagster._core.definitions.schedule_definition import ScheduleExecutionData
from dagster._core.events import EVENT_TYPE_TO_PIPELINE_RUN_STATUS
from dagster._core.test_utils import create_run_for_test

from resources.batch_store import queue
from resources.batch_store.batch import Batch
from resources.errors import BatchFailed
from tests.helpers import PARTITIONS, World, chats, drop, held_by_another_process, ids
from vllm_batch_pipelines import starting
from vllm_batch_pipelines.schedules import inbox_at_night, sweep_schedule
from vllm_batch_pipelines.sensors import inbox as inbox_sensor
from vllm_batch_pipelines.stack import INTERRUPTED_TAG
from vllm_batch_pipelines.starting import (
    MAX_TRIES,
    PARTITION_TAG,
    RUN_KEY_TAG,
    ToStart,
    run_request,
    start_queued,
    sweep,
    take_from_inbox,
)


def take(world: World) -> ToStart:
    return take_from_inbox(world.instance, world.store, world.inbox, world.catalog)


def tick(world: World, origin: str = "inbox") -> ToStart:
    return start_queued(world.instance, world.store, origin, ToStart())


def look(world: World) -> ToStart:
    """A sweep whose two looks for dead runs come right after each other."""
    return sweep(world.instance, world.store, world.catalog, pause=lambda _: None)


def evaluate(world: World, schedule: ScheduleDefinition) -> ScheduleExecutionData:
    """A tick as the daemon has the code server evaluate it."""
    repository = world.definitions.get_repository_def()
    return schedule.evaluate_tick(build_schedule_context(instance=world.instance, repository_def=repository))


def keys(found: ToStart) -> list[str]:
    return sorted(str(request.partition_key) for request in found.runs)


def queued(world: World) -> list[str]:
    return sorted(request.key for request in queue.pending(world.store))


def record_run(
    world: World, batch: Batch, status: DagsterRunStatus, job: str = "process_batch", **tags: str
) -> DagsterRun:
    """A run of a batch as the instance would hold it."""
    run = create_run_for_test(world.instance, job_name=job, tags={PARTITION_TAG: batch.key, **tags})
    if status is not DagsterRunStatus.NOT_STARTED:
        event = next(kind for kind, found in EVENT_TYPE_TO_PIPELINE_RUN_STATUS.items() if found is status)
        world.instance.report_dagster_event(DagsterEvent(event_type_value=event.value, job_name=job), run.run_id)
        assert status_of(world, run) is status
    return run


def launch(world: World, found: ToStart) -> list[DagsterRun]:
    """What the daemon does with run requests: the partitions first, then a run each, unless its run key has one."""
    world.instance.add_dynamic_partitions(PARTITIONS, found.new_keys)
    launched = []
    for request in found.runs:
        assert request.run_key is not None
        if world.instance.get_runs_count(RunsFilter(tags={RUN_KEY_TAG: request.run_key})):
            continue
        tags = {**request.tags, PARTITION_TAG: str(request.partition_key), RUN_KEY_TAG: request.run_key}
        launched.append(create_run_for_test(world.instance, job_name=request.job_name or "", tags=tags))
    return launched


def status_of(world: World, run: DagsterRun) -> DagsterRunStatus:
    found = world.instance.get_run_by_id(run.run_id)
    assert found is not None
    return found.status


# --- The inbox ------------------------------------------------------------------------------------------------------


def test_a_dropped_file_becomes_a_batch_with_a_start_request(world: World) -> None:
    path = world.drop("Tickets März.jsonl", world.chats(2))
    assert take(world).notes == []
    (key,) = queued(world)
    assert key.startswith("tickets-marz-")
    assert world.store.get(key).input_path.read_bytes() == path.read_bytes()
    assert path.exists()


@pytest.mark.e2e
def test_a_file_that_still_grows_is_not_taken(world: World) -> None:
    path = world.drop("growing.jsonl", world.chats(1))
    with path.open("a") as writer:
        os.utime(path, (1, 1))  # however old it looks, somebody writes it
        assert take(world).notes == []
        assert world.store.keys() == []
        writer.write(world.chats(2, "more"))
    os.utime(path, (1, 1))
    take(world)
    (key,) = world.store.keys()
    assert world.store.get(key).spec.lines == 3


@pytest.mark.e2e
def test_a_file_written_just_now_is_taken_once_it_has_rested(world: World) -> None:
    (world.settings.inbox_dir / "fresh.jsonl").write_text(world.chats(1))
    began = time.monotonic()
    take(world)
    assert len(world.store.keys()) == 1
    assert time.monotonic() - began < 4


def test_what_is_no_regular_file_of_its_own_is_never_opened(world: World, tmp_path: Path) -> None:
    secret = tmp_path / "secret.jsonl"
    secret.write_text(world.chats(1, "secret"))
    folder = world.settings.inbox_dir
    (folder / "link.jsonl").symlink_to(secret)
    (folder / "dangling.jsonl").symlink_to(tmp_path / "nothing")
    os.mkfifo(folder / "pipe.jsonl")
    (folder / "folder.jsonl").mkdir()
    world.drop(".hidden.jsonl", world.chats(1))
    world.drop("notes.txt", "no batch")
    world.drop("good.jsonl", world.chats(1, "good"))
    found: list[ToStart] = []
    ticking = threading.Thread(target=lambda: found.append(take(world)), daemon=True)
    ticking.start()
    ticking.join(10)  # a FIFO without a writer would hold an open() for ever
    assert found
    assert found[0].notes == []
    assert [key[:4] for key in world.store.keys()] == ["good"]  # noqa: SIM118 (a store, not a dict)


@pytest.mark.e2e
def test_three_hundred_files_are_all_taken_once_in_quick_ticks(world: World) -> None:
    for number in range(300):
        world.drop(f"file-{number:03}.jsonl", world.chats(2, f"text {number}"))
    seconds, started = [], []
    for _ in range(20):
        began = time.monotonic()
        take(world)
        launched = launch(world, tick(world))
        seconds.append(time.monotonic() - began)
        started += [run.tags[PARTITION_TAG] for run in launched]
        if not launched and not queued(world):
            break
    assert len(started) == len(set(started)) == 300
    assert sorted(started) == world.store.keys()
    assert queued(world) == []
    assert max(seconds) < starting.TICK_SECONDS
    assert set(started) <= set(world.instance.get_dynamic_partitions(PARTITIONS))


def test_a_refused_file_is_told_of_once_and_again_when_it_changes(world: World) -> None:
    world.drop("a.yaml", "no_such_option: 1")
    world.drop("a.jsonl", world.chats(1))
    (note,) = take(world).notes
    assert "no_such_option" in note
    assert take(world).notes == []
    assert queued(world) == []
    world.drop("a.yaml", "priority: 1")
    world.drop("a.jsonl", world.chats(2, "changed"))
    take(world)
    assert len(queued(world)) == 1


def test_one_refused_file_does_not_stop_the_others(world: World) -> None:
    world.drop("a.yaml", "[")
    world.drop("a.jsonl", world.chats(1))
    world.drop("b.jsonl", world.chats(1))
    assert len(take(world).notes) == 1
    assert [key[0] for key in queued(world)] == ["b"]


def test_the_same_file_dropped_twice_does_no_work(world: World) -> None:
    world.drop("a.jsonl", world.chats(1))
    take(world)
    (run,) = launch(world, tick(world))
    assert tick(world).runs == []
    world.finish(world.store.get(run.tags[PARTITION_TAG]))
    world.instance.report_run_canceled(run)  # over and done with: only the batch's own state can tell
    world.drop("a.jsonl", world.chats(1))
    take(world)
    assert len(world.store.keys()) == 1
    assert queued(world) == []


def test_a_batch_that_is_not_complete_runs_when_its_file_is_dropped_again(world: World) -> None:
    world.drop("a.jsonl", world.chats(1))
    take(world)
    (run,) = launch(world, tick(world))
    tick(world)
    drop(world.settings.inbox_dir, "a.jsonl", world.chats(1), age_seconds=40)
    take(world)
    assert queued(world) == []  # its run is going on
    world.instance.report_run_canceled(run)
    drop(world.settings.inbox_dir, "a.jsonl", world.chats(1), age_seconds=30)
    take(world)
    assert queued(world) == [run.tags[PARTITION_TAG]]


def test_a_large_file_is_registered_by_a_run_of_its_own(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(starting, "LARGE_BYTES", 1000)
    path = world.drop("large.jsonl", world.chats(50))
    (request,) = take(world).runs
    assert request.job_name == "register_files"
    assert world.store.keys() == []
    assert [again.run_key for again in take(world).runs] == [request.run_key]  # Dagster starts a key once
    job = world.job("register_files")
    assert (
        job.execute_in_process(
            run_config={"ops": {"register": {"config": {"paths": ["not-there.jsonl"]}}}},
            instance=world.instance,
            tags=request.tags,
            raise_on_error=False,
        ).success
        is False
    )
    (second,) = take(world).runs
    assert second.run_key != request.run_key
    assert job.execute_in_process(instance=world.instance, run_config=second.run_config, tags=second.tags).success
    assert take(world).runs == []
    (key,) = world.store.keys()
    assert key.startswith(path.stem)
    assert keys(tick(world, "submit")) == [key]


def test_a_large_file_is_registered_at_once_at_night(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(starting, "LARGE_BYTES", 1000)
    world.drop("large.jsonl", world.chats(50))
    take_from_inbox(world.instance, world.store, world.inbox, world.catalog, large_in_a_run=False)
    assert len(queued(world)) == 1


def test_the_sensor_asks_for_the_partition_and_its_run_in_one_tick(world: World) -> None:
    world.drop("a.jsonl", world.chats(1))
    result = inbox_sensor(build_sensor_context(instance=world.instance, definitions=world.definitions))
    assert isinstance(result, SensorResult)
    (key,) = world.store.keys()
    (request,) = result.run_requests or []
    assert (request.partition_key, request.job_name) == (key, "process_batch")
    (added,) = result.dynamic_partitions_requests or []
    assert list(added.partition_keys) == [key]


def test_a_dry_run_and_real_answers_of_one_file_are_two_batches(world: World) -> None:
    path = world.drop("a.jsonl", world.chats(1))
    dry = world.store.register(path, engine="null").batch
    take(world)
    assert len(world.store.keys()) == 2
    assert dry.key not in queued(world)


# --- Start requests -------------------------------------------------------------------------------------------------


def test_a_start_request_becomes_one_run_however_often_the_tick_is_repeated(world: World) -> None:
    batch = world.register("a.jsonl", world.chats(1))
    queue.enqueue(world.store, batch.key)
    first, second = tick(world, "submit"), tick(world, "submit")  # the daemon died between asking and launching
    assert [request.run_key for request in first.runs] == [request.run_key for request in second.runs]
    assert len(launch(world, first)) == 1
    assert launch(world, second) == []
    assert tick(world, "submit").runs == []
    assert queued(world) == []


def test_a_request_for_a_batch_that_is_worked_on_waits_for_the_end_of_that(world: World) -> None:
    in_a_run, alone = world.register("a.jsonl", world.chats(1)), world.register("b.jsonl", world.chats(2))
    run = record_run(world, in_a_run, DagsterRunStatus.STARTED)
    for batch in (in_a_run, alone):
        queue.enqueue(world.store, batch.key, "retry_failed")
    with held_by_another_process(alone):
        found = tick(world, "submit")
        assert found.runs == []
        assert len(found.notes) == 2
    world.instance.report_run_canceled(run)
    assert keys(tick(world, "submit")) == sorted([in_a_run.key, alone.key])


def test_each_sensor_takes_its_own_requests(world: World) -> None:
    dropped, asked = world.register("a.jsonl", world.chats(1)), world.register("b.jsonl", world.chats(2))
    queue.enqueue(world.store, dropped.key, origin="inbox")
    queue.enqueue(world.store, asked.key)
    assert keys(tick(world, "inbox")) == [dropped.key]
    assert keys(tick(world, "submit")) == [asked.key]


def test_a_request_for_a_batch_that_was_removed_is_dropped(world: World) -> None:
    batch = world.register("a.jsonl", world.chats(1))
    queue.enqueue(world.store, batch.key)
    world.store.remove(batch.key)
    assert tick(world, "submit").runs == []
    assert queued(world) == []


def test_a_retry_checks_again_and_asks_for_failed_rows(world: World) -> None:
    batch = world.register("a.jsonl", world.chats(1), priority=1)
    queue.enqueue(world.store, batch.key, "retry_failed")
    (request,) = tick(world, "submit").runs
    assert request.job_name == "retry_failed_rows"
    assert request.run_config["ops"]["batch_requests"]["config"] == {"recheck": True}
    assert request.run_config["ops"]["batch_results"]["config"] == {"mode": "RETRY_FAILED"}
    assert request.tags["dagster/priority"] == "1"
    assert request.tags["vllm_batch/mode"] == "retry_failed"


def test_a_retry_asks_again_what_was_chosen(world: World) -> None:
    batch = world.register("a.jsonl", world.chats(1, response_format={"type": "json_object"}))
    world.finish(batch)
    queue.enqueue(world.store, batch.key, "retry_failed", failed=["schema", "truncated"])
    (request,) = tick(world, "submit").runs
    config = request.run_config["ops"]["batch_results"]["config"]
    assert config == {"mode": "RETRY_FAILED", "failed": ["schema", "truncated"]}
    result = world.run(batch.key, request.job_name or "", dict(request.run_config))
    assert result.success
    asked = result.asset_materializations_for_node("batch_results")[0].metadata["asked_now"].value
    assert asked == 1


@pytest.mark.parametrize("mode", ["retry_failed", "restart"])
def test_the_config_of_every_mode_fits_its_job(world: World, mode: str) -> None:
    batch = world.register("a.jsonl", world.chats(1))
    world.finish(batch)
    request = run_request(batch, mode, "key")
    result = world.run(batch.key, request.job_name or "", dict(request.run_config))
    assert result.success
    asked = result.asset_materializations_for_node("batch_results")[0].metadata["asked_now"].value
    assert asked == (1 if mode == "restart" else 0)


# --- The sweep ------------------------------------------------------------------------------------------------------


def test_the_sweep_starts_a_registered_batch_that_never_ran(world: World) -> None:
    batch = world.register("a.jsonl", world.chats(1))
    assert keys(look(world)) == [batch.key]


def test_the_schedule_starts_several_batches_in_one_tick(world: World) -> None:
    batches = [world.register(f"{name}.jsonl", world.chats(1, name)) for name in "abc"]
    tick_data = evaluate(world, sweep_schedule)
    requests = tick_data.run_requests or []
    assert sorted(str(request.partition_key) for request in requests) == sorted(batch.key for batch in batches)
    for batch in batches:
        world.finish(batch)
        world.instance.report_runless_asset_event(AssetMaterialization("batch_output", partition=batch.key))
    tick_data = evaluate(world, sweep_schedule)
    assert (tick_data.run_requests, tick_data.skip_message) == ([], "nothing to start")


def test_the_schedule_of_the_night_takes_what_the_inbox_holds(world: World) -> None:
    for name in "ab":
        world.drop(f"{name}.jsonl", world.chats(1, name))
    tick_data = evaluate(world, inbox_at_night)
    requested = sorted(str(request.partition_key) for request in tick_data.run_requests or [])
    assert requested == world.store.keys()
    assert len(requested) == 2
    assert set(requested) <= set(world.instance.get_dynamic_partitions(PARTITIONS))


def test_the_sweep_waits_for_start_requests_and_runs_in_progress(world: World) -> None:
    waiting, created, starts = (world.register(f"{name}.jsonl", world.chats(1, name)) for name in "abc")
    queue.enqueue(world.store, waiting.key)
    runs = [
        record_run(world, created, DagsterRunStatus.NOT_STARTED),
        record_run(world, starts, DagsterRunStatus.STARTING),
    ]
    found = look(world)
    assert found.runs == []
    assert len(found.notes) == 3
    for run in runs:
        world.instance.report_run_canceled(run)


def test_the_sweep_takes_a_failed_batch_up_again_but_not_for_ever(world: World) -> None:
    batch = world.register("a.jsonl", world.chats(1))
    for _ in range(MAX_TRIES):
        assert keys(look(world)) == [batch.key]
        record_run(world, batch, DagsterRunStatus.FAILURE)
    found = look(world)
    assert found.runs == []
    assert f"failed {MAX_TRIES} times" in found.notes[0]


def test_a_lock_conflict_is_not_counted_as_a_try(world: World) -> None:
    batch = world.register("a.jsonl", world.chats(1))
    for _ in range(MAX_TRIES + 1):
        record_run(world, batch, DagsterRunStatus.FAILURE, **{"vllm_batch/locked": "true"})
    assert keys(look(world)) == [batch.key]


def test_a_cancelled_batch_is_left_alone_until_somebody_asks(world: World) -> None:
    batch = world.register("a.jsonl", world.chats(1))
    record_run(world, batch, DagsterRunStatus.FAILURE)
    record_run(world, batch, DagsterRunStatus.CANCELED)
    found = look(world)
    assert found.runs == []
    assert "cancelled" in found.notes[0]
    queue.enqueue(world.store, batch.key)
    assert keys(tick(world, "submit")) == [batch.key]


def test_a_batch_that_the_stack_interrupted_goes_on(world: World) -> None:
    batch = world.register("a.jsonl", world.chats(1))
    record_run(world, batch, DagsterRunStatus.CANCELED, **{INTERRUPTED_TAG: "stack stopped"})
    assert keys(look(world)) == [batch.key]


def test_a_run_without_a_process_is_reported_failed_and_its_batch_taken_up(world: World) -> None:
    dead, alive = (
        world.register("dead.jsonl", world.chats(1, "dead")),
        world.register("alive.jsonl", world.chats(1, "alive")),
    )
    dead_run, live_run = (
        record_run(world, dead, DagsterRunStatus.STARTED),
        record_run(world, alive, DagsterRunStatus.STARTED),
    )
    with held_by_another_process(alive, f"Dagster run {live_run.run_id[:8]}") as process:
        found = look(world)
        assert keys(found) == [dead.key]
        assert status_of(world, dead_run) is DagsterRunStatus.FAILURE
        assert status_of(world, live_run) is DagsterRunStatus.STARTED
        assert "no process" in found.notes[0]
        process.kill()
        process.wait()
        assert alive.key in keys(look(world))
    assert status_of(world, live_run) is DagsterRunStatus.FAILURE


def test_a_run_that_died_while_it_was_cancelled_counts_as_cancelled(world: World) -> None:
    batch = world.register("a.jsonl", world.chats(1))
    run = record_run(world, batch, DagsterRunStatus.STARTED)
    world.instance.report_run_canceling(run)
    assert look(world).runs == []
    assert status_of(world, run) is DagsterRunStatus.CANCELED


def test_a_run_that_begins_or_ends_between_the_two_looks_is_left_alone(world: World) -> None:
    begins, ends = (world.register(f"{name}.jsonl", world.chats(1, name)) for name in ("begins", "ends"))
    beginning, ending = (record_run(world, batch, DagsterRunStatus.STARTED) for batch in (begins, ends))
    with ExitStack() as locks:

        def between(_: float) -> None:
            locks.enter_context(begins.lock(f"Dagster run {beginning.run_id[:8]}"))
            world.instance.report_run_canceled(ending)

        sweep(world.instance, world.store, world.catalog, pause=between)
        assert begins.locked_by() is not None
    assert status_of(world, beginning) is DagsterRunStatus.STARTED
    assert status_of(world, ending) is DagsterRunStatus.CANCELED
    world.instance.report_run_canceled(beginning)


def test_runs_of_other_assets_on_the_partition_need_no_lock(world: World) -> None:
    """A delivery of a batch does not work on the batch: its run is not dead because the batch is free."""
    batch = world.register("a.jsonl", world.chats(1))
    run = record_run(world, batch, DagsterRunStatus.STARTED)
    other = record_run(world, batch, DagsterRunStatus.STARTED, job="deliveries")
    assert keys(look(world)) == [batch.key]
    assert status_of(world, run) is DagsterRunStatus.FAILURE
    assert status_of(world, other) is DagsterRunStatus.STARTED
    world.instance.report_run_canceled(other)
    assert keys(look(world)) == [batch.key]  # nor does it say that the batch was cancelled


@pytest.mark.parametrize(
    ("content", "options", "code"),
    [
        ("", {}, "empty_file"),
        ("{}\n", {}, "no_valid_request"),
        (chats(1) + "{", {"on_invalid": "reject"}, "invalid_requests"),
    ],
)
def test_what_cannot_complete_is_not_tried_again(
    world: World, content: str, options: dict[str, Any], code: str
) -> None:
    batch = world.register("a.jsonl", content, **options)
    with pytest.raises(BatchFailed):
        world.finish(batch)
    found = look(world)
    assert found.runs == []
    assert found.notes == [f"{batch.key}: cannot complete: {code}"]


def test_a_batch_that_the_lean_core_finished_is_adopted_without_asking_again(world: World) -> None:
    path = world.root / "a.jsonl"
    path.write_text(world.chats(3))
    batch = world.store.register(path).batch
    world.finish(batch)
    published = (batch.output_dir / "output.jsonl").stat().st_ino
    found = look(world)
    assert (keys(found), found.new_keys) == ([batch.key], [batch.key])
    world.instance.add_dynamic_partitions(PARTITIONS, found.new_keys)
    result = world.run(batch.key)
    assert result.success
    assert result.asset_materializations_for_node("batch_results")[0].metadata["asked_now"].value == 0
    assert (batch.output_dir / "output.jsonl").stat().st_ino == published
    assert look(world).runs == []


def test_a_batch_that_the_lean_core_began_is_left_to_whoever_began_it(world: World) -> None:
    path = world.root / "a.jsonl"
    path.write_text(world.chats(3))
    begun = world.store.register(path).batch
    assert look(world).runs == []
    world.finish(begun)
    with held_by_another_process(begun, "vllm-batch run"):
        found = look(world)
        assert (found.runs, found.new_keys) == ([], [])
        assert found.notes == [f"{begun.key}: worked on by vllm-batch run"]


def test_a_batch_whose_outputs_were_lost_is_published_again(world: World) -> None:
    batch = world.register("a.jsonl", world.chats(3))
    world.finish(batch)
    world.instance.report_runless_asset_event(AssetMaterialization("batch_output", partition=batch.key))
    assert look(world).runs == []
    shutil.rmtree(batch.outputs_dir)
    assert keys(look(world)) == [batch.key]
    assert world.run(batch.key).success
    assert ids(batch.output_dir / "output.jsonl") == ["r1", "r2", "r3"]


def test_one_damaged_batch_does_not_stop_the_sweep(world: World) -> None:
    damaged, good = (
        world.register("a.jsonl", world.chats(1, "damaged")),
        world.register("b.jsonl", world.chats(1, "good")),
    )
    (damaged.root / "batch.json").write_text("{ torn")
    assert good.key in keys(look(world))


@pytest.mark.e2e
def test_hundreds_of_done_batches_take_the_sweep_no_time(world: World) -> None:
    done = []
    for number in range(300):
        path = world.root / "one.jsonl"
        path.write_text(world.chats(1, f"text {number}"))
        batch = world.store.register(path).batch
        world.finish(batch)
        done.append(batch.key)
    world.instance.add_dynamic_partitions(PARTITIONS, done)
    for key in done:
        world.instance.report_runless_asset_event(AssetMaterialization("batch_output", partition=key))
    began = time.monotonic()
    found = look(world)
    assert (found.runs, found.notes) == ([], [])
    assert time.monotonic() - began < 3


# --- register_files -------------------------------------------------------------------------------------------------


def register(world: World, config: Any) -> ExecuteInProcessResult:
    return world.job("register_files").execute_in_process(
        instance=world.instance, run_config=config, raise_on_error=False
    )


def register_these(world: World, **config: Any) -> ExecuteInProcessResult:
    return register(world, {"ops": {"register": {"config": config}}})


def refusal(result: ExecuteInProcessResult) -> str:
    assert not result.success
    (failed,) = [event for event in result.all_events if event.event_type_value == "STEP_FAILURE"]
    data = failed.step_failure_data.user_failure_data
    assert data is not None, "not an error for people"
    return str(data.description)


def test_register_files_takes_paths_in_the_inbox_and_in_the_input_roots(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from resources.settings import settings

    roots = [tmp_path / "one", tmp_path / "two"]
    monkeypatch.setenv("VLLM_BATCH_INPUT_ROOTS", ":".join(map(str, roots)))
    settings.cache_clear()
    given = ["a.jsonl"]
    world.drop("a.jsonl", world.chats(1, "a"))
    for root, name in zip(roots, "bc", strict=True):
        (root / "deep").mkdir(parents=True)
        (root / "deep" / f"{name}.jsonl").write_text(world.chats(1, name))
        given.append(str(root / "deep" / f"{name}.jsonl"))
    assert register_these(world, paths=given).success
    assert [key[0] for key in queued(world)] == ["a", "b", "c"]
    assert len(tick(world, "submit").runs) == 3


def test_register_files_takes_a_pattern(world: World) -> None:
    for name in ("tickets-1.jsonl", "tickets-2.jsonl", "other.jsonl"):
        world.drop(name, world.chats(1, name))
    assert register_these(world, glob="tickets-*.jsonl").success
    assert [key[:9] for key in queued(world)] == ["tickets-1", "tickets-2"]


def test_register_files_says_when_nothing_is_named(world: World) -> None:
    assert "No file named" in refusal(register_these(world))
    assert "No file named" in refusal(register_these(world, glob="nothing-*.jsonl"))


def test_register_files_reads_nothing_outside_of_its_roots(world: World, tmp_path: Path) -> None:
    outside = tmp_path / "secret.jsonl"
    outside.write_text(world.chats(1, "secret"))
    folder = world.settings.inbox_dir
    (folder / "link.jsonl").symlink_to(outside)
    (folder / "way-out").symlink_to(tmp_path)
    world.drop("good.jsonl", world.chats(1, "good"))
    tries = [str(outside), "../../secret.jsonl", "link.jsonl", "way-out/secret.jsonl", "no-such.jsonl", "a\0.jsonl"]
    message = refusal(register_these(world, paths=[*tries, "good.jsonl"]))
    assert f"{len(tries)} of {len(tries) + 1} files refused" in message
    assert [key[:4] for key in world.store.keys()] == ["good"]  # noqa: SIM118
    assert [key[:4] for key in queued(world)] == ["good"]


@pytest.mark.parametrize("pattern", ["../*.jsonl", "/**/*.jsonl", "way-out/*.jsonl", "**", "[", "\0"])
def test_a_pattern_does_not_lead_out_of_the_inbox(world: World, tmp_path: Path, pattern: str) -> None:
    (world.settings.data_root / "secret.jsonl").write_text(world.chats(1, "secret"))
    (tmp_path / "secret.jsonl").write_text(world.chats(1, "secret"))
    (world.settings.inbox_dir / "way-out").symlink_to(tmp_path)
    assert refusal(register_these(world, glob=pattern))
    assert world.store.keys() == []


def test_run_requests_carry_what_dagster_needs(world: World) -> None:
    batch = world.register("a.jsonl", world.chats(1))
    request = run_request(batch, "resume", "key")
    assert isinstance(request, RunRequest)
    assert (request.job_name, request.partition_key, request.run_config) == ("process_batch", batch.key, {})
    assert json.dumps(dict(request.tags)) == '{"vllm_batch/mode": "resume"}'
