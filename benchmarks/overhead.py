"""What the project costs without a model: rows a second by chunk size, memory by lines, and how soon a run goes on."""

import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks.common import LINE_BYTES, ROOT, Figure, Report, Unfit, against, alternate, say, write_null_input


@dataclass(frozen=True)
class Size:
    some: int = 100_000
    many: int = 1_000_000
    chunks: tuple[int, ...] = (100, 1000, 10_000)
    rounds: int = 3
    resumes: int = 3


QUICK = Size(some=5_000, many=20_000, rounds=2, resumes=2)


def run(quick: bool, budget_seconds: float) -> Report:
    size = QUICK if quick else Size()
    report = Report(
        "overhead",
        "Overhead, with the null engine",
        f"Lines of {LINE_BYTES} bytes from registration to publication, without Dagster; each run a process of its own "
        f"on a fresh data root. Rates are those of `answer` at {size.some:,} lines. Memory is the process's peak. "
        "A batch is stopped at 99 %, then gone on with by a new process: the time is from that process's start to its "
        "first request at the engine.",
    )
    with tempfile.TemporaryDirectory(prefix="vb-", dir="/tmp") as folder:
        some, many = Path(folder) / "some", Path(folder) / "many"
        for place, lines in ((some, size.some), (many, size.many)):
            place.mkdir()
            write_null_input(place / "in.jsonl", lines)
        _rates(some, size, budget_seconds, report)
        _memory(some, many, size, report)
        _resume(many, size, report)
    return report


def _rates(place: Path, size: Size, budget_seconds: float, report: Report) -> None:
    sides = {f"chunk_rows {rows}": lambda _, rows=rows: _child("whole", place, rows)["answer"] for rows in size.chunks}
    times = alternate(sides, size.rounds, budget_seconds=budget_seconds)
    report.raw["answer_seconds"] = times
    for name, seconds in times.items():
        rates = [size.some / value for value in seconds]
        text = f"{statistics.median(rates):,.0f} ({min(rates):,.0f} to {max(rates):,.0f}, n={len(rates)})"
        report.figures.append(Figure(f"answer, rows/s, {name}", text))


def _memory(some: Path, many: Path, size: Size, report: Report) -> None:
    runs = {}
    for place, lines in ((some, size.some), (many, size.many)):
        runs[lines] = _child("whole", place, 1000)
        say(f"  {lines:,} lines: {runs[lines]}")
    small, large = runs[size.some]["peak_rss_mb"], runs[size.many]["peak_rss_mb"]
    growth = (large - small) * 2**20 / (size.many - size.some)
    report.raw["runs"] = {str(lines): found for lines, found in runs.items()}
    for step in ("check", "answer", "publish"):
        rate = size.many / runs[size.many][step]
        report.figures.append(Figure(f"{step}, lines/s, {size.many:,} lines, one run", f"{rate:,.0f}"))
    report.figures.append(Figure(f"peak memory, {size.some:,} lines", f"{small:.0f} MB"))
    report.figures.append(against(large, f"{large:.0f} MB", f"peak memory, {size.many:,} lines", at_most=400))
    report.figures.append(against(growth, f"{growth:.0f} bytes", "growth a line", at_most=64))


def _resume(place: Path, size: Size, report: Report) -> None:
    stopped = _child("stop", place, 1000, size.many * 99 // 100)
    say(f"  stopped after {stopped['answered']:,.0f} of {size.many:,} rows")
    found = []
    for _ in range(size.resumes):
        began = time.time()
        resumed = _child("resume", place)
        if resumed["done"] != stopped["answered"]:
            raise Unfit(f"{stopped['answered']} rows were done, {resumed['done']} afterwards")
        found.append(resumed | {"seconds": resumed["stopped_at"] - began})
        say(f"  first request after {found[-1]['seconds']:.2f} s")
    report.raw["resume"] = {"stopped": stopped, "resumes": found}
    seconds = [resume["seconds"] for resume in found]
    text = f"{statistics.median(seconds):.2f} ({min(seconds):.2f} to {max(seconds):.2f}, n={len(seconds)})"
    what = f"seconds to the first new request, {stopped['answered']:,.0f} of {size.many:,} rows done"
    report.figures.append(against(statistics.median(seconds), text, what, at_most=5))


def _child(action: str, place: Path, *sizes: int) -> dict[str, float]:
    """Figures of a process; a fresh data root, but for `resume`."""
    if action != "resume":
        shutil.rmtree(place / "data", ignore_errors=True)
    command = [sys.executable, "-m", "benchmarks.null_child", action, str(place), *map(str, sizes)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Unfit(f"{action} failed:\n{done.stderr[-4000:]}")
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return figures
