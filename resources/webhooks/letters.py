"""Dead letters: events that a target did not take, with the bytes that were sent, under `<data>/webhooks/dead/`.

A file an event and target: `<event id>.<target>.json`. It holds no URL and no secret; sending one again looks both up
in the targets of that moment, and signs anew.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from resources import durable
from resources.batch_store.lock import writer_lock
from resources.errors import BatchLocked
from resources.webhooks.event import Event
from resources.webhooks.sender import Outcome


@dataclass(frozen=True)
class DeadLetter:
    """`body` is what was sent, as it was sent. Empty where no body could be made (a template that does not fit, say):
    then `event` holds what it is to be made of."""

    event_id: str
    target: str
    type: str
    batch: str | None
    body: str
    error: str | None
    died_at: str
    attempts: list[dict[str, Any]] = field(default_factory=list)
    redelivered_at: str | None = None
    event: dict[str, Any] | None = None

    @property
    def is_open(self) -> bool:
        return self.redelivered_at is None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class DeadLetters:
    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def put(self, event: Event, target: str, body: bytes, outcome: Outcome) -> None:
        """Keep an event that was used up. One that is there already is replaced, with its attempts before these."""
        known = self._read(self._path(event.id, target))
        letter = DeadLetter(
            event_id=event.id,
            target=target,
            type=event.type,
            batch=event.batch,
            body=body.decode(),
            error=outcome.error,
            died_at=_now(),
            attempts=[*(known.attempts if known else []), *(asdict(attempt) for attempt in outcome.attempts)],
            event=None if body else event.as_dict(),
            redelivered_at=known.redelivered_at if known else None,
        )
        self._write(letter)

    @contextmanager
    def sending_again(self) -> Iterator[None]:
        """Be the one that sends letters again.

        Raises:
            BatchLocked: another process does.
        """
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        try:
            with writer_lock(self._folder / "lock", "redeliver"):
                yield
        except BatchLocked:
            raise BatchLocked("Another process sends dead letters again just now.") from None

    def tried_again(self, letter: DeadLetter, outcome: Outcome) -> None:
        """Mark a letter with what became of it. What somebody else brought meanwhile stays brought."""
        known = self._read(self._path(letter.event_id, letter.target)) or letter
        updated = replace(
            known,
            attempts=[*known.attempts, *(asdict(attempt) for attempt in outcome.attempts)],
            error=outcome.error if known.is_open else None,
            redelivered_at=_now() if outcome.delivered else known.redelivered_at,
        )
        self._write(updated)

    def settled(self, event_id: str, target: str) -> None:
        """Mark the letter of an event that was taken after all, if there is one."""
        known = self._read(self._path(event_id, target))
        if known is not None and known.is_open:
            self._write(replace(known, error=None, redelivered_at=_now()))

    def all(self) -> list[DeadLetter]:
        """Every letter, oldest first, those that were sent again included."""
        found = [self._read(path) for path in self._folder.glob("msg_*.json")]
        return sorted((letter for letter in found if letter), key=lambda letter: (letter.died_at, letter.event_id))

    def _path(self, event_id: str, target: str) -> Path:
        return self._folder / f"{event_id}.{target}.json"

    def _write(self, letter: DeadLetter) -> None:
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        content = json.dumps(letter.as_dict(), indent=1).encode()
        durable.write_file(self._path(letter.event_id, letter.target), content)

    def _read(self, path: Path) -> DeadLetter | None:
        try:
            return DeadLetter(**json.loads(path.read_bytes()))
        except (OSError, ValueError, TypeError):
            return None


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
