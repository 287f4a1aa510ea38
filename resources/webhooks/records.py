"""What was sent to whom about a batch, in its folder: `webhooks/<event id>.<target>.json`, a file an event and target.

Written after the receiver took the event, so a process killed in between sends it again, with the same id.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from resources import durable
from resources.batch_store.batch import Batch
from resources.batch_store.lock import writer_lock
from resources.webhooks.sender import Outcome


def is_delivered(batch: Batch, event_id: str, target: str) -> bool:
    return (_read(_path(batch, event_id, target)) or {}).get("status") == "delivered"


def is_known(batch: Batch, event_id: str, target: str) -> bool:
    """Whether it was sent, taken or not."""
    return _path(batch, event_id, target).exists()


@contextmanager
def sending(batch: Batch) -> Iterator[None]:
    """Be the one that sends the events of a batch.

    Raises:
        BatchLocked: another process does.
    """
    batch.webhooks_dir.mkdir(mode=0o700, exist_ok=True)
    with writer_lock(batch.webhooks_dir / "lock", "webhook_deliveries"):
        yield


def write(batch: Batch, event_id: str, event_type: str, target: str, outcome: Outcome) -> None:
    """Note how it went; what was taken once stays so. Nothing is written where the batch was removed meanwhile."""
    if not batch.root.is_dir():
        return
    path = _path(batch, event_id, target)
    path.parent.mkdir(mode=0o700, exist_ok=True)
    earlier = _read(path) or {}
    is_taken = outcome.delivered or earlier.get("status") == "delivered"
    content = {
        "type": event_type,
        "target": target,
        "status": "delivered" if is_taken else "dead",
        "at": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "attempts": [*earlier.get("attempts", []), *(asdict(attempt) for attempt in outcome.attempts)],
        "error": None if is_taken else outcome.error,
    }
    durable.write_file(path, json.dumps(content, indent=1).encode())


def _path(batch: Batch, event_id: str, target: str) -> Path:
    return batch.webhooks_dir / f"{event_id}.{target}.json"


def _read(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None
