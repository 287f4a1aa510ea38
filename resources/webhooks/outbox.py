"""The outbox: events that wait to be sent, as files, left by those who must not talk to the network themselves.

    <data>/webhooks/outbox/<target>/<name>.json    the event; the name is its id, or `progress-<batch>`
    <data>/webhooks/outbox/<target>/lock           held by the process that empties this target's box

A file goes when its event was taken or is a dead letter. One lock a target: a receiver that hangs keeps back what is
for itself, and nothing else.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from resources import durable
from resources.batch_store.lock import lock_owner, writer_lock
from resources.webhooks.event import Event

PROGRESS = "batch.progress"
_FILES = "[!.]*.json"  # without those that are being written


@dataclass(frozen=True)
class Waiting:
    """An event in a target's box. `content` is that of the file when it was read."""

    path: Path
    target: str
    event: Event
    content: bytes


class Outbox:
    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def put(self, event: Event, target: str) -> None:
        """Leave an event. The same one again changes nothing; of a batch's progress only the latest is kept."""
        box = self._folder / target
        box.mkdir(mode=0o700, parents=True, exist_ok=True)
        is_progress = event.type == PROGRESS
        path = box / f"{f'progress-{event.batch}' if is_progress else event.id}.json"
        durable.write_file(path, json.dumps(event.as_dict()).encode(), durable=not is_progress)

    def holds(self, event_id: str, target: str) -> bool:
        return (self._folder / target / f"{event_id}.json").exists()

    def targets(self) -> list[str]:
        """The targets for which something waits."""
        if not self._folder.is_dir():
            return []
        return sorted(box.name for box in self._folder.iterdir() if next(box.glob(_FILES), None) is not None)

    def is_being_emptied(self, target: str) -> bool:
        return lock_owner(self._folder / target / "lock") is not None

    @contextmanager
    def emptying(self, target: str, owner: str) -> Iterator[None]:
        """Be the one that empties a target's box.

        Raises:
            BatchLocked: another process does.
        """
        with writer_lock(self._folder / target / "lock", owner):
            yield

    def count(self, target: str) -> int:
        return sum(1 for _ in (self._folder / target).glob(_FILES))

    def waiting(self, target: str, most: int | None = None) -> list[Waiting]:
        """What waits for a target, oldest first. A file that cannot be read is set aside, as `.damaged`."""
        paths = [(path.stat().st_mtime_ns, path) for path in (self._folder / target).glob(_FILES)]
        found = []
        for _, path in sorted(paths)[:most]:
            content = path.read_bytes()
            try:
                found.append(Waiting(path, target, Event.from_dict(json.loads(content)), content))
            except (ValueError, KeyError, TypeError):
                path.rename(path.with_suffix(".damaged"))
        return found

    def remove(self, waiting: Waiting) -> None:
        """Take out what was settled; a newer one under the same name (progress) stays."""
        if waiting.path.exists() and waiting.path.read_bytes() == waiting.content:
            waiting.path.unlink(missing_ok=True)
