"""What the asset `machine` is observed to be."""

import importlib
from datetime import UTC, datetime
from typing import Any

import pytest
from dagster import AssetKey, AssetObservation, DefaultSensorStatus, SensorResult, build_sensor_context

from resources.batch_store import queue
from resources.webhooks.deliveries import Deliveries
from resources.webhooks.event import Event
from tests.helpers import World
from vllm_batch_pipelines import monitoring

pytestmark = pytest.mark.e2e


def observed(world: World) -> dict[str, Any]:
    result = monitoring.monitoring(build_sensor_context(instance=world.instance))
    assert isinstance(result, SensorResult)
    assert not result.run_requests
    (event,) = result.asset_events
    assert isinstance(event, AssetObservation)
    assert event.asset_key == AssetKey("machine")
    return {name: value.value for name, value in event.metadata.items()}


def test_what_waits_is_counted(world: World) -> None:
    before = observed(world)
    assert 0 < before["disk_free_percent"] <= 100
    assert (before["servers_up"], before["servers"], before["start_requests_waiting"]) == (0, "none", 0)
    queue.enqueue(world.store, world.register("a.jsonl", world.chats(1)).key)
    box = Deliveries(world.settings.data_root, {}).outbox
    box.put(Event("msg_1", "gold_star.created", datetime.now(UTC), {}), "ops")
    after = observed(world)
    assert (after["start_requests_waiting"], after["webhook_events_waiting"], after["dead_letters"]) == (1, 1, 0)


def test_it_is_off_until_it_is_switched_on(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "monitoring" not in [sensor.name for sensor in world.definitions.sensors or []]
    monkeypatch.setenv("VLLM_BATCH_ENABLE_MONITORING", "true")
    from resources.settings import settings

    settings.cache_clear()
    definitions = importlib.reload(importlib.import_module("vllm_batch_pipelines.definitions")).defs
    (sensor,) = [sensor for sensor in definitions.sensors if sensor.name == "monitoring"]
    assert sensor.default_status is DefaultSensorStatus.RUNNING
    assert AssetKey("machine") in definitions.resolve_all_asset_keys()
