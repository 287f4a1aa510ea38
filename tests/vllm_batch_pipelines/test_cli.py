"""The command line: what it prints where, and its exit codes."""

import csv
import io
import json
import os
import shutil
import signal
import stat
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import pyarrow.parquet as pq
import pytest
import typer
import yaml
from typer.testing import CliRunner, Result

from resources.batch_store import queue
from resources.batch_store.store import BatchStore
from resources.chunk_store.schema import RESULTS
from resources.engine.devices import installed_gpus
from resources.settings import settings
from tests.helpers import (
    AnsweringServer,
    chat,
    chats,
    held_by_another_process,
    ids,
    python,
    read_jsonl,
    wait_until,
)
from vllm_batch_pipelines.cli.main import app

pytestmark = pytest.mark.e2e


BAD = chat("a") + "not json\n" + chat("b", model="nobody")


@dataclass
class Place:
    """A folder of a test's own, with a catalog and a data root, and the command in it."""

    folder: Path
    runtime: Path
    monkeypatch: pytest.MonkeyPatch
    models: dict[str, Any] = field(default_factory=lambda: {"dry-run": {"engine": "null", "aliases": ["dry"]}})

    processes: list[subprocess.Popen[str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        (self.folder / "models.yaml").write_text(yaml.safe_dump({"models": self.models}))
        for name, value in self.environment.items():
            self.monkeypatch.setenv(name, value)
        self.monkeypatch.chdir(self.folder)
        settings.cache_clear()

    @property
    def environment(self) -> dict[str, str]:
        return {
            "VLLM_BATCH_DATA": str(self.folder / "data"),
            "VLLM_BATCH_RUNTIME_DIR": str(self.runtime),
            "VLLM_BATCH_MODELS_FILE": str(self.folder / "models.yaml"),
        }

    @property
    def store(self) -> BatchStore:
        return BatchStore(self.folder / "data")

    def write(self, text: str, name: str = "in.jsonl") -> Path:
        path = self.folder / name
        path.write_text(text)
        return path

    def start(self, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        """The command in a process of its own."""
        env = {**self.environment, **environment}
        self.processes.append(python("-m", "vllm_batch_pipelines.cli.main", *arguments, env=env, cwd=self.folder))
        return self.processes[-1]

    def __call__(self, *arguments: str, input: str | None = None) -> Result:
        """The command in this process, which is quicker."""
        return CliRunner().invoke(app, arguments, input=input)

    def use_endpoint(self, server: AnsweringServer) -> None:
        self.models["dry-run"] = {"engine": "openai", "base_url": server.url, "concurrency": 2}
        (self.folder / "models.yaml").write_text(yaml.safe_dump({"models": self.models}))


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    runtime = Path(tempfile.mkdtemp(dir="/tmp", prefix="vb"))
    made = Place(tmp_path, runtime, monkeypatch)
    yield made
    for process in made.processes:
        process.kill()
        process.communicate()
    settings.cache_clear()
    shutil.rmtree(runtime)


def ended(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


def answered(place: Place, text: str = BAD) -> str:
    """The key of a batch that is complete."""
    place.write(text)
    result = place("run", "in.jsonl", "--json")
    return str(json.loads(result.stdout)["key"])


# --- run ------------------------------------------------------------------------------------------------------------


def test_run_exits_by_what_became_of_the_lines(place: Place) -> None:
    place.write(chats(3), "good.jsonl")
    place.write(BAD, "bad.jsonl")
    place.write("", "empty.jsonl")
    processes = {
        0: place.start("run", "good.jsonl", "--output", "o.jsonl"),
        1: place.start("run", "bad.jsonl", "--output", "bo.jsonl", "--errors", "be.jsonl", "--json"),
        2: place.start("run", "empty.jsonl", "--json"),
    }
    outcomes = {code: ended(process) for code, process in processes.items()}
    assert {code: outcome[0] for code, outcome in outcomes.items()} == {0: 0, 1: 1, 2: 2}
    assert outcomes[0][1] == ""
    assert "3 of 3 lines answered" in outcomes[0][2]
    assert ids(place.folder / "o.jsonl") == ["r1", "r2", "r3"]
    document = json.loads(outcomes[1][1])
    assert document["request_counts"] == {"total": 3, "completed": 1, "failed": 2, "rejected": 2, "asked_now": 1}
    assert document["errors_by_code"] == {"invalid_json": 1, "model_not_found": 1}
    assert (document["status"], document["engine"]) == ("completed", ["null"])
    assert ids(place.folder / "bo.jsonl") + ids(place.folder / "be.jsonl") == ["a", None, "b"]
    assert outcomes[2][1] == ""
    assert "holds no request" in outcomes[2][2]
    assert "Traceback" not in "".join(err for _, _, err in outcomes.values())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run", "gone.jsonl"], "gone.jsonl"),
        (["run", "in.txt"], "ends in .jsonl"),
        (["run", "in.jsonl", "--option", "chunk_row=5"], "did you mean `chunk_rows`"),
        (["run", "in.jsonl", "--option", "nonsense"], "must be key=value"),
        (["run", "in.jsonl", "--engine", "tgi"], "tgi"),
        (["run", "in.jsonl", "--engine", "openai"], "is on engine null"),
        (["run", "in.jsonl", "--mode", "again"], "again"),
        (["run", "in.jsonl", "--limit", "0"], "limit"),
        (["run", "in.jsonl", "--failed", "truncated"], "give both"),
        (["run", "in.jsonl", "--mode", "retry_failed", "--failed", "all"], "none of errors, truncated, schema"),
        (["retry", "in-00000000", "--failed", "cut"], "none of errors, truncated, schema"),
        (["run", "in.jsonl", "--model", "nobody"], "not in the catalog"),
        (["run"], "Missing argument"),
        (["status", "in-00000000"], "No batch is registered"),
        (["status", "../x"], "No batch is registered"),
        (["results", "in-00000000"], "No batch is registered"),
        (["cancel", "in-00000000"], "No batch is registered"),
        (["rm", "in-00000000", "--yes"], "No batch is registered"),
        (["prune", "--older-than", "soon", "--yes"], "must be a number and a unit"),
        (["no-such-command"], "no-such-command"),
    ],
)
def test_bad_usage_is_exit_2_with_the_reason_on_stderr(place: Place, arguments: list[str], said: str) -> None:
    place.write(chats(1))
    result = place(*arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert said in " ".join(result.stderr.split())
    assert "Traceback" not in result.stderr


def test_unknown_setting_is_refused_with_a_hint(place: Place) -> None:
    place.write(chats(1))
    place.monkeypatch.setenv("VLLM_BATCH_DTA", "x")
    settings.cache_clear()
    result = place("run", "in.jsonl")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "Unknown setting VLLM_BATCH_DTA. Did you mean VLLM_BATCH_DATA?" in " ".join(result.stderr.split())


def test_run_never_imports_dagster(place: Place) -> None:
    place.write(chats(2))
    script = (
        "import sys, atexit; from vllm_batch_pipelines.cli.main import app\n"
        "atexit.register(lambda: print(sorted(m for m in sys.modules if m.split('.')[0] in"
        " ('dagster', 'sqlalchemy', 'psycopg2', 'torch', 'vllm')), file=sys.stderr))\n"
        "app(['run', 'in.jsonl', '--json'])"
    )
    code, out, err = ended(python("-c", script, env=place.environment, cwd=place.folder))
    assert (code, json.loads(out)["status"]) == (0, "completed")
    assert err.endswith("[]\n")


def test_interrupted_run_is_exit_3_and_the_same_command_goes_on(place: Place) -> None:
    signals = {"a": signal.SIGINT, "b": signal.SIGTERM}
    for name in signals:
        place.write("".join(chat(f"{name}{n}", f"{name}{n}") for n in range(1, 21)), f"{name}.jsonl")
    with AnsweringServer(hold=lambda _: True) as server:
        place.use_endpoint(server)
        processes = {name: place.start("run", f"{name}.jsonl", "--json") for name in signals}
        wait_until(lambda: len(server.asked) == 4, 30)
        for name, process in processes.items():
            process.send_signal(signals[name])
        for process in processes.values():
            code, out, err = ended(process)
            assert (code, out) == (3, "")
            assert "the same command goes on from there" in err
            assert "Traceback" not in err
        server.gate.set()
        for name in signals:
            again = place("run", f"{name}.jsonl", "--json")
            assert (again.exit_code, json.loads(again.stdout)["request_counts"]["completed"]) == (0, 20)
    assert len(set(server.asked)) == 40
    assert len(server.asked) <= 44


def test_second_run_on_the_same_batch_names_the_first_and_cancel_stops_that(place: Place) -> None:
    place.write(chats(4))
    with AnsweringServer(hold=lambda _: True) as server:
        place.use_endpoint(server)
        first = place.start("run", "in.jsonl")
        wait_until(lambda: len(server.asked) == 2, 30)
        second = place("run", "in.jsonl")
        (key,) = place.store.keys()
        during = json.loads(place("status", key, "--json").stdout)
        assert place("cancel", key).exit_code == 0
        assert ended(first)[0] == 3
    assert second.exit_code == 2
    assert f"vllm-batch run (process {first.pid} on" in " ".join(second.stderr.split())
    assert (during["state"], during["run"]["pid"]) == ("running", first.pid)
    assert json.loads(place("status", key, "--json").stdout)["state"] == "interrupted"
    assert place("cancel", key).exit_code == 2


def test_dry_run_and_limit_are_batches_of_their_own(place: Place) -> None:
    place.write(chats(5))
    keys = {
        json.loads(place("run", "in.jsonl", "--json", *more).stdout)["key"]
        for more in ([], ["--engine", "null"], ["--limit", "2"], ["--model", "dry"])
    }
    assert len(keys) == 4
    assert sorted(len(ids(batch.output_dir / "output.jsonl")) for batch in place.store) == [2, 5, 5, 5]


def test_rejected_batch_shows_the_lines_that_are_to_blame(place: Place) -> None:
    place.write(chats(2) + "bad\n" + chat("c", model="nobody"))
    assert place("run", "in.jsonl", "--option", "on_invalid=reject", "--json").exit_code == 2
    (key,) = place.store.keys()
    document = json.loads(place("status", key, "--json").stdout)
    assert (document["state"], document["errors"]["object"]) == ("failed", "list")
    assert [(error["line"], error["code"], error["param"]) for error in document["errors"]["data"]] == [
        (3, "invalid_json", None),
        (4, "model_not_found", "body.model"),
    ]
    shown = place("status", key).stdout
    assert "2 of 4 lines are invalid" in shown
    assert "line 4: model_not_found" in shown


def test_answers_that_do_not_fit_are_told_and_asked_again_when_chosen(place: Place) -> None:
    place.write(chats(3, response_format={"type": "json_object"}) + chat("free"))
    first = json.loads(place("run", "in.jsonl", "--json").stdout)
    assert first["schema_violations"] == 3
    found = json.loads(place("status", first["key"], "--json").stdout)
    assert (found["succeeded"], found["schema_violations"]) == (4, 3)
    assert "3 do not fit their JSON schema" in place("status", first["key"]).stdout
    retry = place("run", "in.jsonl", "--mode", "retry_failed", "--failed", "errors,schema")
    assert "3 asked now" in retry.stderr
    assert "3 answers do not fit their JSON schema" in retry.stderr


def test_retry_leaves_its_choice_for_the_stack(place: Place) -> None:
    key = answered(place)
    assert place("retry", key, "--failed", "truncated,errors").exit_code == 0
    (request,) = queue.pending(place.store)
    assert (request.mode, request.failed) == ("retry_failed", ("errors", "truncated"))


def test_duplicates_are_told_apart_from_what_was_asked(place: Place) -> None:
    place.write(chats(5, temperature=0))
    result = place("run", "in.jsonl", "--option", "dedupe=true")
    assert "5 of 5 lines answered; 1 asked now, 4 more the same as one of these" in " ".join(result.stderr.split())


def test_modes_of_a_run(place: Place) -> None:
    place.write(chats(3) + "bad\n")

    def asked_now(*more: str) -> int:
        return int(json.loads(place("run", "in.jsonl", "--json", *more).stdout)["request_counts"]["asked_now"])

    assert [asked_now(), asked_now(), asked_now("--mode", "retry_failed"), asked_now("--mode", "restart")] == [
        3,
        0,
        0,
        3,
    ]


def test_output_can_have_the_longest_name(place: Place) -> None:
    place.write(chats(1))
    name = "é" * 124 + ".jsonl"
    assert place("run", "in.jsonl", "--output", name).exit_code == 0
    assert ids(place.folder / name) == ["r1"]
    assert place("run", "in.jsonl", "--output", ".").exit_code == 2


# --- Reading --------------------------------------------------------------------------------------------------------


def test_output_can_be_a_pipe_or_a_device_and_stays_one(place: Place) -> None:
    pipe = place.folder / "pipe"
    os.mkfifo(pipe)
    reader = subprocess.Popen(["cat", str(pipe)], stdout=subprocess.PIPE, text=True)
    place.write(chats(3))
    assert place("run", "in.jsonl", "-o", "pipe", "-e", "/dev/null").exit_code == 0
    assert len(reader.communicate(timeout=30)[0].splitlines()) == 3
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    assert stat.S_ISCHR(Path("/dev/null").stat().st_mode)


def test_results_in_every_format(place: Place) -> None:
    key = answered(place)
    as_lines = place("results", key, "-e", "errors.jsonl")
    assert [json.loads(line)["custom_id"] for line in as_lines.stdout.splitlines()] == ["a"]
    assert ids(place.folder / "errors.jsonl") == [None, "b"]
    assert place("results", key, "-o", "rows.parquet", "--format", "parquet").exit_code == 0
    assert pq.read_table(place.folder / "rows.parquet").schema.equals(RESULTS)
    rows = list(csv.DictReader(io.StringIO(place("results", key, "--format", "csv").stdout)))
    assert [(row["line"], row["custom_id"], row["error_code"]) for row in rows] == [
        ("1", "a", ""),
        ("2", "", "invalid_json"),
        ("3", "b", "model_not_found"),
    ]
    assert place("results", key, "-o", "rows.csv", "--format", "csv").exit_code == 0
    assert len((place.folder / "rows.csv").read_text().splitlines()) == 4
    refused = place("results", key, "--format", "parquet")
    assert (refused.exit_code, refused.stdout) == (2, "")


def test_results_of_an_incomplete_batch_are_those_so_far(place: Place) -> None:
    place.write("".join(chat(f"r{n}", f"r{n}") for n in range(1, 6)))
    with AnsweringServer(hold=lambda text: text in ("r4", "r5")) as server:
        place.use_endpoint(server)
        process = place.start("run", "in.jsonl", "--option", "flush_seconds=0.1")
        wait_until(lambda: len(server.asked) == 5, 30)
        (key,) = place.store.keys()
        wait_until(lambda: any((place.store.get(key).results_dir).glob("*/*/chunk-*")), 10)
        result = place("results", key, "-o", "so-far.jsonl", "-e", "missing.jsonl")
        server.gate.set()
        assert ended(process)[0] == 0
    assert result.exit_code == 0, result.stderr
    assert "is not complete" in result.stderr
    got = ids(place.folder / "so-far.jsonl")
    assert got == ["r1", "r2", "r3"][: len(got)]
    assert got
    assert {line["error"]["code"] for line in read_jsonl(place.folder / "missing.jsonl")} == {"batch_incomplete"}
    assert not list(place.folder.glob("vllm-batch-*"))


def test_status_tells_of_one_and_of_all(place: Place) -> None:
    empty = place("status", "--json")
    assert (empty.exit_code, json.loads(empty.stdout)) == (0, [])
    assert "No batches yet" in place("status").stderr
    key = answered(place)
    one = json.loads(place("status", key, "--json").stdout)
    assert (one["key"], one["state"], one["lines"], one["succeeded"], one["failed"]) == (key, "completed", 3, 1, 2)
    assert [found["key"] for found in json.loads(place("status", "--json").stdout)] == [key]
    assert key in place("status").stdout
    assert "1, 2 error rows" in place("status", key).stdout


def test_validate_tells_what_is_wrong_and_registers_nothing(place: Place) -> None:
    place.write(BAD)
    place.write(chats(2), "good.jsonl")
    place.write("", "empty.jsonl")
    bad = place("validate", "in.jsonl", "--json")
    summary = json.loads(bad.stdout)
    assert (bad.exit_code, summary["valid"], summary["rejected"]) == (1, 1, 2)
    assert [(r["line"], r["error_code"]) for r in summary["first_rejects"]] == [
        (2, "invalid_json"),
        (3, "model_not_found"),
    ]
    assert place("validate", "good.jsonl").exit_code == 0
    assert place("validate", "empty.jsonl").exit_code == 2
    assert place("validate", "in.jsonl", "--model", "dry", "--option", "chunk_rows=0").exit_code == 2
    assert place.store.keys() == []


def test_models_are_listed_and_checked(place: Place) -> None:
    assert [model["name"] for model in json.loads(place("models", "list", "--json").stdout)] == ["dry-run"]
    assert "dry-run" in place("models", "list").stdout
    assert (place("models", "check").exit_code, place("models", "check").stdout) == (0, "dry-run: ok\n")
    place.models["gone"] = {"source": "./gone"}
    (place.folder / "models.yaml").write_text(yaml.safe_dump({"models": place.models}))
    checked = place("models", "check")
    assert checked.exit_code == 1
    assert "gone: no model at" in checked.stdout
    (place.folder / "small").mkdir()
    (place.folder / "small" / "config.json").write_text("{}")
    (place.folder / "small" / "model.safetensors").write_bytes(b"12345678")
    place.models["gone"] = {"source": "./small", "residency": "sleep"}
    (place.folder / "models.yaml").write_text(yaml.safe_dump({"models": place.models}))
    checked = place("models", "check")
    assert checked.exit_code == 0
    assert ("`residency: sleep`: vLLM's sleep mode needs a GPU" in checked.stdout) == (not installed_gpus())
    (place.folder / "models.yaml").unlink()
    assert place("models", "list").exit_code == 2


def test_submit_without_a_stack_leaves_the_request_and_cancel_takes_it_back(place: Place) -> None:
    place.write(chats(1))
    submitted = place("submit", "in.jsonl", "--json")
    assert (submitted.exit_code, json.loads(submitted.stdout)["state"]) == (0, "queued")
    assert "The stack is not running" in submitted.stderr
    (request,) = queue.pending(place.store)
    assert place("cancel", request.key).exit_code == 0
    assert list(queue.pending(place.store)) == []


# --- Removing -------------------------------------------------------------------------------------------------------


def test_rm_asks_first_and_refuses_a_batch_that_is_worked_on(place: Place) -> None:
    key = answered(place)
    assert place("rm", key, input="n\n").exit_code != 0
    with held_by_another_process(place.store.get(key)):
        assert place("rm", key, "--yes").exit_code == 2
    assert place.store.keys() == [key]
    assert place("rm", key, "--yes").exit_code == 0
    assert place.store.keys() == []


def test_prune_frees_space_and_keeps_spec_and_outputs_unless_told(place: Place) -> None:
    key = answered(place)
    batch = place.store.get(key)
    assert "Nothing to prune" in place("prune", "--older-than", "1h", "--yes").stderr
    assert place("prune", "--older-than", "0s", input="n\n").exit_code != 0
    assert batch.input_path.exists()
    assert place("prune", "--older-than", "0s", "--yes").exit_code == 0
    left = {path.name for path in batch.root.rglob("*")}
    assert not left & {"input.jsonl", "chunk-000000.parquet"}
    assert {"batch.json", "output.jsonl", "errors.jsonl"} <= left
    assert json.loads(place("status", key, "--json").stdout)["state"] == "completed"
    assert [json.loads(line)["custom_id"] for line in place("results", key).stdout.splitlines()] == ["a"]
    assert "Nothing to prune" in place("prune", "--older-than", "0s", "--yes").stderr
    assert place("prune", "--older-than", "0s", "--all", "--yes").exit_code == 0
    assert place.store.keys() == []


# --- Help -----------------------------------------------------------------------------------------------------------


def _commands(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    children = getattr(command, "commands", None)
    if children is None:
        yield path, command
        return
    for name, child in children.items():
        yield from _commands(child, (*path, name))


COMMANDS = dict(_commands(typer.main.get_command(app)))


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_help_of_every_command_has_an_example(path: tuple[str, ...]) -> None:
    shown = CliRunner().invoke(app, [*path, "--help"], env={"COLUMNS": "200", "NO_COLOR": "1"})
    assert shown.exit_code == 0
    name = {"start": "up", "stop": "down"}.get(path[0], path[0]) if len(path) == 1 else " ".join(path)
    assert "Example" in shown.stdout
    assert f"vllm-batch {name}" in click.unstyle(shown.stdout)


def test_every_command_of_the_contract_is_there() -> None:
    wanted = "up down start stop run submit status results retry cancel validate doctor rm prune"
    groups = {"models": ["list", "check", "pull"], "engine": ["status", "stop", "logs"]}
    grouped = {(group, name) for group, names in groups.items() for name in names}
    assert {(name,) for name in wanted.split()} | grouped <= set(COMMANDS)
