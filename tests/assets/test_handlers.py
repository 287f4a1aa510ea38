"""Handlers of the earlier interface as assets: each apart from the others, in order, and red when it fails."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from dagster import AssetKey, DagsterInstance, ExecuteInProcessResult
from typer.testing import CliRunner

from resources.batch_store.batch import Batch
from tests.helpers import World, chat, new_world
from vllm_batch_pipelines.cli.main import app

pytestmark = pytest.mark.e2e

HANDLERS = ["AfterHangs", "Plain", "Report", "Raises", "SaysNo", "Forgets", "Hangs"]


@pytest.fixture
def world(tmp_path: Path, instance: DagsterInstance) -> Iterator[World]:
    with pytest.MonkeyPatch.context() as environment:
        paths = ",".join(f"tests.resources.own_handlers:{name}" for name in HANDLERS)
        environment.setenv("VLLM_BATCH_RESULT_HANDLERS", paths)
        environment.setenv("VLLM_BATCH_HANDLER_TIMEOUT", "3")
        environment.setenv("HANDLER_NOTES", str(tmp_path))
        with new_world(tmp_path, instance) as made:
            yield made


def published(world: World, **metadata: str) -> Batch:
    """Two answers and an error row, up to the outputs."""
    content = chat("a", f"one ({world.root})") + chat("b", model="nobody") + chat("c", "two")
    batch = world.register("in.jsonl", content, metadata=metadata)
    assert world.run(batch.key).success
    return batch


def handle(world: World, batch: Batch, *names: str) -> ExecuteInProcessResult:
    keys = [AssetKey(f"handler_{name.lower()}") for name in names or HANDLERS]
    return world.definitions.resolve_implicit_global_asset_job_def().execute_in_process(
        instance=world.instance, partition_key=batch.key, asset_selection=keys, raise_on_error=False
    )


def notes(world: World, name: str) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(world.root.glob(f"{name}.*.json"))]


def failures(result: ExecuteInProcessResult) -> dict[str, str]:
    failed = [event for event in result.all_events if event.event_type_value == "STEP_FAILURE"]
    return {str(event.step_key): event.step_failure_data.user_failure_data.description for event in failed}


def test_every_handler_that_fails_fails_alone_and_can_be_run_again_alone(world: World) -> None:
    batch = published(world)
    result = handle(world, batch)
    failed = failures(result)
    assert set(failed) == {"handler_raises", "handler_saysno", "handler_forgets", "handler_hangs"}
    assert failed["handler_raises"] == f"Raises did not handle {batch.key}: RuntimeError: the archive is full"
    assert "handle() returned False; True says that it is done" in failed["handler_saysno"]
    assert "handle() returned None" in failed["handler_forgets"]
    assert "nothing was heard of it for 3 s; its process was ended" in failed["handler_hangs"]
    assert [note.get("error") for note in notes(world, "Raises")] == ["RuntimeError('the archive is full')"]

    done = [event.step_key for event in result.all_events if event.event_type_value == "STEP_SUCCESS"]
    assert done == ["handler_plain", "handler_report"]
    assert notes(world, "AfterHangs") == [], "it comes after one that failed"
    assert (batch.output_dir / "output.jsonl").read_text().count("\n") == 2

    (world.root / "mended").touch()
    assert handle(world, batch, "Hangs").success
    assert handle(world, batch, "AfterHangs").success
    assert len(notes(world, "Plain")) == 1, "the others were left alone"


def test_a_handler_gets_all_lines_as_often_as_it_reads_them_and_what_is_known_of_the_batch(world: World) -> None:
    batch = published(world, team="support")
    assert handle(world, batch, "Plain").success
    (note,) = notes(world, "Plain")
    assert (note["batch"], note["ids"], note["again"], note["count"]) == (batch.key, ["a", "c", "b"], True, 3)
    assert note["metadata"]["team"] == "support"
    ours = note["metadata"]["vllm_batch"]
    assert (ours["lines"], ours["succeeded"], ours["failed"], ours["source"]) == (3, 2, 1, "in.jsonl")


def test_one_that_is_not_enabled_for_a_batch_does_nothing_and_says_so(world: World) -> None:
    result = handle(world, published(world, team="nobody"), "Plain")
    (found,) = result.asset_materializations_for_node("handler_plain")
    assert found.metadata["note"].value == "not enabled for this batch"
    assert notes(world, "Plain") == []


def test_one_that_breaks_while_the_stack_is_up_takes_neither_batches_nor_others_with_it(
    tmp_path: Path, instance: DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each run loads the definitions anew, and with them whatever somebody has made of that module by now."""
    monkeypatch.setenv("VLLM_BATCH_RESULT_HANDLERS", "no.such.module:Broken,tests.resources.own_handlers:Plain")
    monkeypatch.setenv("HANDLER_NOTES", str(tmp_path))
    with new_world(tmp_path, instance) as world:
        assert handle(world, published(world), "Plain").success
    refused = CliRunner().invoke(app, ["up"])
    assert refused.exit_code == 2
    assert "VLLM_BATCH_RESULT_HANDLERS: 'no.such.module:Broken'" in " ".join(refused.output.split())


def test_they_stand_in_the_graph_after_the_outputs_and_after_each_other(world: World) -> None:
    graph = world.definitions.resolve_asset_graph()
    assert graph.get(AssetKey("handler_report")).parent_keys == {AssetKey("batch_output"), AssetKey("handler_plain")}
    assert graph.get(AssetKey("handler_plain")).automation_condition is not None
