"""`vllm-batch webhooks`, and the example receiver that verifies what it is sent."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner, Result

from resources.settings import settings
from resources.targets import all_targets
from resources.webhooks.batch_events import completed
from resources.webhooks.deliveries import Deliveries
from tests.helpers import ROOT, Asked, chats
from tests.receiver import SECRET, Receiver, Say, closed_port
from vllm_batch_pipelines.cli.main import app

pytestmark = pytest.mark.e2e


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where the commands are called, with a data root."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VLLM_BATCH_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("OPS_SECRET", SECRET)
    settings.cache_clear()
    yield tmp_path
    settings.cache_clear()


def define(folder: Path, url: str, **fields: Any) -> None:
    target = {"url": url, "secret": "${OPS_SECRET}", "allow_insecure": True, "max_attempts": 1, "all_batches": True}
    (folder / "targets.yaml").write_text(yaml.safe_dump({"webhooks": {"ops": target | fields}}))


def dry_run_model(folder: Path) -> None:
    (folder / "models.yaml").write_text(yaml.safe_dump({"models": {"dry-run": {"engine": "null"}}}))


def command(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["webhooks", *arguments])


def dead_letter(folder: Path) -> str:
    """The id of an event that was not taken."""
    asked = Asked(folder, chats(2))
    asked.run()
    (lost,) = Deliveries(folder / "data", all_targets(settings()).webhooks).deliver(asked.batch, completed(asked.batch))
    return lost.event_id


def test_list_shows_targets_and_dead_letters_and_no_secret(folder: Path) -> None:
    with Receiver(otherwise=Say(404)) as receiver:
        define(folder, f"{receiver.url}/very-secret")
        event_id = dead_letter(folder)
    plain, document = command("list"), json.loads(command("list", "--json").stdout)
    assert plain.exit_code == 0
    assert "ops" in plain.stdout
    assert any(line.startswith(f"{event_id} batch.completed of ") for line in plain.stdout.splitlines())
    (target,) = document["targets"]
    assert (target["name"], target["place"], target["waiting"]) == ("ops", f"http://127.0.0.1:{receiver.port}/…", 0)
    (letter,) = document["dead_letters"]
    assert (letter["event_id"], letter["type"], letter["error"]) == (event_id, "batch.completed", "HTTP 404")
    for said in (plain.stdout, json.dumps(document)):
        assert "very-secret" not in said
        assert SECRET.removeprefix("whsec_") not in said


def test_redeliver_sends_the_same_bytes_and_exits_by_what_became_of_them(folder: Path) -> None:
    with Receiver(otherwise=Say(404)) as receiver:
        define(folder, receiver.url)
        event_id = dead_letter(folder)
        assert command("redeliver").exit_code == 1
        receiver.otherwise = Say(200)
        done = command("redeliver", event_id, "--json")
        assert done.exit_code == 0
        assert [one["delivered"] for one in json.loads(done.stdout)] == [True]
        assert command("redeliver").exit_code == 0
        unknown = command("redeliver", event_id)
        assert (unknown.exit_code, event_id in unknown.output) == (2, True)
    assert len({found.body for found in receiver.received}) == 1
    assert len(receiver.received) == 3
    assert json.loads(command("list", "--json").stdout)["dead_letters"] == []
    assert len(json.loads(command("list", "--all", "--json").stdout)["dead_letters"]) == 1


def test_test_tells_whether_a_target_is_reached(folder: Path) -> None:
    with Receiver() as receiver:
        define(folder, receiver.url)
        assert command("test", "ops").exit_code == 0
    assert receiver.types == ["webhook.test"]
    assert command("test", "ops").exit_code == 1
    assert "there are: ops" in command("test", "nobody").output


def test_a_secret_that_is_missing_is_told_before_anything_starts(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    define(folder, "https://example.org/")
    monkeypatch.delenv("OPS_SECRET")
    for arguments in (["webhooks", "list"], ["up"]):
        refused = CliRunner().invoke(app, arguments)
        assert refused.exit_code == 2
        assert "needs the environment variable OPS_SECRET" in " ".join(refused.output.split())


def test_enabling_webhooks_without_one_is_told(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_BATCH_ENABLE_WEBHOOKS", "")  # put back when the test ends: the flag sets it
    refused = CliRunner().invoke(app, ["up", "--enable-webhooks"])
    assert refused.exit_code == 2
    assert "no webhook is defined" in refused.output


def test_run_says_what_of_its_options_only_happens_on_the_stack(folder: Path) -> None:
    table = f"sqlite:///{folder}/rows.db"
    targets = {
        "webhooks": {"ops": {"url": "https://example.org/", "secret": "${OPS_SECRET}"}},
        "exports": {"lake": {"url": "s3://bucket/x"}, "rows": {"url": table, "table": "results"}},
        "label_studio": {"review": {"project": "Review"}},
    }
    (folder / "targets.yaml").write_text(yaml.safe_dump(targets))
    dry_run_model(folder)
    (folder / "in.jsonl").write_text(chats(1))
    options = ["webhook=ops", "exports=[lake, rows]", "label_studio=review"]
    done = CliRunner().invoke(app, ["run", "in.jsonl", *(word for one in options for word in ("--option", one))])
    said = " ".join(done.output.split())
    assert done.exit_code == 0, said
    for what in ("webhook (ops)", "exports (lake, rows)", "label_studio (review)"):
        assert f"{what} only happens on the stack: `vllm-batch up`" in said
    assert not (folder / "rows.db").exists()


def test_run_refuses_a_sidecar_that_names_a_target_that_is_not_there(folder: Path) -> None:
    define(folder, "http://127.0.0.1:9/")
    dry_run_model(folder)
    (folder / "in.jsonl").write_text(chats(1))
    (folder / "in.yaml").write_text("webhook: opz\n")
    refused = CliRunner().invoke(app, ["run", "in.jsonl"])
    assert refused.exit_code == 2
    assert "no target `opz` in `webhooks` of the targets file; did you mean `ops`?" in " ".join(refused.output.split())


def test_every_command_has_an_example() -> None:
    for name in ("list", "redeliver", "test"):
        assert f"vllm-batch webhooks {name}" in command(name, "--help").output


# --- The example ----------------------------------------------------------------------------------------------------


def test_the_example_receiver_verifies_and_drops_repeats(folder: Path) -> None:
    port = closed_port()
    receiver = subprocess.Popen(
        [sys.executable, str(ROOT / "examples" / "webhook_receiver.py"), str(port)],
        env=os.environ | {"OPS_SECRET": SECRET},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert receiver.stdout is not None
        assert receiver.stdout.readline() == f"listening on http://127.0.0.1:{port}/\n"
        define(folder, f"http://127.0.0.1:{port}/")
        assert command("test", "ops").exit_code == 0
        assert receiver.stdout.readline().startswith("webhook.test ")

        asked = Asked(folder, chats(2))
        asked.run()
        made = Deliveries(folder / "data", all_targets(settings()).webhooks)
        for name in ("first", "second"):
            made.announce(completed(asked.batch), made.hearing("batch.completed"))
            assert [one.delivered for one in made.deliver_waiting()] == [True], name
            for path in asked.batch.webhooks_dir.glob("msg_*"):
                path.unlink()  # as after a crash before it was noted: it is sent again
        define(folder, f"http://127.0.0.1:{port}/", secret="whsec_" + "A" * 32)
        assert command("test", "ops").exit_code == 1
        assert receiver.stdout.readline() == f"batch.completed {asked.batch.key}: 2 of 2 answered\n"
        assert receiver.stdout.readline() == "refused: No matching signature found\n"
    finally:
        receiver.kill()
        receiver.communicate()
