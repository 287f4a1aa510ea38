"""Start requests: small files by which the command line and `register_files` ask the stack to run a batch.

    queue/<key>.json    {"id", "mode", "failed", "origin", "requested_at"}

A request is a file, so that it can be left while the stack is down; the stack's sensor starts a run for it (its `id`
makes a repeat harmless) and removes it once that run exists.
"""

import json
import secrets
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from resources import durable
from resources.batch_store.spec import is_key
from resources.batch_store.store import BatchStore


@dataclass(frozen=True)
class StartRequest:
    key: str
    id: str
    mode: str
    origin: str
    """`inbox` for a dropped file, `submit` for everything that a person asked for."""
    failed: tuple[str, ...] = ()
    """What the mode retry_failed asks again; nothing said means lines without an answer."""
    requested_at: datetime = field(default_factory=lambda: datetime.now(UTC), compare=False)


def enqueue(
    store: BatchStore, key: str, mode: str = "resume", origin: str = "submit", failed: Iterable[str] = ()
) -> StartRequest:
    """Ask for a run of a registered batch. A request that is already there is replaced."""
    request = StartRequest(store.get(key).key, secrets.token_hex(8), mode, origin, tuple(sorted(map(str, failed))))
    content = {"id": request.id, "mode": mode, "failed": request.failed, "origin": origin}
    content["requested_at"] = request.requested_at.isoformat()
    durable.write_file(store.queue_dir / f"{request.key}.json", json.dumps(content).encode())
    return request


def pending(store: BatchStore) -> Iterator[StartRequest]:
    """The requests that are waiting, oldest first. Files that are none of ours are left alone."""
    paths = [p for p in store.queue_dir.glob("*.json") if is_key(p.stem)]
    for path in sorted(paths, key=lambda p: p.stat().st_mtime_ns if p.exists() else 0):
        request = _read(path)
        if request is not None:
            yield request


def _read(path: Path) -> StartRequest | None:
    try:
        content = json.loads(path.read_bytes())
        id, mode, origin = (str(content[name]) for name in ("id", "mode", "origin"))
        said = content.get("requested_at")
        since = datetime.fromisoformat(said) if said else datetime.fromtimestamp(path.stat().st_mtime, UTC)
        return StartRequest(path.stem, id, mode, origin, tuple(map(str, content.get("failed", ()))), since)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def is_queued(store: BatchStore, key: str) -> bool:
    return (store.queue_dir / f"{key}.json").exists()


def withdraw(store: BatchStore, key: str, request_id: str | None = None) -> bool:
    """Take a request back (only the one with that id where one is given); whether there was one."""
    path = store.queue_dir / f"{key}.json"
    found = _read(path)
    if found is None or (request_id is not None and found.id != request_id):
        return False
    path.unlink(missing_ok=True)
    return True
