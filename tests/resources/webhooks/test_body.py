"""What a target gets to read: the payload of the contract, with result lines, by a template, or as a message."""

import json
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from standardwebhooks import Webhook

from resources.answering import Mode
from resources.errors import EngineDown
from resources.progress import Progress
from resources.webhooks.batch_events import cancelled, completed, failed, in_progress
from resources.webhooks.body import DISCORD_CHARACTERS, SLACK_CHARACTERS, PayloadRefused, body_of
from resources.webhooks.deliveries import Deliveries
from resources.webhooks.event import Event
from resources.webhooks.target import WebhookTarget
from tests.helpers import Asked, chat, chats, ok, refusal
from tests.receiver import SECRET, Receiver
from tests.reviewing import star

NOW = datetime(2026, 11, 21, 10, 30, 0, 123456, tzinfo=UTC)


def target(**fields: Any) -> WebhookTarget:
    return WebhookTarget(**{"name": "ops", "url": "https://example.org/x", "secret": SECRET} | fields)


def payload(event: Event, **fields: Any) -> Any:
    return json.loads(body_of(event, target(**fields)))


@pytest.fixture
def asked(tmp_path: Path) -> Asked:
    """Three good lines, one that the engine refuses, one that is no request."""
    text = chats(3) + chat("refused", "bad") + "no json\n"
    made = Asked(tmp_path, text, {"metadata": {"team": "support <!channel>"}, "webhook": None})
    made.run(lambda request: refusal(400) if request.line == 4 else ok(request))
    return made


def test_the_payload_is_that_of_the_contract(asked: Asked) -> None:
    event = completed(asked.batch)
    found = payload(event)
    assert list(found) == ["type", "timestamp", "data"]
    assert found["type"] == "batch.completed"
    assert found["timestamp"].endswith("Z")
    assert found["data"].pop("created_at") == int(asked.batch.spec.registered_at.timestamp())
    assert found["data"].pop("completed_at") == int(event.at.timestamp())
    assert found["data"] == {
        "id": asked.batch.key,
        "object": "batch",
        "endpoint": "/v1/chat/completions",
        "status": "completed",
        "request_counts": {"total": 5, "completed": 3, "failed": 2},
        "usage": {"prompt_tokens": 9, "completion_tokens": 6},
        "metadata": {"team": "support <!channel>"},
        "model": ["dry-run"],
        "output_file": str(asked.batch.output_dir / "output.jsonl"),
        "error_file": str(asked.batch.output_dir / "errors.jsonl"),
        "error": None,
    }


def test_the_same_results_are_the_same_event_with_the_same_bytes_and_a_retry_is_another(asked: Asked) -> None:
    first = completed(asked.batch)
    asked.run()
    assert completed(asked.batch) == first
    assert body_of(first, target()) == body_of(completed(asked.batch), target())
    asked.run(mode=Mode.RETRY_FAILED)
    retried = completed(asked.batch)
    assert retried.id != first.id
    assert retried.data["request_counts"] == {"total": 5, "completed": 4, "failed": 1}


def test_other_endings_say_how_far_it_came_and_why(tmp_path: Path) -> None:
    """By what the run itself left; also within the second in which it writes nothing more."""
    asked, seen = Asked(tmp_path, chats(4) + chat("refused", "bad")), []

    def breaks(now: Progress) -> None:
        if now.phase == "answer" and now.done:
            seen.append(now)
            raise EngineDown("it is gone")

    with pytest.raises(EngineDown):
        asked.run(lambda request: refusal(400) if request.line == 5 else ok(request), progress=breaks)
    came = seen[-1]
    found = payload(failed(asked.batch, "run-1", NOW))
    assert (found["type"], found["timestamp"]) == ("batch.failed", "2026-11-21T10:30:00.123Z")
    assert found["data"]["status"] == "failed"
    assert found["data"]["request_counts"] == {
        "total": 5,
        "completed": came.done - came.failed,
        "failed": came.failed,
    }
    assert found["data"]["error"] == {"code": "EngineDown", "message": "it is gone"}
    assert found["data"]["completed_at"] is None
    stopped = payload(cancelled(asked.batch, "run-1", NOW))
    assert (stopped["type"], stopped["data"]["status"], stopped["data"]["error"]) == (
        "batch.cancelled",
        "cancelled",
        None,
    )
    ids = {failed(asked.batch, run, NOW).id for run in ("run-1", "run-2")} | {cancelled(asked.batch, "run-1", NOW).id}
    assert len(ids) == 3


def test_lines_that_were_only_checked_do_not_count_as_answered(asked: Asked) -> None:
    with asked.batch.lock("a test"):
        asked.batch.write_run_record({"progress": {"phase": "check", "done": 4, "total": 5}})
    counts = payload(failed(asked.batch, "run-1", NOW))["data"]["request_counts"]
    assert counts == {"total": 5, "completed": 0, "failed": 0}


def test_progress_says_how_far_it_is(asked: Asked) -> None:
    found = payload(in_progress(asked.batch, "run-1", Progress("answer", 50, 200, 1, 40.0, 5.0), NOW))
    assert found["data"]["status"] == "in_progress"
    assert found["data"]["request_counts"] == {"total": 200, "completed": 49, "failed": 1}
    assert found["data"]["progress"] == {
        "phase": "answer",
        "percent": 25.0,
        "tokens_per_second": 40.0,
        "eta_seconds": 30,
    }


# --- Result lines ---------------------------------------------------------------------------------------------------


def test_result_lines_come_where_they_are_asked_for(asked: Asked) -> None:
    event = completed(asked.batch)
    assert {"errors", "results"}.isdisjoint(payload(event)["data"])
    errors = payload(event, include_results="errors")["data"]
    assert [line["custom_id"] for line in errors["errors"]] == ["refused", None] or len(errors["errors"]) == 2
    assert "results" not in errors
    everything = payload(event, include_results="all")["data"]
    assert [line["custom_id"] for line in everything["results"]] == ["r1", "r2", "r3"]
    assert everything["results"][0]["response"]["body"]["choices"][0]["message"]["content"] == "fine"
    assert everything["results_truncated"] is False


def test_lines_over_the_limit_are_left_out_and_that_is_said(tmp_path: Path) -> None:
    asked = Asked(tmp_path, chats(40))
    asked.run(lambda request: ok(request, "long " * 300))
    limit = 16 * 1024
    body = body_of(completed(asked.batch), target(include_results="all", max_payload_bytes=limit))
    data = json.loads(body)["data"]
    assert limit - 2500 < len(body) <= limit
    assert data["results_truncated"] is True
    assert [line["custom_id"] for line in data["results"]] == [f"r{n}" for n in range(1, len(data["results"]) + 1)]
    assert data["request_counts"]["total"] == 40


def test_a_single_line_over_the_limit_is_left_out_and_never_read_whole(tmp_path: Path) -> None:
    asked = Asked(tmp_path, chats(2))
    asked.run(lambda request: ok(request, "x" * (100_000 if request.line == 1 else 1)))
    data = payload(completed(asked.batch), include_results="all", max_payload_bytes=16 * 1024)["data"]
    assert (data["results"], data["results_truncated"]) == ([], True)


def test_a_payload_over_the_limit_without_any_line_is_refused(tmp_path: Path) -> None:
    asked = Asked(tmp_path, chats(1), {"metadata": {"note": "x" * 20_000}})
    asked.run()
    with pytest.raises(PayloadRefused, match="over the limit of 16384"):
        body_of(completed(asked.batch), target(max_payload_bytes=16 * 1024))


# --- Templates ------------------------------------------------------------------------------------------------------


def test_a_template_makes_the_body(asked: Asked) -> None:
    template = '{"key": {{ data.id | tojson }}, "bad": {{ data.request_counts.failed }}, "event": {{ id | tojson }}}'
    event = completed(asked.batch)
    assert payload(event, template=template) == {"key": asked.batch.key, "bad": 2, "event": event.id}


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ data.nothing }}", "has no attribute 'nothing'"),
        ("{ not json", "makes no JSON"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
        ("{{ data.update({'id': 'x'}) }}", "unsafe"),
        ("{{ '{0.__class__.__init__.__globals__}'.format(data) }}", "unsafe"),
        ("{{ data | attr('__class__') }}", "unsafe|has no attribute|is undefined"),
        ("{{ [data] | map(attribute='__class__') | first }}", "unsafe|has no attribute|is undefined"),
        ("{{ cycler.__init__.__globals__.os.environ }}", "unsafe"),
        ("{{ self.__init__ }}", "unsafe|has no attribute"),
        ("{% set data.id = 'x' %}", "cannot be filled"),
        ("{% include '/etc/passwd' %}", "cannot be filled"),
        ("{{ range(10**9) | list }}", "cannot be filled"),
    ],
)
def test_a_template_reaches_nothing_but_the_event(asked: Asked, template: str, message: str) -> None:
    with pytest.raises(PayloadRefused, match=message):
        body_of(completed(asked.batch), target(template=template))


def test_metadata_is_never_a_template_and_never_a_header(tmp_path: Path) -> None:
    """Whoever drops a file says what stands in it."""
    note = "{{ 7 * 7 }}\r\nwebhook-signature: v1,mine"
    asked = Asked(tmp_path, chats(1), {"metadata": {"note": note, "webhook-id": "x\r\n\r\n"}})
    asked.run()
    event = completed(asked.batch)
    assert payload(event, template='{"note": {{ data.metadata.note | tojson }}}') == {"note": note}
    with Receiver() as receiver:
        to = target(url=receiver.url, allow_insecure=True, all_batches=True)
        Deliveries(tmp_path / "data", {"ops": to}).deliver(asked.batch, event)
    (received,) = receiver.received
    assert received.id == event.id
    assert Webhook(SECRET).verify(received.body, received.headers)["data"]["metadata"]["note"] == note


# --- Slack and Discord ----------------------------------------------------------------------------------------------


def test_slack_gets_a_text_in_which_metadata_can_call_nobody(asked: Asked) -> None:
    text = payload(completed(asked.batch), format="slack")["text"]
    assert text.splitlines() == [
        f"Batch {asked.batch.key}: completed",
        "3 of 5 requests answered, 2 errors",
        "Model: dry-run",
        "team: support &lt;!channel&gt;",
    ]
    assert payload(completed(asked.batch), format="slack", template="<!here> {{ data.metadata.team }}")["text"] == (
        "<!here> support &lt;!channel&gt;"
    )


def test_discord_gets_a_content_in_which_metadata_can_call_nobody(asked: Asked) -> None:
    found = payload(failed(asked.batch, "run", NOW), format="discord")
    assert found["content"].startswith(f"Batch {asked.batch.key}: failed\n")
    assert found["allowed_mentions"] == {"parse": []}


@pytest.mark.parametrize(
    ("format", "field", "most"), [("slack", "text", SLACK_CHARACTERS), ("discord", "content", DISCORD_CHARACTERS)]
)
@pytest.mark.parametrize("sign", ["x", "é", "😀", "<"])
def test_a_message_is_cut_to_what_the_service_takes(
    asked: Asked, format: str, field: str, most: int, sign: str
) -> None:
    event = completed(asked.batch)
    long = replace(event, data=event.data | {"metadata": {"note": sign * 9000}})
    text = payload(long, format=format)[field]
    assert most - 4 <= len(text.encode("utf-16-le")) // 2 <= most
    assert text.endswith("…")


def test_events_of_gold_stars_are_messages_too() -> None:
    event = Event("msg_1", "gold_star.created", NOW, star(3, prompt="<!channel> " + "q" * 9000).document())
    text = payload(event, format="slack")["text"]
    assert text.startswith("Gold star created: line 3 of b, by m\nPrompt: &lt;!channel&gt; qqq")
    assert text.endswith("q…\nAnswer: a3")
