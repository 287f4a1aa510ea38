"""The three assets through the real definitions and a real instance: what they do, and what a person sees of it."""

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from dagster import (
    AssetCheckSeverity,
    AssetExecutionContext,
    AssetKey,
    AssetMaterialization,
    AssetRecordsFilter,
    AutomationCondition,
    DagsterInstance,
    Definitions,
    ExecuteInProcessResult,
    JobDefinition,
    OpDefinition,
    RetryPolicy,
    TableMetadataValue,
    asset,
    evaluate_automation_conditions,
    materialize,
)

from assets.partitions import BATCH_FILES
from assets.reporting import LOCKED_TAG, PROGRESS_SECONDS, PROGRESS_TAG, progress_reporter
from resources.batch_store.batch import Batch
from resources.progress import Progress
from tests.helpers import (
    Answer,
    AnsweringServer,
    World,
    chat,
    chats,
    held_by_another_process,
    ids,
    new_world,
    read_jsonl,
)

pytestmark = pytest.mark.e2e


LONG_ANSWER = "word " * 400


def materialization(result: ExecuteInProcessResult, name: str) -> AssetMaterialization:
    (found,) = result.asset_materializations_for_node(name)
    return found


def metadata(result: ExecuteInProcessResult, name: str) -> dict[str, Any]:
    return {key: value.value for key, value in materialization(result, name).metadata.items()}


def table(result: ExecuteInProcessResult, name: str, key: str) -> list[dict[str, Any]]:
    found = materialization(result, name).metadata[key]
    assert isinstance(found, TableMetadataValue)
    return [dict(record.data) for record in found.records]


def checks(result: ExecuteInProcessResult) -> dict[str, tuple[bool, AssetCheckSeverity]]:
    return {found.check_name: (found.passed, found.severity) for found in result.get_asset_check_evaluations()}


def failure(result: ExecuteInProcessResult) -> str:
    """What the person reads who opens the failed run."""
    assert not result.success
    (failed,) = [event for event in result.all_events if event.event_type_value == "STEP_FAILURE"]
    data = failed.step_failure_data.user_failure_data
    assert data is not None, "not an error for people"
    return str(data.description)


def failure_errors(result: ExecuteInProcessResult) -> list[dict[str, Any]]:
    """The table of errors beside that."""
    (failed,) = [event for event in result.all_events if event.event_type_value == "STEP_FAILURE"]
    found = failed.step_failure_data.user_failure_data.metadata["errors"]
    assert isinstance(found, TableMetadataValue)
    return [dict(record.data) for record in found.records]


def failed_step(result: ExecuteInProcessResult) -> str | None:
    return next((event.step_key for event in result.all_events if event.event_type_value == "STEP_FAILURE"), None)


# --- One batch with all that can be in a file -----------------------------------------------------------------------


@dataclass(frozen=True)
class Mixed:
    world: World
    server: AnsweringServer
    batch: Batch
    first: ExecuteInProcessResult


def _answer(text: str) -> Answer:
    if text == "refuse":
        return Answer("I cannot do that", status=400)
    return Answer(LONG_ANSWER, finish_reason="length" if text == "cut" else "stop")


def _content() -> str:
    lines = [chat(f"good{n}", "ok", "hosted") for n in range(6)]
    lines += [chat(f"cut{n}", "cut", "hosted") for n in range(2)]
    lines += [chat("refused", "refuse", "hosted"), chat("unknown", model="no-such-model" * 8), "{broken\n"]
    return "".join(lines)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory, instance: DagsterInstance) -> Iterator[Mixed]:
    """Six good lines, two whose answer is cut, one that the engine refuses, one unknown model, one that is no JSON."""
    root = tmp_path_factory.mktemp("mixed")
    with AnsweringServer(_answer) as server, new_world(root, instance) as world:
        world.add_model("hosted", engine="openai", base_url=server.url)
        batch = world.register("mixed.jsonl", _content(), metadata={"team": "support"})
        yield Mixed(world, server, batch, world.run(batch.key))


def test_a_batch_with_bad_lines_succeeds_with_every_line_in_its_outputs(mixed: Mixed) -> None:
    assert mixed.first.success
    assert ids(mixed.batch.output_dir / "output.jsonl") == [f"good{n}" for n in range(6)] + ["cut0", "cut1"]
    assert ids(mixed.batch.output_dir / "errors.jsonl")[:2] == ["refused", "unknown"]
    assert len(read_jsonl(mixed.batch.output_dir / "errors.jsonl")) == 3


def test_counts_tokens_and_paths_are_in_the_metadata(mixed: Mixed) -> None:
    requests = metadata(mixed.first, "batch_requests")
    wanted = {"source": "mixed.jsonl", "lines": 11, "valid": 9, "rejected": 2, "models": {"hosted": 9}}
    assert requests.items() >= wanted.items()
    assert requests["options"] == {"metadata": {"team": "support"}}
    assert requests["dagster/row_count"] == 11

    results = metadata(mixed.first, "batch_results")
    wanted = {"asked_now": 9, "failed_now": 1, "truncated_now": 2, "prompt_tokens": 24, "completion_tokens": 16}
    assert results.items() >= wanted.items()
    assert results["model"] == "hosted"
    assert results["tokens_per_second"] > 0
    assert results["duration_seconds"] > 0
    assert results["deadline_passed"] is False

    output = metadata(mixed.first, "batch_output")
    wanted = {"lines": 11, "succeeded": 8, "failed": 3, "truncated": 2, "prompt_tokens": 24, "completion_tokens": 16}
    assert output.items() >= wanted.items()
    assert output["errors_by_code"] == {"http_400": 1, "model_not_found": 1, "invalid_json": 1}
    assert output["batch_metadata"] == {"team": "support"}
    assert Path(output["output_file"]).is_file()
    assert Path(output["error_file"]).is_file()
    assert Path(output["results"]).is_dir()


def test_the_first_rejects_are_a_table(mixed: Mixed) -> None:
    rejects = table(mixed.first, "batch_requests", "first_rejects")
    assert [(row["line"], row["error_code"]) for row in rejects] == [("10", "model_not_found"), ("11", "invalid_json")]
    assert rejects[0]["custom_id"] == "unknown"
    assert "no-such-model" in rejects[0]["error_message"]


def test_sample_answers_are_cut_short(mixed: Mixed) -> None:
    samples = table(mixed.first, "batch_output", "sample_answers")
    assert [row["custom_id"] for row in samples] == [f"good{n}" for n in range(5)]
    for row in samples:
        assert len(row["text"]) == 500
        assert LONG_ANSWER.startswith(row["text"].removesuffix("…"))
        assert row["text"].endswith("…")


def test_checks_tell_what_is_wrong_and_only_a_lost_line_blocks(mixed: Mixed) -> None:
    warn, error = AssetCheckSeverity.WARN, AssetCheckSeverity.ERROR
    assert checks(mixed.first) == {
        "requests_valid": (False, warn),
        "every_request_answered_once": (True, error),
        "error_rate": (False, warn),
        "truncated_rate": (False, warn),
        "schema_violation_rate": (True, warn),
    }
    for evaluation in mixed.first.get_asset_check_evaluations():
        assert evaluation.partition == mixed.batch.key


def test_assets_carry_versions_of_data_and_code(mixed: Mixed) -> None:
    expected = {
        "batch_requests": mixed.batch.spec.identity[:16],
        "batch_results": "+".join(f"{e['generation']}.r1" for e in mixed.batch.current().values()),
    }
    expected["batch_output"] = expected["batch_results"]
    for name, version in expected.items():
        tags = materialization(mixed.first, name).tags or {}
        assert tags["dagster/data_version"] == version
        assert tags["dagster/code_version"] == "1"


def test_another_run_asks_nothing_and_can_leave_the_answers_out_of_the_ui(mixed: Mixed) -> None:
    asked = len(mixed.server.asked)
    config = {"ops": {"batch_output": {"config": {"show_answers": False, "max_error_rate": 0.5}}}}
    again = mixed.world.run(mixed.batch.key, config=config)
    assert again.success
    assert len(mixed.server.asked) == asked
    assert metadata(again, "batch_results")["asked_now"] == 0
    assert "sample_answers" not in metadata(again, "batch_output")
    assert not any("word word" in str(event) for event in again.all_events)
    assert checks(again)["error_rate"] == (True, AssetCheckSeverity.WARN)
    for name in ("batch_requests", "batch_results", "batch_output"):
        old, new = (materialization(result, name).tags or {} for result in (mixed.first, again))
        assert new["dagster/data_version"] == old["dagster/data_version"]


def test_the_retry_job_asks_the_failed_lines_again_and_makes_a_new_revision(mixed: Mixed) -> None:
    asked = len(mixed.server.asked)
    mixed.server.answer = lambda _: Answer("now it works")
    retried = mixed.world.run(mixed.batch.key, "retry_failed_rows")
    assert retried.success
    assert mixed.server.asked[asked:] == ["refuse"]
    output = {line["custom_id"]: line for line in read_jsonl(mixed.batch.output_dir / "output.jsonl")}
    assert output["refused"]["response"]["body"]["choices"][0]["message"]["content"] == "now it works"
    assert output["good0"]["response"]["body"]["choices"][0]["message"]["content"] == LONG_ANSWER
    version = (materialization(retried, "batch_output").tags or {})["dagster/data_version"]
    assert version.endswith(".r2")


def test_answers_that_do_not_fit_their_schema_are_counted_and_asked_again_when_chosen(world: World) -> None:
    text = world.chats(3, response_format={"type": "json_object"}) + world.chats(1, "free").replace("r1", "r4")
    with AnsweringServer(lambda text: Answer("no object")) as server:
        world.add_model("hosted", engine="openai", base_url=server.url)
        batch = world.register("schemas.jsonl", text, model="hosted")
        first = world.run(batch.key)
        assert metadata(first, "batch_output")["schema_violations"] == 3
        assert checks(first)["schema_violation_rate"] == (False, AssetCheckSeverity.WARN)
        tolerant = {"ops": {"batch_output": {"config": {"max_schema_violation_rate": 0.75}}}}
        assert checks(world.run(batch.key, config=tolerant))["schema_violation_rate"][0]
        server.answer = lambda _: Answer('{"n": 1}')
        config = {"ops": {"batch_results": {"config": {"mode": "RETRY_FAILED", "failed": ["schema"]}}}}
        retried = world.run(batch.key, "retry_failed_rows", config)
    assert metadata(retried, "batch_results")["asked_now"] == 3
    assert metadata(retried, "batch_output")["schema_violations"] == 0
    assert checks(retried)["schema_violation_rate"][0]


def test_a_choice_that_there_is_not_fails_with_those_that_there_are(world: World) -> None:
    batch = world.register("a.jsonl", world.chats(1))
    config = {"ops": {"batch_results": {"config": {"mode": "RETRY_FAILED", "failed": ["all"]}}}}
    assert "none of errors, truncated, schema" in failure(world.run(batch.key, "retry_failed_rows", config))


def test_copies_of_an_answer_are_counted_apart_from_what_was_asked(world: World) -> None:
    batch = world.register("same.jsonl", world.chats(5, temperature=0), dedupe=True)
    found = metadata(world.run(batch.key), "batch_results")
    assert (found["asked_now"], found["copied_now"]) == (1, 4)


# --- Batches that cannot run ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "options", "reason"),
    [
        ("", {}, "holds no request"),
        ("{}\n", {}, "None of the 1 lines is valid: line 1: missing_required_parameter"),
        (
            chat("good", model="never") + "{\n",
            {"on_invalid": "reject"},
            "1 of 2 lines are invalid: line 2: invalid_json",
        ),
    ],
    ids=["empty", "no valid line", "rejected"],
)
def test_a_batch_that_cannot_run_fails_with_its_reason_before_any_engine(
    world: World, content: str, options: dict[str, Any], reason: str
) -> None:
    world.add_model("never", source="./no-such-model")  # an engine that was started would leave a log and an error
    batch = world.register("hopeless.jsonl", content, **options)
    result = world.run(batch.key)
    assert reason in failure(result)
    errors = failure_errors(result)
    (wanted,) = (batch.final_failure() or {})["errors"]["data"]
    assert errors == [{name: "" if value is None else str(value) for name, value in wanted.items()}]
    assert failed_step(result) == "batch_requests"
    assert not result.asset_materializations_for_node("batch_requests")
    assert not (world.settings.data_root / "logs").exists()
    assert batch.final_failure() is not None


def test_an_engine_that_does_not_start_fails_the_run_with_what_to_do(world: World) -> None:
    world.add_model("never", source="./no-such-model")
    result = world.run(world.register("a.jsonl", chats(1, model="never")).key)
    assert failed_step(result) == "batch_results"
    assert "no-such-model" in failure(result)


@pytest.mark.parametrize(
    "key", ["typo-00000000", "../../../etc/passwd", "ü" * 300 + "\n-00000000"], ids=["a typo", "a path", "long"]
)
def test_a_key_nobody_registered_fails_at_once_and_says_how_to_register(world: World, key: str) -> None:
    before = sorted(world.settings.data_root.rglob("*"))
    world.instance.add_dynamic_partitions(BATCH_FILES.name or "", [key])
    try:
        result = world.run(key)
    finally:
        world.instance.delete_dynamic_partition(BATCH_FILES.name or "", key)
    message = failure(result)
    assert failed_step(result) == "batch_requests"
    assert "No batch is registered" in message
    for way in ("inbox", "vllm-batch submit", "register_files"):
        assert way in message
    assert [path for path in sorted(world.settings.data_root.rglob("*")) if path not in before] == [
        world.settings.data_root / "batches",
        world.settings.data_root / "queue",
    ]


def test_a_batch_that_another_process_works_on_is_refused_with_its_name(world: World) -> None:
    batch = world.register("a.jsonl", chats(2))
    with held_by_another_process(batch, "vllm-batch run") as holder:
        result = world.run(batch.key)
        message = failure(result)
    assert f"vllm-batch run (process {holder.pid}" in message
    run = world.instance.get_run_by_id(result.run_id)
    assert run is not None
    assert run.tags[LOCKED_TAG] == "true"
    assert batch.final_failure() is None


# --- The blocking check ---------------------------------------------------------------------------------------------


def _cut_output(batch: Batch) -> None:
    path = batch.output_dir / "output.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[1:]))


def _cut_rows(batch: Batch) -> None:
    part = next(batch.output_dir.glob("results/part-*.parquet"))
    part.unlink()


@pytest.mark.parametrize(("damage", "problem"), [(_cut_output, "hold 2 lines, not 3"), (_cut_rows, "3 lines missing")])
def test_outputs_that_lost_a_line_fail_the_blocking_check(
    world: World, damage: Callable[[Batch], None], problem: str
) -> None:
    batch = world.register("a.jsonl", chats(3))
    world.finish(batch)
    damage(batch)
    result = world.run(batch.key, asset_selection=[AssetKey("batch_output")])
    assert not result.success
    (evaluation,) = [e for e in result.get_asset_check_evaluations() if e.check_name == "every_request_answered_once"]
    assert (evaluation.passed, evaluation.severity) == (False, AssetCheckSeverity.ERROR)
    assert problem in (evaluation.description or "")


@pytest.mark.e2e
def test_a_batch_that_failed_its_check_holds_back_its_own_downstream_and_nobody_elses(world: World) -> None:
    @asset(
        deps=["batch_output"],
        partitions_def=BATCH_FILES,
        automation_condition=AutomationCondition.eager() & AutomationCondition.all_deps_blocking_checks_passed(),
    )
    def downstream() -> None: ...

    definitions = Definitions.merge(world.definitions, Definitions(assets=[downstream]))
    good = world.register("good.jsonl", chats(1, "of the good one"))
    bad = world.register("bad.jsonl", chats(2, "of the bad one"))

    def evaluate(cursor: Any = None) -> Any:
        return evaluate_automation_conditions(definitions, world.instance, cursor=cursor)

    before = evaluate()
    assert world.run(bad.key).success
    _cut_output(bad)
    assert not world.run(bad.key).success
    assert world.run(good.key).success
    requested = evaluate(before.cursor).get_requested_partitions(AssetKey("downstream"))
    assert good.key in requested
    assert bad.key not in requested


# --- Progress -------------------------------------------------------------------------------------------------------


def test_progress_is_told_at_most_every_fifteen_seconds(instance: DagsterInstance) -> None:
    now = 0.0

    @asset(partitions_def=BATCH_FILES)
    def watched(context: AssetExecutionContext) -> None:
        nonlocal now
        report = progress_reporter(context, clock=lambda: now)
        for second in range(61):
            now = float(second)
            report(Progress("answer", second, 120, failed=2, tokens_per_second=40.0, rows_per_second=1.0))

    instance.add_dynamic_partitions(BATCH_FILES.name or "", ["watched-00000000"])
    result = materialize([watched], instance=instance, partition_key="watched-00000000")
    records = instance.fetch_observations(AssetRecordsFilter(AssetKey("watched")), limit=20).records
    seen = [record.asset_observation for record in reversed(records)]
    assert PROGRESS_SECONDS == 15
    assert [o.metadata["rows_done"].value for o in seen if o] == [15, 30, 45, 60]
    last = seen[-1]
    assert last is not None
    assert last.partition == "watched-00000000"
    assert {name: value.value for name, value in last.metadata.items()} == {
        "rows_done": 60,
        "rows_failed": 2,
        "percent": 50.0,
        "tokens_per_second": 40.0,
        "eta_seconds": 60.0,
    }
    run = instance.get_run_by_id(result.run_id)
    assert run is not None
    assert run.tags[PROGRESS_TAG] == "answer 50 %"


# --- The graph ------------------------------------------------------------------------------------------------------


def _retry_policies(job: JobDefinition) -> list[RetryPolicy]:
    operations = [node.definition for node in job.nodes if isinstance(node.definition, OpDefinition)]
    assert len(operations) == len(job.nodes)
    return [operation.retry_policy for operation in operations if operation.retry_policy is not None]


def _described(definitions: Definitions) -> str:
    """Everything that the code location holds, as text whose changes can be read in a review."""
    repository = definitions.get_repository_def()
    graph = repository.asset_graph
    lines = [f"executor {definitions.executor.name if definitions.executor else None}", ""]
    for key in sorted(graph.get_all_asset_keys()):
        node = graph.get(key)
        lines += [
            f"asset {key.to_user_string()}",
            f"  description  {node.description}",
            f"  deps         {', '.join(sorted(parent.to_user_string() for parent in node.parent_keys)) or '-'}",
            f"  partitions   {node.partitions_def}",
            f"  group        {node.group_name}",
            f"  owners       {', '.join(node.owners)}",
            f"  kinds        {', '.join(sorted(node.kinds))}",
            f"  pools        {', '.join(sorted(node.pools or [])) or '-'}",
            f"  code         {node.code_version}",
            f"  automation   {node.automation_condition}",
        ]
        for check in sorted(node.check_keys, key=lambda check: check.name):
            spec = graph.get_check_spec(check)
            partitioned = "partitioned" if spec.partitions_def == node.partitions_def else "not partitioned"
            lines.append(f"  check        {check.name}, {partitioned}{', blocking' if spec.blocking else ''}")
            lines.append(f"               {spec.description}")
        lines.append("")
    for job in sorted(repository.get_all_jobs(), key=lambda job: job.name):
        if not job.name.startswith("__"):
            lines += [
                f"job {job.name}",
                f"  description  {job.description}",
                f"  steps        {', '.join(sorted(node.name for node in job.nodes))}",
                f"  partitions   {job.partitions_def}",
                f"  config       {json.dumps(job.run_config or {}, sort_keys=True)}",
                f"  retries      {', '.join(str(policy) for policy in _retry_policies(job)) or '-'}",
                "",
            ]
    for sensor in sorted(repository.sensor_defs, key=lambda sensor: sensor.name):
        lines += [
            f"sensor {sensor.name}",
            f"  description  {sensor.description}",
            f"  status       {sensor.default_status.value}, at most every {sensor.minimum_interval_seconds} s",
            f"  jobs         {', '.join(sorted(target.job_name for target in sensor.targets))}",
            "",
        ]
    for schedule in sorted(repository.schedule_defs, key=lambda schedule: schedule.name):
        lines += [
            f"schedule {schedule.name}",
            f"  description  {schedule.description}",
            f"  status       {schedule.default_status.value}, {schedule.cron_schedule}",
            f"  job          {schedule.job_name}",
            "",
        ]
    resources = sorted(repository.get_top_level_resources())
    lines.append(f"resources {', '.join(resources)}")
    return "\n".join(lines) + "\n"


def test_the_definitions_are_those_of_the_snapshot(world: World) -> None:
    """After a change that is meant: UPDATE_SNAPSHOTS=1 makes the file anew."""
    file = Path(__file__).with_name("definitions.txt")
    described = _described(world.definitions)
    if os.environ.get("UPDATE_SNAPSHOTS"):
        file.write_text(described)
    assert described == file.read_text()
