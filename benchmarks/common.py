"""What the benchmarks share: sides in turn, ratios with what the noise leaves open, figures, results as JSON.

Nothing is compared across runs: the speed of a machine drifts, by a factor of two on shared ones. The sides of a
comparison take turns in one run (A B, B A, A B, ...), and what counts is the median of the ratios of each round.
"""

import itertools
import json
import math
import os
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"

Side = Callable[[int], float]
"""One pass; gets the number of the round, gives seconds."""


class Unfit(Exception):
    """A pass that did other work than was asked: its time means nothing."""


def say(text: str) -> None:
    """A line for who waits."""
    print(f"{datetime.now():%H:%M:%S} {text}", file=sys.stderr, flush=True)


def machine() -> str:
    """The machine in a few words."""
    memory = psutil.virtual_memory().total / 2**30
    system = f"{platform.system()} {platform.machine()}"
    return f"{_cpu()}, {os.cpu_count()} cores, {memory:.0f} GiB, Python {platform.python_version()}, {system}"


def _cpu() -> str:
    try:
        found = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.M)
    except OSError:
        found = None
    return found[1].strip() if found else platform.machine()


# --- Sides in turn ----------------------------------------------------------------------------------------------------


def alternate(
    sides: Mapping[str, Side], rounds: int, *, fewer: Mapping[str, int] | None = None, budget_seconds: float = math.inf
) -> dict[str, list[float]]:
    """Seconds of each side by round. Every other round goes backwards, so that neighbours stay neighbours.

    Args:
        fewer: sides that take part in the first rounds only.
        budget_seconds: no round begins that would, going by the medians so far, end later than this.
    """
    times: dict[str, list[float]] = {name: [] for name in sides}
    began = time.monotonic()
    for number in range(rounds):
        names = [name for name in sides if number < (fewer or {}).get(name, rounds)]
        expected = sum(statistics.median(times[name] or [0.0]) for name in names)
        if time.monotonic() - began + expected > budget_seconds:
            say(f"  the time is up after {number} of {rounds} rounds")
            break
        for name in reversed(names) if number % 2 else names:
            times[name].append(sides[name](number))
            say(f"  round {number + 1} of {rounds}, {name}: {times[name][-1]:.2f} s")
    return times


@dataclass(frozen=True)
class Ratio:
    """The median of the rounds' ratios, and how far off it may be.

    `margin` is relative: two standard errors of a median, from the scatter of the ratios or that of the same side
    against itself one round later (A against A), whichever is larger. It is None where A had too few rounds.
    """

    median: float
    margin: float | None
    rounds: int

    def __str__(self) -> str:
        known = "noise not known" if self.margin is None else f"± {self.margin:.1%}"
        return f"{self.median:.3f} ({known}, n={self.rounds})"

    def judge(self, *, at_least: float = 0.0, at_most: float = math.inf) -> str:
        """met, missed, or undecided where what the noise allows lies on both sides of the target."""
        if self.margin is None:
            return "undecided: too few rounds"
        low, high = self.median / (1 + self.margin), self.median * (1 + self.margin)
        if low >= at_least and high <= at_most:
            return "met"
        if high < at_least or low > at_most:
            return "missed"
        return "undecided: within the noise"


def ratio(above: Sequence[float], below: Sequence[float]) -> Ratio:
    """Of the rounds that both sides took part in. `below` is A of the comparison of A against A, in all its rounds."""
    logs = [math.log(a / b) for a, b in zip(above, below, strict=False)]
    if len(below) < 3:
        return Ratio(math.exp(statistics.median(logs)), None, len(logs))
    itself = [math.log(after / before) for before, after in itertools.pairwise(below)]
    scatter = max(statistics.stdev(logs) if len(logs) > 2 else 0.0, _about_zero(itself))
    return Ratio(math.exp(statistics.median(logs)), 2 * 1.253 * scatter / math.sqrt(len(logs)), len(logs))


def _about_zero(values: Sequence[float]) -> float:
    return math.sqrt(sum(value * value for value in values) / len(values))


# --- Figures and results ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Figure:
    """A line of a table. `verdict` is empty where there is no target."""

    what: str
    measured: str
    target: str = ""
    verdict: str = ""


def against(value: float, text: str, what: str, *, at_most: float = math.inf, at_least: float = 0.0) -> Figure:
    """A figure that is no ratio of two sides, held against its target."""
    target = f"≤ {at_most:g}" if math.isfinite(at_most) else f"≥ {at_least:g}"
    return Figure(what, text, target, "met" if at_least <= value <= at_most else "missed")


def held(found: Ratio, what: str, *, at_least: float = 0.0, at_most: float = math.inf) -> Figure:
    """The ratio of two sides held against its target."""
    target = f"≤ {at_most:g}" if math.isfinite(at_most) else f"≥ {at_least:g}"
    return Figure(what, str(found), target, found.judge(at_least=at_least, at_most=at_most))


def seconds_of(name: str, times: Sequence[float]) -> Figure:
    return Figure(
        f"{name}, seconds", f"{statistics.median(times):.2f} ({min(times):.2f} to {max(times):.2f}, n={len(times)})"
    )


@dataclass
class Report:
    """What one benchmark found. `setup` tells what was done, `raw` holds every time measured."""

    name: str
    title: str
    setup: str
    figures: list[Figure] = field(default_factory=list)
    raw: dict[str, Any] = field(default_factory=dict)
    machine: str = field(default_factory=machine)
    date: str = field(default_factory=lambda: datetime.now(UTC).date().isoformat())
    seconds: float = 0.0
    quick: bool = False

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{self.name}.json").write_text(json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n")

    @classmethod
    def load(cls, path: Path) -> "Report":
        fields = json.loads(path.read_text())
        return cls(**fields | {"figures": [Figure(**figure) for figure in fields["figures"]]})

    def markdown(self) -> str:
        lines = [f"### {self.title}", "", self.setup, "", "| | measured | target | |", "|---|---|---|---|"]
        lines += [f"| {f.what} | {f.measured} | {f.target} | {f.verdict} |" for f in self.figures]
        note = " Tiny sizes: the figures mean nothing." if self.quick else ""
        return "\n".join([*lines, "", f"{self.machine}; {self.date}; {self.seconds / 60:.1f} minutes.{note}", ""])


# --- Input ------------------------------------------------------------------------------------------------------------

LINE_BYTES = 600


def write_null_input(path: Path, lines: int) -> None:
    """Chat requests for the null engine (model `dry-run`), LINE_BYTES a line."""
    request: dict[str, Any] = {
        "custom_id": "request-000000000",
        "method": "POST",
        "url": "/v1/chat/completions",
        "body": {"model": "dry-run", "messages": [{"role": "user", "content": ""}], "temperature": 0, "max_tokens": 64},
    }
    words = "the quick brown fox jumps over the lazy dog and asks a question: "
    missing = LINE_BYTES - len(json.dumps(request)) - 1
    with path.open("w") as file:
        for number in range(lines):
            request["custom_id"] = f"request-{number:09d}"
            request["body"]["messages"][0]["content"] = (f"{number} " + words * 10)[:missing]
            file.write(json.dumps(request) + "\n")
