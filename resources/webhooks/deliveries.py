"""Deliveries: who hears of an event, and what becomes of it.

At least once, with the same id: an event is noted as taken after it was, in the batch's folder, or by leaving the
outbox. What is used up goes to the dead letters first and is noted then.
"""

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from resources.batch_format.options import BatchOptions
from resources.batch_store.batch import Batch
from resources.batch_store.store import BatchStore
from resources.errors import BatchError, BatchLocked, DeliveryFailed, OptionsError
from resources.webhooks import records
from resources.webhooks.body import PayloadRefused, body_of
from resources.webhooks.event import Event, event_id
from resources.webhooks.letters import DeadLetter, DeadLetters
from resources.webhooks.outbox import PROGRESS, Outbox, Waiting
from resources.webhooks.sender import Outcome, Sender
from resources.webhooks.target import WebhookTarget

_UNDEFINED = "the target is not defined any more"
_ROUND = 200
"""Events of a target that are taken from its box at a time."""


@dataclass(frozen=True)
class Delivery:
    """What became of an event at a target. `before` says that an earlier run had delivered it."""

    event_id: str
    type: str
    target: str
    batch: str | None
    delivered: bool
    before: bool = False
    attempts: int = 0
    status: int | None = None
    error: str | None = None

    def as_dict(self) -> dict[str, Any]:
        return dict(self.__dict__)


class Deliveries:
    """All webhooks of a data root.

    Everything here blocks until it is done; what talks to the network says so. Used by assets, jobs and commands, never
    by a sensor, which only leaves events with `announce`.
    """

    def __init__(
        self, data_root: Path, targets: Mapping[str, WebhookTarget], sender: Callable[[], Sender] = Sender
    ) -> None:
        folder = data_root / "webhooks"
        self.outbox = Outbox(folder / "outbox")
        self.letters = DeadLetters(folder / "dead")
        self._data_root = data_root
        self._targets = targets
        self._sender = sender

    def hearing(self, event: str, options: BatchOptions | None = None) -> list[WebhookTarget]:
        """The targets that hear of an event: of a batch (its options given) the one that it names and those that hear
        of all batches; of anything else each that asks for such events.

        Raises:
            DeliveryFailed: the batch names a target that is not defined any more.
        """
        wanting = [target for target in self._targets.values() if target.wants(event)]
        if options is None:
            return wanting
        if options.webhook is not None and options.webhook not in self._targets:
            raise DeliveryFailed(f"The batch names the webhook `{options.webhook}`, which is not defined any more.")
        return [target for target in wanting if target.all_batches or target.name == options.webhook]

    def announce(self, event: Event, targets: Iterable[WebhookTarget]) -> None:
        """Leave an event in the outbox, durably, for `deliver_waiting` to send. No network.

        The way for events that no asset of ours sends itself: `announce(event, hearing(event.type))`, with an id by
        `event_id` of what makes the event what it is; the sensor `announcements` has a run send it.
        """
        for target in targets:
            self.outbox.put(event, target.name)

    def deliver(self, batch: Batch, event: Event) -> list[Delivery]:
        """Send an event of a batch to all that hear of it and have not taken it yet. Talks to the network.

        Raises:
            BatchLocked: another process sends events of this batch just now.
        """
        targets = self.hearing(event.type, batch.spec.options)
        if not targets:
            return []
        with records.sending(batch):
            return self._run([(target, event, batch) for target in targets])

    def deliver_waiting(self, owner: str = "deliver_webhooks") -> list[Delivery]:
        """Send all that waits, target by target at the same time, until no box holds anything. Talks to the network.

        A box that another process empties is left to it. What waits for a target that is not defined any more is a dead
        letter.
        """
        return asyncio.run(self._empty_all(owner))

    def redeliver(self, letters: Sequence[DeadLetter]) -> list[Delivery]:
        """Send the stored bytes of dead letters again, with the time and signature of now. Talks to the network.

        Raises:
            BatchLocked: another process does so.
        """
        with self.letters.sending_again():
            still = {(letter.event_id, letter.target) for letter in self.open_letters()}
            left = [letter for letter in letters if (letter.event_id, letter.target) in still]
            return asyncio.run(self._redeliver(left))

    def open_letters(self, ids: Sequence[str] = ()) -> list[DeadLetter]:
        """The letters that nobody took yet; only those events where ids are given.

        Raises:
            OptionsError: an id that no open letter has.
        """
        found = [letter for letter in self.letters.all() if letter.is_open]
        unknown = set(ids) - {letter.event_id for letter in found}
        if unknown:
            raise OptionsError(f"No dead letter that waits has the id {', '.join(sorted(unknown))}.")
        return [letter for letter in found if not ids or letter.event_id in ids]

    def test(self, name: str) -> Delivery:
        """Send one test event, once, to see whether a target is reached. Talks to the network.

        Raises:
            OptionsError: no such target.
        """
        if name not in self._targets:
            raise OptionsError(f"No webhook `{name}`; there are: {', '.join(self._targets) or 'none'}.")
        now = datetime.now(UTC)
        data = {"message": "A test of vllm_batch_pipelines."}
        event = Event(event_id("webhook.test", name, now.isoformat()), "webhook.test", now, data)
        target = self._targets[name].model_copy(update={"template": None, "max_attempts": 1})

        async def send() -> Outcome:
            async with self._sender() as sender:
                return await sender.send(target, event.id, body_of(event, target))

        return _delivery(event, name, asyncio.run(send()))

    # --- How ----------------------------------------------------------------------------------------------------------

    def _run(self, wanted: Sequence[tuple[WebhookTarget, Event, Batch | None]]) -> list[Delivery]:
        async def all_of_them() -> list[Delivery]:
            async with self._sender() as sender:
                return await asyncio.gather(*(self._one(sender, *one) for one in wanted))

        return asyncio.run(all_of_them())

    async def _one(self, sender: Sender, target: WebhookTarget, event: Event, batch: Batch | None) -> Delivery:
        """One event to one target, and all that is noted about it."""
        if batch is not None and records.is_delivered(batch, event.id, target.name):
            return Delivery(event.id, event.type, target.name, event.batch, delivered=True, before=True)
        body = b""
        try:
            body = await asyncio.to_thread(body_of, event, target)
            outcome = await sender.send(target, event.id, body, most=1 if event.type == PROGRESS else None)
        except PayloadRefused as refused:
            outcome = Outcome(error=str(refused))
        except (OSError, BatchError) as error:  # the outputs went away while they were read, say
            outcome = Outcome(error=target.redact(f"{type(error).__name__}: {error}"))
        if event.type != PROGRESS:
            await asyncio.to_thread(self._note, event, target.name, body, outcome, batch)
        return _delivery(event, target.name, outcome)

    def _note(self, event: Event, target: str, body: bytes, outcome: Outcome, batch: Batch | None) -> None:
        if outcome.delivered:
            self.letters.settled(event.id, target)
        else:
            self.letters.put(event, target, body, outcome)
        if batch is not None:
            records.write(batch, event.id, event.type, target, outcome)

    async def _empty_all(self, owner: str) -> list[Delivery]:
        async with self._sender() as sender:
            boxes = await asyncio.gather(*(self._empty(sender, name, owner) for name in self.outbox.targets()))
        return [delivery for box in boxes for delivery in box]

    async def _empty(self, sender: Sender, name: str, owner: str) -> list[Delivery]:
        done: list[Delivery] = []
        try:
            with self.outbox.emptying(name, owner):
                while waiting := self.outbox.waiting(name, _ROUND):
                    done += await asyncio.gather(*(self._from_the_box(sender, one) for one in waiting))
        except BatchLocked:
            pass  # what waits there is taken by the one that holds it
        return done

    async def _from_the_box(self, sender: Sender, waiting: Waiting) -> Delivery:
        event, target, batch = waiting.event, self._targets.get(waiting.target), self._batch(waiting.event.batch)
        if target is None:
            outcome = Outcome(error=_UNDEFINED)
            await asyncio.to_thread(self._note, event, waiting.target, b"", outcome, batch)
            delivery = _delivery(event, waiting.target, outcome)
        else:
            delivery = await self._one(sender, target, event, batch)
        await asyncio.to_thread(self.outbox.remove, waiting)
        return delivery

    async def _redeliver(self, letters: Sequence[DeadLetter]) -> list[Delivery]:
        async with self._sender() as sender:
            return await asyncio.gather(*(self._again(sender, letter) for letter in letters))

    async def _again(self, sender: Sender, letter: DeadLetter) -> Delivery:
        target = self._targets.get(letter.target)
        if target is None:
            outcome = Outcome(error=_UNDEFINED)
        else:
            try:
                body = letter.body.encode() or body_of(Event.from_dict(letter.event or {}), target)
                outcome = await sender.send(target, letter.event_id, body)
            except (PayloadRefused, KeyError, OSError) as error:
                outcome = Outcome(error=str(error))
        await asyncio.to_thread(self._note_again, letter, outcome)
        last = outcome.attempts[-1].status if outcome.attempts else None
        return Delivery(
            event_id=letter.event_id,
            type=letter.type,
            target=letter.target,
            batch=letter.batch,
            delivered=outcome.delivered,
            attempts=len(outcome.attempts),
            status=last,
            error=outcome.error,
        )

    def _note_again(self, letter: DeadLetter, outcome: Outcome) -> None:
        self.letters.tried_again(letter, outcome)
        batch = self._batch(letter.batch)
        if batch is not None:
            records.write(batch, letter.event_id, letter.type, letter.target, outcome)

    def _batch(self, key: str | None) -> Batch | None:
        """The batch of an event; None where there is none, or no more."""
        if key is None:
            return None
        try:
            return BatchStore(self._data_root).get(key)
        except BatchError:
            return None


def _delivery(event: Event, target: str, outcome: Outcome) -> Delivery:
    return Delivery(
        event_id=event.id,
        type=event.type,
        target=target,
        batch=event.batch,
        delivered=outcome.delivered,
        attempts=len(outcome.attempts),
        status=outcome.attempts[-1].status if outcome.attempts else None,
        error=outcome.error,
    )
