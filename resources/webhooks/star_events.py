"""The events of gold stars: from the change feed of a target's reviews into the outbox.

Each webhook has its own place in the feed, so that one that is defined later hears of every change there ever was. The
places are in `announced.json` beside the feed, and move when all events of a number are in the outbox: a process that
is killed in between leaves the same events again, with the same ids.
"""

import json
from collections import Counter
from collections.abc import Mapping
from datetime import datetime
from itertools import groupby
from pathlib import Path
from typing import Any

from resources import durable
from resources.label_studio.reviews import Reviews
from resources.webhooks.deliveries import Deliveries
from resources.webhooks.event import Event
from resources.webhooks.target import STARS


def announce_changes(reviews: Reviews, deliveries: Deliveries) -> Counter[str]:
    """Leave the changes that a webhook has not been told of in its box; how many, by webhook. No network."""
    hearing = {str(kind): deliveries.hearing(kind) for kind in STARS}
    names = {target.name for targets in hearing.values() for target in targets}
    file = reviews.folder / "announced.json"
    places = _read(file)
    told: Counter[str] = Counter()
    if not names:
        return told
    changes = reviews.changes(min(places.get(name, 0) for name in names))
    for number, of_number in groupby(changes, key=lambda change: change["number"]):
        behind = {name for name in names if places.get(name, 0) < number}
        for change in of_number:
            event = _event(change)
            targets = [target for target in hearing[event.type] if target.name in behind]
            deliveries.announce(event, targets)
            told.update(target.name for target in targets)
        places |= dict.fromkeys(behind, number)
        durable.write_file(file, json.dumps(places).encode())
    return told


def _event(change: Mapping[str, Any]) -> Event:
    """With the change's number, by which a receiver knows the later of two that come in another order."""
    data = {"number": change["number"], **change["data"]}
    return Event(change["id"], change["type"], datetime.fromisoformat(change["timestamp"]), data)


def _read(file: Path) -> dict[str, int]:
    try:
        return dict(json.loads(file.read_bytes()))
    except FileNotFoundError:
        return {}
