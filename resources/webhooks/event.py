"""An event: what there is to tell, before it is known who hears of it."""

import hashlib
import json
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Event:
    """`results` is the folder of published outputs whose lines a target may get too; `batch` the key it is about."""

    id: str
    type: str
    at: datetime
    data: dict[str, Any]
    batch: str | None = None
    results: Path | None = None

    def envelope(self) -> dict[str, Any]:
        """The payload: `type`, `timestamp` and `data`."""
        timestamp = self.at.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        return {"type": self.type, "timestamp": timestamp, "data": self.data}

    def as_dict(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "type": self.type,
            "at": self.at.isoformat(),
            "data": self.data,
            "batch": self.batch,
            "results": str(self.results) if self.results else None,
        }

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> "Event":
        results = Path(content["results"]) if content["results"] else None
        at = datetime.fromisoformat(content["at"])
        return cls(content["id"], content["type"], at, content["data"], content["batch"], results)


def event_id(*parts: object) -> str:
    """The id of an event, the same whenever it is made of the same parts. Holds no dot, which signatures are cut at."""
    return "msg_" + hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest()[:32]
