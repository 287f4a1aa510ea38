"""`vllm-batch up --with-curation` for real: from a dropped file to a dataset by nobody's hand but the reviewer's."""

import os
import shutil
import signal
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from dagster import AssetKey

from resources.label_studio import local_server
from tests.e2e.test_stack import Stack
from tests.helpers import AnsweringServer, chats, read_jsonl, wait_until
from tests.receiver import closed_port
from tests.reviewing import Reviewing
from vllm_batch_pipelines.stack import instance_env

pytestmark = [pytest.mark.e2e, pytest.mark.label_studio, pytest.mark.timeout(900)]


@pytest.fixture
def stack(monkeypatch: pytest.MonkeyPatch) -> Iterator[Stack]:
    local_server.install()
    monkeypatch.setenv("VLLM_BATCH_LABEL_STUDIO_PORT", str(closed_port()))
    with tempfile.TemporaryDirectory(prefix="vb-") as made, AnsweringServer() as server:
        stack = Stack(Path(made), server, options=("--with-curation", "--enable-monitoring"))
        stack.file("models.yaml", yaml.safe_dump({"models": {"dry-run": {"engine": "null"}}}))
        try:
            stack.up()
            yield stack
        finally:
            stack.call("down")
            stack.kill_everything()
            for left in stack.folder.parent.glob(f"{stack.folder.name}*-*"):
                shutil.rmtree(left)


def reviewing_of(stack: Stack) -> Reviewing:
    """The reviewer's side of the Label Studio that the stack has started."""
    account = local_server.Account.of(local_server.data_folder(stack.settings))
    url = local_server.address(int(os.environ["VLLM_BATCH_LABEL_STUDIO_PORT"]))
    found = Reviewing(local_server.Server(url, account), stack.folder)
    found.title = local_server.PROJECT
    return found


def is_listening(url: str) -> bool:
    host, port = url.removeprefix("http://").split(":")
    with socket.socket() as probe:
        return probe.connect_ex((host, int(port))) == 0


def command_line(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError:  # it has ended
        return b""


def test_a_dropped_file_is_reviewed_and_becomes_a_dataset(stack: Stack) -> None:
    reviewing = reviewing_of(stack)
    account = reviewing.server.account
    said = f"Label Studio: {reviewing.server.url}, user {account.user}, password in "
    wait_until(lambda: said in stack.log.read_text())
    (stack.settings.inbox_dir / "a.jsonl").write_text(chats(2))
    tasks = wait_until(lambda: reviewing.has_project() and len(found := reviewing.tasks()) == 2 and found, 200)
    assert tasks
    reviewing.annotate(tasks[0]["id"], final_response="mended", gold_star=True)
    latest = stack.settings.data_root / "datasets" / "default" / "chat" / "latest"
    wait_until((latest / "card.json").exists, 200)
    (line,) = read_jsonl(latest / "train.jsonl") + read_jsonl(latest / "validation.jsonl")
    assert line["messages"][-1] == {"role": "assistant", "content": "mended"}

    with instance_env(stack.settings) as instance:
        (observed,) = instance.fetch_observations(AssetKey("machine"), 1).records
    assert observed.asset_observation is not None
    assert {"disk_free_gb", "runs_in_progress"} <= observed.asset_observation.metadata.keys()

    secrets = (account.password.encode(), account.token.encode())
    commands = [command_line(file) for file in Path("/proc").glob("[0-9]*/cmdline")]
    logs = [file.read_bytes() for file in [stack.log, *(stack.settings.data_root / "logs").rglob("*.log")]]
    assert not any(secret in text for secret in secrets for text in [*commands, *logs])

    assert stack.process is not None
    os.kill(stack.process.pid, signal.SIGKILL)
    stack.process.wait()
    wait_until(lambda: not is_listening(reviewing.server.url), 30)
    stack.up()
    assert len(reviewing.tasks()) == 2
    assert stack.call("down")[0] == 0
    assert not is_listening(reviewing.server.url)
