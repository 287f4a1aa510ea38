"""The bytes that go to a target: the payload with result lines where it wants them, or a message for people."""

import json
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

from resources.webhooks.event import Event
from resources.webhooks.target import STARS, WebhookTarget
from resources.webhooks.templates import render

SLACK_CHARACTERS = 4000
"""Slack cuts `text` at 40,000 and asks for 4,000 (docs.slack.dev, chat.postMessage, "Truncating content")."""
DISCORD_CHARACTERS = 2000
"""Discord refuses longer `content` (docs.discord.com, Execute Webhook)."""
_STAR_CHARACTERS = 500


class PayloadRefused(ValueError):
    """There is no body that could be sent; sending again cannot help."""


def body_of(event: Event, target: WebhookTarget) -> bytes:
    """The same bytes for the same event and target.

    Raises:
        PayloadRefused: a template that cannot be filled or makes no JSON; over the limit without any result line.
    """
    try:
        if target.format == "slack":
            return _json({"text": _cut(_message(event, target, _slack_escape), SLACK_CHARACTERS)})
        if target.format == "discord":
            content = _cut(_message(event, target, _as_text), DISCORD_CHARACTERS)
            return _json({"content": content, "allowed_mentions": {"parse": []}})
        body = _standard(event, target)
    except ValueError as error:
        raise PayloadRefused(str(error)) from None
    if len(body) > target.max_payload_bytes:
        raise PayloadRefused(f"the payload has {len(body)} bytes, over the limit of {target.max_payload_bytes}")
    return body


def _standard(event: Event, target: WebhookTarget) -> bytes:
    envelope = event.envelope()
    if target.include_results and event.results is not None:
        room = max(0, target.max_payload_bytes - len(_json(envelope)) - 100)
        envelope["data"] = envelope["data"] | _result_lines(event.results, target.include_results, room)
    if target.template is None:
        return _json(envelope)
    text = render(target.template, {"id": event.id, **envelope})
    try:
        json.loads(text)
    except ValueError as error:
        raise ValueError(f"its template makes no JSON: {error}") from None
    return text.encode()


def _result_lines(folder: Path, which: str, room: int) -> dict[str, Any]:
    """Lines of the published files until there is no room; `results_truncated` says whether some are left out."""
    found: dict[str, Any] = {"errors": []}
    files = {"errors": folder / "errors.jsonl"}
    if which == "all":
        found["results"] = []
        files["results"] = folder / "output.jsonl"
    truncated = False
    for name, path in files.items():
        for line in _lines(path, room):
            parsed = json.loads(line, parse_constant=lambda _: None) if line else None
            size = len(_json(parsed)) + 1
            if line is None or size > room:
                truncated = True
                break
            room -= size
            found[name].append(parsed)
    return found | {"results_truncated": truncated}


def _lines(path: Path, limit: int) -> Iterator[bytes | None]:
    """The lines of a file, None in place of one that is longer than `limit`, which is never held whole."""
    with path.open("rb") as stream:
        while line := stream.readline(limit + 2):
            yield line if len(line) <= limit + 1 else None


def _message(event: Event, target: WebhookTarget, escape: Any) -> str:
    if target.template is not None:
        return render(target.template, {"id": event.id, **event.envelope()}, escape)
    data = event.data
    if event.type in STARS:
        return _star_message(event, escape)
    if not event.type.startswith("batch."):
        details = ", ".join(f"{name} {value}" for name, value in data.items() if isinstance(value, str | int))
        return f"{escape(event.type)}: {escape(details)}"
    counts = data["request_counts"]
    lines = [f"Batch {escape(data['id'])}: {escape(data['status'].replace('_', ' '))}"]
    lines.append(f"{counts['completed']} of {counts['total']} requests answered, {counts['failed']} errors")
    if data["model"]:
        lines.append(f"Model: {escape(', '.join(data['model']))}")
    if data.get("progress"):
        lines.append(f"{data['progress']['phase']}: {data['progress']['percent']} %")
    if data["error"]:
        lines.append(f"Error: {escape(data['error']['code'])}: {escape(data['error']['message'])}")
    lines += [f"{escape(name)}: {escape(value)}" for name, value in data["metadata"].items()]
    return "\n".join(lines)


def _star_message(event: Event, escape: Any) -> str:
    """So much of each text that none keeps the others out."""
    star, kind = event.data, event.type.removeprefix("gold_star.")
    lines = [f"Gold star {kind}: line {star['line']} of {escape(star['batch'])}, by {escape(star['model'])}"]
    for title, name in (("Prompt", "prompt"), ("Answer", "final_response")):
        lines.append(f"{title}: {escape(_cut(star[name], _STAR_CHARACTERS))}")
    return "\n".join(lines)


def _slack_escape(value: Any) -> Any:
    """Slack's three control characters, so that no metadata can call `<!channel>` or dress up a link."""
    if not isinstance(value, str):
        return value
    return str(value).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _as_text(value: Any) -> Any:
    return value


def _cut(text: str, most: int) -> str:
    """The text, cut to so many characters, counted as UTF-16 units, so that no way of counting finds more."""
    if len(text.encode("utf-16-le")) // 2 <= most:
        return text
    return text.encode("utf-16-le")[: 2 * (most - 1)].decode("utf-16-le", "ignore") + "…"


def _json(content: Any) -> bytes:
    """ASCII, so that a lone surrogate in an answer is no reason to fail."""
    return json.dumps(content, separators=(",", ":"), default=_date).encode("ascii")


def _date(value: Any) -> str:
    return value.isoformat() if isinstance(value, datetime) else str(value)
