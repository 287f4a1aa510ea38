"""Which batches wait for another model to be done."""

from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, cast

import pytest

from resources import pipeline
from resources.batch_store.batch import Batch
from resources.batch_store.store import BatchStore
from resources.engine.catalog import Catalog, ModelEntry
from resources.engine.factory import EngineStarter
from tests.helpers import FakeEngine, FakeStarter, chat, chats
from vllm_batch_pipelines.plan import HELD_SECONDS, Plan

MODELS = ("a", "b", "c")


class Machine(FakeStarter):
    """A machine with so many devices, and these models warm."""

    def __init__(self, devices: int = 1, warm: Iterable[str] = ()) -> None:
        super().__init__(FakeEngine(), warm)
        self.devices = devices


class Place:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.store = BatchStore(folder / "data")
        large = ModelEntry(name="large", source="o/m", engine_args={"tensor_parallel_size": 2})
        dry = ModelEntry(name="dry-run", engine="null")  # type: ignore[arg-type]
        self.catalog = Catalog([*(ModelEntry(name=name, source="o/m") for name in MODELS), large, dry])

    def batch(self, model: str, name: str = "in", options: dict[str, Any] | None = None) -> Batch:
        path = self.folder / f"{name}.jsonl"
        path.write_text(chats(2, f"for {model} {name}", model))
        return self.store.register(path, options).batch

    def started(self, machine: Machine, waiting: list[Batch], running: Iterable[Batch] = ()) -> list[Batch]:
        """Of those that wait, oldest first, the ones whose turn it is."""
        keys = [[batch.key for batch in some] for some in (running, waiting)]
        plan = Plan(self.store, self.catalog, cast(EngineStarter, machine), *keys)
        return [batch for batch in waiting if plan.reason_to_wait(batch, datetime.now(UTC)) is None]


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def test_batches_of_the_model_that_is_run_go_first(place: Place) -> None:
    running, same, other = place.batch("a", "1"), place.batch("a", "2"), place.batch("b", "3")
    assert place.started(Machine(warm=["b"]), [other, same], [running]) == [same]


def test_nothing_is_run_then_the_warm_model_goes_first_and_else_the_oldest(place: Place) -> None:
    oldest, warm = place.batch("a"), place.batch("b")
    assert place.started(Machine(warm=["b"]), [oldest, warm]) == [warm]
    assert place.started(Machine(), [oldest, warm]) == [oldest]
    assert place.started(Machine(warm=["c"]), [oldest]) == [oldest]


def test_files_that_alternate_between_three_models_load_each_once(place: Place) -> None:
    left = [place.batch(model, f"{number}") for number in range(7) for model in MODELS]
    order, warm = [], ""
    while left:
        started = place.started(Machine(warm=[warm]), left)
        (warm,) = {pipeline.models_of(batch, place.catalog)[0].name for batch in started}
        order.append(warm)
        left = [batch for batch in left if batch not in started]
    assert order == ["a", "b", "c"]


def test_nobody_waits_for_longer_than_the_limit(place: Place) -> None:
    running, other = place.batch("a", "1"), place.batch("b", "2")
    plan = Plan(place.store, place.catalog, cast(EngineStarter, Machine()), [running.key], [other.key])
    reason = plan.reason_to_wait(other, datetime.now(UTC))
    assert reason == "waits for the batches of a, 10 min at most"
    assert plan.reason_to_wait(other, datetime.now(UTC) - timedelta(seconds=HELD_SECONDS + 1)) is None


def test_as_many_models_as_the_devices_hold(place: Place) -> None:
    a, b, c, large = (place.batch(model) for model in (*MODELS, "large"))
    assert place.started(Machine(devices=2), [a, b, c]) == [a, b]
    assert place.started(Machine(devices=2), [large, a]) == [large]
    assert place.started(Machine(devices=3), [a, large, b], [c]) == [a, b]
    assert place.started(Machine(devices=1), [large]) == [large]  # it fails by itself, and says why


def test_batches_without_a_server_never_wait(place: Place) -> None:
    running, dry = place.batch("a", "1"), place.batch("dry-run", "2")
    assert place.started(Machine(), [dry], [running]) == [dry]


def test_models_of_a_batch_are_known_before_and_after_its_check(place: Place) -> None:
    def models(batch: Batch) -> list[str]:
        return sorted(entry.name for entry in pipeline.models_of(batch, place.catalog))

    path = place.folder / "mixed.jsonl"
    path.write_text(chat("1", model="a") + chat("2", model="b"))
    mixed = place.store.register(path).batch
    assert models(mixed) == ["a"]
    with mixed.lock("a test"):
        pipeline.check(mixed, place.catalog)
    assert models(mixed) == ["a", "b"]
    assert models(place.batch("a", "moved", options={"model": "c"})) == ["c"]
    assert models(place.batch("nobody")) == []
