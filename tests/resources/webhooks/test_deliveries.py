"""At least once, with the same id: what is sent, noted, kept as a dead letter and sent again."""

import base64
import os
import signal
import stat
import subprocess
import sys
import threading
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from standardwebhooks import Webhook, WebhookVerificationError

from resources.answering import Mode
from resources.batch_format.options import parse_options
from resources.errors import BatchLocked, DeliveryFailed, OptionsError
from resources.progress import Progress
from resources.webhooks import records
from resources.webhooks.batch_events import completed, failed, in_progress
from resources.webhooks.deliveries import Deliveries
from resources.webhooks.event import Event, event_id
from resources.webhooks.sender import Sender
from resources.webhooks.target import WebhookTarget
from tests.helpers import ROOT, Asked, chats, wait_until
from tests.receiver import SECRET, Receiver, Say, closed_port

NOW = datetime(2026, 11, 21, tzinfo=UTC)


async def at_once(_: float) -> None:
    pass


def target(url: str, name: str = "ops", **fields: Any) -> WebhookTarget:
    given = {"name": name, "url": url, "secret": SECRET, "allow_insecure": True, "all_batches": True}
    return WebhookTarget(**given | fields)


def deliveries(folder: Path, *targets: WebhookTarget) -> Deliveries:
    return Deliveries(folder / "data", {one.name: one for one in targets}, lambda: Sender(pause=at_once))


@pytest.fixture
def asked(tmp_path: Path) -> Asked:
    made = Asked(tmp_path, chats(2))
    made.run()
    return made


def star(number: int) -> Event:
    return Event(event_id("gold_star.created", number), "gold_star.created", NOW, {"line": number})


# --- Who hears ------------------------------------------------------------------------------------------------------


def test_a_batch_is_heard_by_the_target_that_it_names_and_by_those_for_all(tmp_path: Path) -> None:
    named = target("http://a/", "named", all_batches=False)
    other = target("http://b/", "other", all_batches=False)
    all_of_them = target("http://c/", "every")
    stars = target("http://d/", "stars", events=["gold_star.created"])
    made = deliveries(tmp_path, named, other, all_of_them, stars)

    def heard(event: str, **options: Any) -> list[str]:
        return [one.name for one in made.hearing(event, parse_options(options, "test"))]

    assert heard("batch.completed") == ["every"]
    assert heard("batch.completed", webhook="named") == ["named", "every"]
    assert heard("batch.progress", webhook="named") == []
    assert [one.name for one in made.hearing("gold_star.created")] == ["stars"]


def test_a_batch_whose_target_is_gone_says_so(tmp_path: Path) -> None:
    with pytest.raises(DeliveryFailed, match="`gone`, which is not defined any more"):
        deliveries(tmp_path).hearing("batch.completed", parse_options({"webhook": "gone"}, "test"))


# --- Once, and at least once ----------------------------------------------------------------------------------------


def test_what_was_taken_is_not_sent_again_and_a_retry_is_news(asked: Asked, tmp_path: Path) -> None:
    with Receiver() as receiver:
        made = deliveries(tmp_path, target(receiver.url))
        (first,) = made.deliver(asked.batch, completed(asked.batch))
        assert (first.delivered, first.before, first.attempts, first.status) == (True, False, 1, 200)
        (again,) = made.deliver(asked.batch, completed(asked.batch))
        assert (again.delivered, again.before) == (True, True)
        asked.run(mode=Mode.RESTART)
        (news,) = made.deliver(asked.batch, completed(asked.batch))
    assert receiver.ids == [first.event_id, news.event_id]
    assert first.event_id != news.event_id


def test_one_target_that_fails_or_hangs_keeps_no_other_from_its_event(asked: Asked, tmp_path: Path) -> None:
    with Receiver() as good, Receiver(otherwise=Say(waits=True)) as slow, Receiver(otherwise=Say(404)) as bad:
        hanging = target(slow.url, "slow", max_attempts=1).model_copy(update={"timeout": 0.3})
        made = deliveries(tmp_path, hanging, target(bad.url, "bad"), target(good.url, "good"))
        done = {one.target: one for one in made.deliver(asked.batch, completed(asked.batch))}
        assert [done[name].delivered for name in ("slow", "bad", "good")] == [False, False, True]
        again = {one.target: one.before for one in made.deliver(asked.batch, completed(asked.batch))}
    assert again == {"slow": False, "bad": False, "good": True}
    assert len(good.received) == 1
    assert len(bad.received) == 2


def test_a_receiver_whose_reply_is_lost_can_drop_the_repeat(asked: Asked, tmp_path: Path) -> None:
    with Receiver([Say(status=None)]) as receiver:
        (done,) = deliveries(tmp_path, target(receiver.url)).deliver(asked.batch, completed(asked.batch))
    assert done.delivered
    assert Counter(receiver.ids) == {done.event_id: 2}


_KILLED = """
import sys
from pathlib import Path
from resources.batch_store.store import BatchStore
from resources.webhooks.batch_events import completed
from resources.webhooks.deliveries import Deliveries
from resources.webhooks.target import WebhookTarget
data, key, url, secret = sys.argv[1:]
target = WebhookTarget(name="ops", url=url, secret=secret, allow_insecure=True, all_batches=True)
batch = BatchStore(Path(data)).get(key)
Deliveries(Path(data), {"ops": target}).deliver(batch, completed(batch))
"""


def test_killed_between_send_and_record_the_next_run_sends_it_with_the_same_id(asked: Asked, tmp_path: Path) -> None:
    with Receiver() as receiver:
        command = [sys.executable, "-c", _KILLED, str(tmp_path / "data"), asked.batch.key, receiver.url, SECRET]
        killed: list[int] = []

        def kill_the_sender(_: object) -> None:
            if not killed:
                killed.append(process.pid)
                os.kill(process.pid, signal.SIGKILL)

        receiver.on_request = kill_the_sender
        process = subprocess.Popen(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)})
        assert process.wait(60) == -signal.SIGKILL
        assert not list(asked.batch.webhooks_dir.glob("msg_*"))
        (done,) = deliveries(tmp_path, target(receiver.url)).deliver(asked.batch, completed(asked.batch))
    assert done.delivered
    assert not done.before
    assert receiver.ids == [done.event_id] * 2
    assert receiver.received[0].body == receiver.received[1].body


def test_two_that_send_for_a_batch_at_once_do_not_send_twice(asked: Asked, tmp_path: Path) -> None:
    made = deliveries(tmp_path, target("http://127.0.0.1:1/"))
    with records.sending(asked.batch), pytest.raises(BatchLocked):
        made.deliver(asked.batch, completed(asked.batch))


# --- Dead letters ---------------------------------------------------------------------------------------------------


def test_what_is_used_up_is_a_dead_letter_and_goes_out_again_as_it_was(asked: Asked, tmp_path: Path) -> None:
    with Receiver(otherwise=Say(500, body=b"down")) as receiver:
        made = deliveries(tmp_path, target(receiver.url, max_attempts=3))
        (lost,) = made.deliver(asked.batch, completed(asked.batch))
        assert (lost.delivered, lost.attempts, lost.status, lost.error) == (False, 3, 500, "HTTP 500: down")
        (letter,) = made.open_letters()
        assert [attempt["status"] for attempt in letter.attempts] == [500] * 3
        assert all(attempt["at"] and attempt["seconds"] >= 0 for attempt in letter.attempts)
        assert letter.body.encode() == receiver.received[0].body

        (still,) = made.redeliver(made.open_letters())
        assert not still.delivered
        receiver.otherwise = Say(200)
        (taken,) = made.redeliver(made.open_letters([lost.event_id]))
        assert taken.delivered
        assert made.open_letters() == []
        (marked,) = made.letters.all()
        assert marked.redelivered_at is not None
        assert [attempt["status"] for attempt in marked.attempts] == [500] * 6 + [200]
        (later,) = made.deliver(asked.batch, completed(asked.batch))
        assert later.before

    assert {received.id for received in receiver.received} == {lost.event_id}
    assert {received.body for received in receiver.received} == {letter.body.encode()}
    last = receiver.received[-1]
    Webhook(SECRET).verify(last.body, last.headers)


def test_two_that_send_dead_letters_again_at_once_do_not_send_twice(asked: Asked, tmp_path: Path) -> None:
    with Receiver([404]) as receiver:
        made = deliveries(tmp_path, target(receiver.url))
        made.deliver(asked.batch, completed(asked.batch))
        letters = made.open_letters()
        with made.letters.sending_again(), pytest.raises(BatchLocked, match="Another process sends dead letters"):
            deliveries(tmp_path, target(receiver.url)).redeliver(letters)
        assert len(made.redeliver(letters)) == 1
        assert made.redeliver(letters) == []  # what somebody else has sent since they were listed
    assert len(receiver.received) == 2


def test_what_was_taken_meanwhile_is_not_marked_as_lost_by_one_that_failed(asked: Asked, tmp_path: Path) -> None:
    """A command sends a letter again while the asset is materialized: the receiver takes the one and not the other."""
    with Receiver([404, Say(500, waits=True)]) as receiver:
        made = deliveries(tmp_path, target(receiver.url, max_attempts=1))
        made.deliver(asked.batch, completed(asked.batch))
        command = threading.Thread(target=lambda: made.redeliver(made.open_letters()))
        command.start()
        wait_until(lambda: len(receiver.received) == 2)
        assert [one.delivered for one in made.deliver(asked.batch, completed(asked.batch))] == [True]
        receiver.gate.set()
        command.join(30)
        assert made.open_letters() == []
        assert [one.before for one in made.deliver(asked.batch, completed(asked.batch))] == [True]


def test_a_dead_letter_that_is_delivered_by_a_new_run_is_marked(asked: Asked, tmp_path: Path) -> None:
    with Receiver([404]) as receiver:
        made = deliveries(tmp_path, target(receiver.url))
        made.deliver(asked.batch, completed(asked.batch))
        made.deliver(asked.batch, completed(asked.batch))
        assert [letter.is_open for letter in made.letters.all()] == [False]


def test_a_secret_that_was_replaced_signs_what_is_sent_again(asked: Asked, tmp_path: Path) -> None:
    new = "whsec_" + base64.b64encode(b"n" * 32).decode()
    with Receiver([404]) as receiver:
        deliveries(tmp_path, target(receiver.url)).deliver(asked.batch, completed(asked.batch))
        made = deliveries(tmp_path, target(receiver.url, secret=new))
        made.redeliver(made.open_letters())
    first, second = receiver.received
    Webhook(SECRET).verify(first.body, first.headers)
    Webhook(new).verify(second.body, second.headers)
    with pytest.raises(WebhookVerificationError):
        Webhook(SECRET).verify(second.body, second.headers)


def test_a_payload_that_cannot_be_made_is_a_dead_letter_that_is_made_anew(asked: Asked, tmp_path: Path) -> None:
    with Receiver() as receiver:
        broken = deliveries(tmp_path, target(receiver.url, template="{{ data.nothing }}"))
        (lost,) = broken.deliver(asked.batch, completed(asked.batch))
        assert (lost.delivered, lost.attempts) == (False, 0)
        assert "template cannot be filled" in (lost.error or "")
        assert receiver.received == []
        mended = deliveries(tmp_path, target(receiver.url))
        (taken,) = mended.redeliver(mended.open_letters())
    assert taken.delivered
    assert receiver.received[0].content["data"]["id"] == asked.batch.key


def test_an_id_without_a_letter_is_told(tmp_path: Path) -> None:
    with pytest.raises(OptionsError, match="msg_nobody"):
        deliveries(tmp_path).open_letters(["msg_nobody"])


def test_no_file_and_no_log_holds_a_url_or_a_secret(
    asked: Asked, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    with Receiver() as receiver:
        url = f"{receiver.url}/T0/very-secret"
        receiver.otherwise = Say(400, body=f"{url} {SECRET}".encode())
        made = deliveries(tmp_path, target(url), target(f"http://127.0.0.1:{closed_port()}/very-secret", "down"))
        made.announce(failed(asked.batch, "run", NOW), made.hearing("batch.failed"))
        done = made.deliver(asked.batch, completed(asked.batch)) + made.deliver_waiting()
    assert len(done) == 4
    written = [path for path in (tmp_path / "data").rglob("*") if path.is_file()]
    assert len([path for path in written if path.parent.name == "dead"]) == 4
    for secret in ("very-secret", SECRET.removeprefix("whsec_")):
        assert secret not in f"{done}{caplog.text}"
        assert [path for path in written if secret.encode() in path.read_bytes()] == []
    assert stat.S_IMODE((tmp_path / "data" / "webhooks" / "dead").stat().st_mode) == 0o700


# --- The outbox -----------------------------------------------------------------------------------------------------


def test_what_waits_is_sent_once_and_leaves(asked: Asked, tmp_path: Path) -> None:
    with Receiver() as receiver:
        made = deliveries(tmp_path, target(receiver.url))
        event = failed(asked.batch, "run-1", NOW)
        made.announce(event, made.hearing("batch.failed"))
        made.announce(event, made.hearing("batch.failed"))
        assert made.outbox.holds(event.id, "ops")
        assert [one.delivered for one in made.deliver_waiting()] == [True]
        assert made.deliver_waiting() == []
        assert records.is_delivered(asked.batch, event.id, "ops")
    assert receiver.types == ["batch.failed"]


def test_a_receiver_that_hangs_keeps_back_only_what_is_for_itself(tmp_path: Path) -> None:
    """While one run hangs at `slow`, another takes what is new for the others."""
    with Receiver(otherwise=Say(waits=True)) as slow, Receiver() as quick:
        both = (target(slow.url, "slow", events=["gold_star.created"]), target(quick.url, "quick"))
        made = deliveries(tmp_path, *both)
        made.announce(star(1), [both[0]])
        hanging = threading.Thread(target=made.deliver_waiting)
        hanging.start()
        wait_until(lambda: slow.received)
        made.announce(star(2), both)
        assert made.outbox.is_being_emptied("slow")
        assert [one.target for one in deliveries(tmp_path, *both).deliver_waiting()] == ["quick"]
        slow.gate.set()
        hanging.join(30)
    assert not hanging.is_alive()
    assert len(slow.received) == 2  # what came meanwhile is taken before the box is let go
    assert made.outbox.targets() == []


def test_a_thousand_deliveries_in_a_burst_all_arrive_once(tmp_path: Path) -> None:
    with Receiver() as receiver:
        to = target(receiver.url, events=["gold_star.created"])
        made = deliveries(tmp_path, to)
        for number in range(1000):
            made.announce(star(number), [to])
        done = made.deliver_waiting()
    assert sum(one.delivered for one in done) == 1000
    assert Counter(receiver.ids) == dict.fromkeys((star(number).id for number in range(1000)), 1)
    assert made.outbox.targets() == []


def test_of_progress_only_the_latest_waits_and_it_is_tried_once_and_never_a_dead_letter(
    asked: Asked, tmp_path: Path
) -> None:
    with Receiver(otherwise=Say(500)) as receiver:
        to = target(receiver.url, events=["batch.progress"])
        made = deliveries(tmp_path, to)
        for done in (1, 2, 3):
            made.announce(in_progress(asked.batch, "run", Progress("answer", done, 10), NOW), [to])
        assert [one.delivered for one in made.deliver_waiting()] == [False]
    assert [received.content["data"]["progress"]["percent"] for received in receiver.received] == [30.0]
    assert made.letters.all() == []
    assert made.outbox.targets() == []


def test_what_waits_for_a_target_that_is_gone_can_be_sent_when_it_is_back(asked: Asked, tmp_path: Path) -> None:
    with Receiver() as receiver:
        to = target(receiver.url)
        deliveries(tmp_path, to).announce(failed(asked.batch, "run", NOW), [to])
        (lost,) = deliveries(tmp_path).deliver_waiting()
        assert lost.error == "the target is not defined any more"
        made = deliveries(tmp_path, to)
        (taken,) = made.redeliver(made.open_letters())
    assert taken.delivered
    assert receiver.types == ["batch.failed"]


def test_a_file_that_nobody_can_read_stops_no_other(tmp_path: Path) -> None:
    with Receiver() as receiver:
        to = target(receiver.url, events=["gold_star.created"])
        made = deliveries(tmp_path, to)
        made.announce(star(1), [to])
        (tmp_path / "data/webhooks/outbox/ops/msg_0.json").write_text("{")
        assert [one.delivered for one in made.deliver_waiting()] == [True]
    assert (tmp_path / "data/webhooks/outbox/ops/msg_0.damaged").exists()


def test_events_of_a_batch_that_was_removed_are_sent_and_leave_no_folder(asked: Asked, tmp_path: Path) -> None:
    with Receiver() as receiver:
        made = deliveries(tmp_path, target(receiver.url))
        made.announce(failed(asked.batch, "run", NOW), made.hearing("batch.failed"))
        asked.store.remove(asked.batch.key)
        assert [one.delivered for one in made.deliver_waiting()] == [True]
    assert not asked.batch.root.exists()


def test_a_test_event_is_sent_once(tmp_path: Path) -> None:
    with Receiver(otherwise=Say(500)) as receiver:
        made = deliveries(tmp_path, target(receiver.url))
        assert not made.test("ops").delivered
        with pytest.raises(OptionsError, match="there are: ops"):
            made.test("opps")
    assert receiver.types == ["webhook.test"]
    assert made.letters.all() == []
