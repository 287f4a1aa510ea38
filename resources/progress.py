"""How far a piece of work is, for whoever shows it."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """How far a phase is. Rates are over this run; tokens are completion tokens."""

    phase: str
    done: int
    total: int
    failed: int = 0
    tokens_per_second: float = 0.0
    rows_per_second: float = 0.0
    note: str = ""

    @property
    def eta_seconds(self) -> float | None:
        return (self.total - self.done) / self.rows_per_second if self.rows_per_second > 0 else None


ProgressCallback = Callable[[Progress], None]


def silent(_: Progress) -> None:
    pass
