"""How many requests are to be in flight: as many as the engine takes, and some that wait at its door."""

from resources.engine.protocol import Load

START = 64
MOST = 4096


class Level:
    """Follows what the engine says of its load. A number in the catalog (`fixed`) stands instead.

    The engine is full when requests wait for it; `reserve` is how many should, so that it finds the next one when it
    has room, while few enough wait that none times out in the queue. It grows fast while nobody waits, and goes back
    when too many do. An engine that says nothing of its load keeps START, less where it asks for less (status 429).
    """

    def __init__(self, fixed: int | None = None, most_running: int | None = None) -> None:
        self._fixed = fixed is not None
        self._told = False
        self.now = fixed or (min(most_running + _reserve(most_running), MOST) if most_running else START)

    def follow(self, load: Load, in_flight: int) -> None:
        """`in_flight` are ours; others may ask the same engine."""
        if self._fixed:
            return
        self._told = True
        reserve = _reserve(load.running)
        has_seen_them = (
            load.running + load.waiting >= in_flight * 3 // 4
        )  # it counts at the end of a step, which may be long
        if 2 * load.waiting < reserve and in_flight >= self.now and has_seen_them:
            self.now = min(max(self.now * 3 // 2, in_flight + reserve), MOST)
        elif load.waiting > 3 * reserve:
            self.now = max(self.now - load.waiting // 2, reserve)

    def too_much(self) -> None:
        """The engine had no room or no time for a request."""
        if not self._fixed:
            self.now = max(self.now * 3 // 4, 1)

    def fine(self) -> None:
        """An answer came: where the engine does not tell its load, go back up slowly."""
        if not self._fixed and not self._told and self.now < START:
            self.now += 1


def _reserve(running: int) -> int:
    return max(running // 4, 8)
