"""Webhooks of a running stack: `vllm-batch up`, its daemon and its runs, at a real receiver."""

import itertools
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import pytest
import yaml
from standardwebhooks import Webhook

from tests.e2e.test_stack import Stack
from tests.helpers import AnsweringServer, chats, wait_until
from tests.receiver import SECRET, Receiver, Say

EVERY_SECONDS = 10
pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1800)]


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with Receiver() as made:
        yield made


@pytest.fixture
def watching() -> Iterator[Receiver]:
    """One that asks for progress, and for nothing else."""
    with Receiver() as made:
        yield made


@pytest.fixture
def stack(receiver: Receiver, watching: Receiver) -> Iterator[Stack]:
    with tempfile.TemporaryDirectory(prefix="vb-") as made, AnsweringServer() as server:
        stack = Stack(Path(made), server)
        server.hold = lambda text: text in stack.held
        models = {
            "dry-run": {"engine": "null"},
            "held": {"engine": "openai", "base_url": server.url, "concurrency": 4},
        }
        stack.file("models.yaml", yaml.safe_dump({"models": models}))
        target = {"secret": SECRET, "allow_insecure": True, "all_batches": True, "max_attempts": 2}
        webhooks = {
            "ops": target | {"url": receiver.url},
            "watch": target | {"url": watching.url, "events": ["batch.progress"], "progress_seconds": EVERY_SECONDS},
        }
        stack.file("targets.yaml", yaml.safe_dump({"webhooks": webhooks}))
        try:
            stack.up()
            yield stack
            server.gate.set()
            assert stack.call("down")[0] == 0
        finally:
            server.gate.set()
            stack.kill_everything()
            for left in stack.folder.parent.glob(f"{stack.folder.name}*-*"):
                shutil.rmtree(left)


def test_thirty_batches_at_once_one_that_fails_and_one_that_is_cancelled_are_each_told_once(
    stack: Stack, receiver: Receiver, watching: Receiver
) -> None:
    """And how far the one is that goes on meanwhile, to who asks for that."""
    receiver.script = [Say(503)]  # the first one is tried again
    held = stack.begin_held_batch("held")
    inbox = stack.settings.inbox_dir
    for number in range(30):
        (inbox / f"b{number}.jsonl").write_text(chats(3, f"text {number}"))
    (inbox / "broken.jsonl").write_text("no json\n")
    wait_until(lambda: len(watching.received) >= 2, 300)
    code, _, errors = stack.call("cancel", held.key)
    assert code == 0, errors

    def told() -> Counter[tuple[str, str]]:
        events = {received.id: received.content for received in receiver.received}
        return Counter((content["type"], content["data"]["id"]) for content in events.values())

    wait_until(lambda: len(told()) >= 32, 1200)
    by_type = Counter(event for event, _ in told())
    assert by_type == {"batch.completed": 30, "batch.failed": 1, "batch.cancelled": 1}
    assert ("batch.cancelled", held.key) in told()
    repeats = [key for key, count in Counter(receiver.ids).items() if count > 1]
    assert len(repeats) <= 1
    assert sorted(set(told().values())) == [1]

    events = [Webhook(SECRET).verify(one.body, one.headers) for one in watching.received]
    assert {(event["type"], event["data"]["id"]) for event in events} == {("batch.progress", held.key)}
    assert {(event["data"]["status"], event["data"]["progress"]["percent"]) for event in events} == {
        ("in_progress", 33.3)
    }
    moments = sorted(datetime.fromisoformat(event["timestamp"]) for event in events)
    apart = [(after - before).total_seconds() for before, after in itertools.pairwise(moments)]
    assert min(apart) >= EVERY_SECONDS - 0.1  # by two clocks


def test_a_delivery_that_a_stop_of_the_stack_cuts_off_is_made_by_the_next_one(stack: Stack, receiver: Receiver) -> None:
    receiver.otherwise = Say(waits=True)
    (stack.settings.inbox_dir / "a.jsonl").write_text(chats(3))
    wait_until(lambda: receiver.received, 200)
    assert stack.call("down")[0] == 0
    receiver.otherwise = Say(200)
    receiver.gate.set()
    stack.up()
    wait_until(lambda: len(receiver.received) > 1, 200)
    assert receiver.types == ["batch.completed"] * 2
    assert len(set(receiver.ids)) == 1
