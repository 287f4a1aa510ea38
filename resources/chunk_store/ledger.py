"""Where the tokens went that an engine of ours made for a generation: into rows, or to waste.

`usage.json` beside the chunks has one entry a life of the engine: what it made by its own counters, and what of that is
in rows. The rest was wasted: by retries (a timeout, a cancelled run, a probe) in a life that ended well; by the crash
in one that did not, where the last word of the engine may be older than its death, so that figure is a lower bound.
A life that was shared with other runs tells nothing of our waste: its counters hold their work too.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from resources import durable
from resources.engine.dispatcher import Life

FILE = "usage.json"


@dataclass(frozen=True)
class Tokens:
    prompt: int = 0
    completion: int = 0

    def __add__(self, other: "Tokens") -> "Tokens":
        return Tokens(self.prompt + other.prompt, self.completion + other.completion)

    def beyond(self, other: "Tokens") -> "Tokens":
        """What is left of it, never less than nothing."""
        return Tokens(max(self.prompt - other.prompt, 0), max(self.completion - other.completion, 0))


@dataclass(frozen=True)
class Booking:
    """`useful` is in rows. `lower_bound` where a crash or a life shared with others may have wasted more."""

    useful: Tokens
    wasted_by_retry: Tokens
    wasted_by_crash: Tokens
    lower_bound: bool

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class Ledger:
    """The lives of a generation's engines. For the holder of the batch's lock.

    Args:
        folder: the generation's.
        committed: the tokens in its rows now; a life that a killed run left open is settled with them.
    """

    def __init__(self, folder: Path, committed: Tokens) -> None:
        self._path = folder / FILE
        self._written = b""
        self._before = _read(self._path)
        if self._before and self._before[-1]["ended"] is None:
            known = sum((Tokens(*life["useful"]) for life in self._before[:-1]), Tokens())
            self._before[-1] |= {"useful": _pair(committed.beyond(known)), "ended": "crashed"}

    def note(self, lives: Sequence[Life], *, durable_write: bool = False) -> None:
        """Write the lives of this run beside those before."""
        if not lives:
            return
        content = json.dumps({"lives": [*self._before, *(_entry(life) for life in lives)]}, indent=1).encode()
        if content != self._written or durable_write:
            durable.write_file(self._path, content, durable=durable_write)
            self._written = content


def booking(folder: Path, committed: Tokens) -> Booking | None:
    """Where a generation's tokens went; None where its engine never told."""
    lives = _read(folder / FILE)
    if not lives:
        return None
    wasted = {"closed": Tokens(), "crashed": Tokens()}
    for life in lives:
        if not life.get("shared"):
            wasted[life["ended"] or "crashed"] += Tokens(*life["engine"]).beyond(Tokens(*life["useful"]))
    unsure = any(life["ended"] != "closed" or life.get("shared") for life in lives)
    return Booking(committed, wasted["closed"], wasted["crashed"], unsure)


def _entry(life: Life) -> dict[str, Any]:
    made = (
        life.last.prompt_tokens - life.first.prompt_tokens,
        life.last.completion_tokens - life.first.completion_tokens,
    )
    entry = {"engine": made, "useful": life.useful, "ended": life.ended}
    return entry | {"shared": True} if life.shared else entry


def _pair(tokens: Tokens) -> tuple[int, int]:
    return (tokens.prompt, tokens.completion)


def _read(path: Path) -> list[dict[str, Any]]:
    """The lives in the file; none where it is not there or not whole: it is about money, not about answers."""
    try:
        return list(json.loads(path.read_bytes())["lives"])
    except (OSError, ValueError, KeyError, TypeError):
        return []
