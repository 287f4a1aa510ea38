"""Batches that failed or were cancelled for good are announced once each, whatever ticks fail and however many end."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from dagster import (
    DagsterEvent,
    DagsterEventType,
    DagsterInstance,
    DagsterRun,
    DagsterRunStatus,
    SensorResult,
    build_sensor_context,
)
from dagster._core.test_utils import create_run_for_test

from assets.reporting import LOCKED_TAG
from resources.batch_store.batch import Batch
from resources.errors import SettingsError
from resources.targets import all_targets
from resources.webhooks.deliveries import Deliveries
from resources.webhooks.outbox import Waiting
from tests.helpers import World, new_world
from tests.receiver import SECRET, Receiver
from vllm_batch_pipelines.announcing import Announced, announce_endings
from vllm_batch_pipelines.sensors import announcements
from vllm_batch_pipelines.stack import INTERRUPTED_TAG
from vllm_batch_pipelines.starting import LOST_TAG, MAX_LOST, MAX_TRIES, PARTITION_TAG

pytestmark = pytest.mark.e2e

_EVENTS = {
    DagsterRunStatus.FAILURE: DagsterEventType.RUN_FAILURE,
    DagsterRunStatus.CANCELED: DagsterEventType.RUN_CANCELED,
    DagsterRunStatus.STARTED: DagsterEventType.RUN_START,
    DagsterRunStatus.SUCCESS: DagsterEventType.RUN_SUCCESS,
    DagsterRunStatus.QUEUED: DagsterEventType.RUN_ENQUEUED,
}
FAILURE, CANCELED = DagsterRunStatus.FAILURE, DagsterRunStatus.CANCELED
BROKEN = "{not json\n"


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with Receiver() as made:
        yield made


@pytest.fixture
def told(tmp_path: Path, instance: DagsterInstance, receiver: Receiver) -> Iterator[World]:
    define(tmp_path, receiver.url)
    with new_world(tmp_path, instance) as world:
        yield world


def define(root: Path, url: str) -> None:
    target = {"url": url, "secret": SECRET, "allow_insecure": True, "max_attempts": 1, "all_batches": True}
    (root / "targets.yaml").write_text(yaml.safe_dump({"webhooks": {"ops": target}}))


def deliveries(world: World) -> Deliveries:
    return Deliveries(world.settings.data_root, all_targets(world.settings).webhooks)


def look(world: World, cursor: str | None = None) -> Announced:
    return announce_endings(world.instance, world.store, world.catalog, deliveries(world), cursor)


def record(world: World, batch: Batch, status: DagsterRunStatus, job: str = "process_batch", **tags: str) -> DagsterRun:
    run = create_run_for_test(world.instance, job_name=job, tags={PARTITION_TAG: batch.key, **tags})
    end(world, run, status)
    return run


def end(world: World, run: DagsterRun, status: DagsterRunStatus) -> None:
    event = DagsterEvent(event_type_value=_EVENTS[status].value, job_name=run.job_name)
    world.instance.report_dagster_event(event, run.run_id)


def waiting(world: World) -> list[Waiting]:
    return deliveries(world).outbox.waiting("ops")


def announced(world: World) -> list[tuple[str, str]]:
    return sorted((str(one.event.batch), one.event.type) for one in waiting(world))


# --- What is announced ----------------------------------------------------------------------------------------------


def test_a_batch_that_cannot_complete_is_announced_at_once_with_its_reason(told: World) -> None:
    batch = told.register("bad.jsonl", BROKEN)
    assert not told.run(batch.key).success
    look(told)
    (one,) = waiting(told)
    assert one.event.type == "batch.failed"
    assert one.event.data["status"] == "failed"
    assert one.event.data["error"]["code"] == "no_valid_request"


def test_a_run_that_the_sweep_repeats_is_not_announced_and_the_last_one_is(told: World) -> None:
    batch = told.register("a.jsonl", told.chats(1))
    for _ in range(MAX_TRIES - 1):
        record(told, batch, FAILURE)
        look(told)
        assert announced(told) == []
    record(told, batch, FAILURE)
    look(told)
    assert announced(told) == [(batch.key, "batch.failed")]
    record(told, batch, FAILURE)  # somebody tried again, in vain: news
    look(told)
    assert announced(told) == [(batch.key, "batch.failed")] * 2


def test_a_cancelled_batch_is_announced_and_one_that_we_interrupted_is_not(told: World) -> None:
    cancelled = told.register("a.jsonl", told.chats(1))
    interrupted = told.register("b.jsonl", told.chats(2))
    record(told, cancelled, CANCELED)
    record(told, interrupted, CANCELED, **{INTERRUPTED_TAG: "stack stopped"})
    look(told)
    assert announced(told) == [(cancelled.key, "batch.cancelled")]


def test_lost_processes_and_lock_conflicts_are_not_failed_batches(told: World) -> None:
    locked, lost = told.register("a.jsonl", told.chats(1)), told.register("b.jsonl", told.chats(2))
    for _ in range(MAX_TRIES + 1):
        record(told, locked, FAILURE, **{LOCKED_TAG: "true"})
        record(told, lost, FAILURE, **{LOST_TAG: "true"})
    look(told)
    assert announced(told) == []
    for _ in range(MAX_LOST):
        record(told, lost, FAILURE, **{LOST_TAG: "true"})
    look(told)
    assert set(announced(told)) == {(lost.key, "batch.failed")}


def test_a_batch_that_is_complete_has_not_failed_whatever_became_of_a_further_run(told: World) -> None:
    batch = told.register("a.jsonl", told.chats(1))
    told.finish(batch)
    record(told, batch, CANCELED)
    for _ in range(MAX_TRIES):
        record(told, batch, FAILURE)
    look(told)
    assert announced(told) == []


def test_runs_that_only_read_the_outputs_are_not_batches(told: World) -> None:
    batch = told.register("a.jsonl", told.chats(1))
    for _ in range(MAX_TRIES):
        record(told, batch, FAILURE, job="deliver_webhooks")
    look(told)
    assert announced(told) == []


# --- Nothing is lost ------------------------------------------------------------------------------------------------


def test_thirty_that_end_between_two_looks_are_all_announced_once(told: World) -> None:
    batches = [told.register(f"b{number}.jsonl", told.chats(1, f"text {number}")) for number in range(30)]
    first = look(told)
    for batch in batches:
        record(told, batch, CANCELED)
    second = look(told, first.cursor)
    look(told, second.cursor)
    look(told, first.cursor)
    assert announced(told) == sorted((batch.key, "batch.cancelled") for batch in batches)


def test_a_look_that_was_cut_short_is_made_up_for(told: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """More end than a look takes: the next one goes on where it stopped."""
    monkeypatch.setattr("vllm_batch_pipelines.starting._MOST_ENDED", 4)
    cursor = look(told).cursor
    batches = [told.register(f"b{number}.jsonl", told.chats(1, f"text {number}")) for number in range(10)]
    for batch in batches:
        record(told, batch, CANCELED)
    for _ in range(200):  # the instance is shared: others' runs are looked at too
        found = look(told, cursor)
        if found.cursor == cursor:
            break
        cursor = found.cursor
    assert announced(told) == sorted((batch.key, "batch.cancelled") for batch in batches)


def test_what_was_sent_is_not_announced_again(told: World, receiver: Receiver) -> None:
    batch = told.register("a.jsonl", told.chats(1))
    record(told, batch, CANCELED)
    look(told)
    assert told.job("deliver_webhooks").execute_in_process(instance=told.instance).success
    look(told)
    assert announced(told) == []
    assert receiver.types == ["batch.cancelled"]


def test_a_tick_that_fails_loses_nothing(told: World, receiver: Receiver) -> None:
    cursor = look(told).cursor
    batch = told.register("a.jsonl", told.chats(1))
    record(told, batch, CANCELED)
    (told.root / "targets.yaml").write_text("webhooks: {ops: {url: nonsense}}")
    with pytest.raises(SettingsError):
        tick(told, cursor)
    define(told.root, receiver.url)
    assert len(tick(told, cursor).run_requests or []) == 1
    assert announced(told) == [(batch.key, "batch.cancelled")]


def test_while_the_catalog_is_broken_endings_are_told_all_the_same(told: World) -> None:
    """It may well be what they fail of."""
    batch = told.register("a.jsonl", told.chats(1))
    for _ in range(MAX_TRIES):
        record(told, batch, FAILURE)
    told.settings.models_file.write_text("models: nonsense")
    assert len(tick(told).run_requests or []) == 1
    assert announced(told) == [(batch.key, "batch.failed")]


def test_one_batch_that_cannot_be_read_keeps_no_other_back(told: World) -> None:
    damaged, good = told.register("a.jsonl", told.chats(1)), told.register("b.jsonl", told.chats(2))
    record(told, damaged, CANCELED)
    record(told, good, CANCELED)
    (damaged.root / "batch.json").write_text("{")
    found = look(told)
    assert announced(told) == [(good.key, "batch.cancelled")]
    assert any(note.startswith(damaged.key) for note in found.notes)


# --- The sensor and its job -----------------------------------------------------------------------------------------


def tick(world: World, cursor: str | None = None) -> SensorResult:
    context = build_sensor_context(
        instance=world.instance, cursor=cursor, repository_def=world.definitions.get_repository_def()
    )
    result = announcements(context)
    assert isinstance(result, SensorResult)
    return result


def test_the_sensor_talks_to_nobody_and_has_a_run_send_what_waits(told: World, receiver: Receiver) -> None:
    batch = told.register("a.jsonl", told.chats(1))
    record(told, batch, CANCELED)
    result = tick(told)
    assert [request.job_name for request in result.run_requests or []] == ["deliver_webhooks"]
    assert receiver.received == []

    queued = create_run_for_test(told.instance, job_name="deliver_webhooks")
    assert tick(told, result.cursor).run_requests == []
    end(told, queued, DagsterRunStatus.STARTED)
    assert len(tick(told, result.cursor).run_requests or []) == 1  # that one may hang at another target
    with deliveries(told).outbox.emptying("ops", "another run"):
        assert tick(told, result.cursor).run_requests == []
    end(told, queued, DagsterRunStatus.SUCCESS)

    assert told.job("deliver_webhooks").execute_in_process(instance=told.instance).success
    assert tick(told, result.cursor).run_requests == []
    assert receiver.types == ["batch.cancelled"]


def test_the_job_is_red_where_something_became_a_dead_letter(told: World, receiver: Receiver) -> None:
    receiver.script = [404]
    record(told, told.register("a.jsonl", told.chats(1)), CANCELED)
    record(told, told.register("b.jsonl", told.chats(2)), CANCELED)
    look(told)
    result = told.job("deliver_webhooks").execute_in_process(instance=told.instance, raise_on_error=False)
    assert not result.success
    assert len(receiver.received) == 2
    assert announced(told) == []
    assert len(deliveries(told).open_letters()) == 1
