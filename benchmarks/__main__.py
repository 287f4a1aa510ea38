"""All benchmarks, or some, one after the other: results as JSON, tables at the end and in docs/benchmarks.md.

    python -m benchmarks [--only continuous,ordering] [--quick] [--out FOLDER]

`python -m benchmarks.report` fills the tables of docs/benchmarks.md again from the JSON.
"""

import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer

from benchmarks import commit_cost, continuous, curation, exports, main_path, ordering, overhead, report, warm
from benchmarks.common import RESULTS, Report, say

PARTS: dict[str, tuple[Callable[[bool, float], Report], float]] = {
    "continuous": (continuous.run, 15 * 60),
    "commit_cost": (commit_cost.run, 4 * 60),
    "ordering": (ordering.run, 6 * 60),
    "warm": (warm.run, 0),
    "overhead": (overhead.run, 90),
    "main_path": (main_path.run, 0),
    "exports": (exports.run, 5 * 60),
    "curation": (curation.run, 5 * 60),
}
"""In the order in which they are run, each with the seconds after which it begins no further round."""


def main(
    only: Annotated[str, typer.Option(help=f"Some of {','.join(PARTS)}.")] = ",".join(PARTS),
    quick: Annotated[bool, typer.Option("--quick", help="Tiny sizes: whether the scripts work.")] = False,
    out: Annotated[
        Path | None, typer.Option(help="Where the JSON goes. Default: benchmarks/results; with --quick, nowhere.")
    ] = None,
) -> None:
    """Measure."""
    signal.signal(signal.SIGTERM, _exit)
    names = [name.strip() for name in only.split(",")]
    if unknown := [name for name in names if name not in PARTS]:
        raise typer.BadParameter(f"no benchmark `{unknown[0]}`; there are {', '.join(PARTS)}")
    folder = out or (None if quick else RESULTS)
    found, failed = [], []
    for name in names:
        say(name)
        part, budget_seconds = PARTS[name]
        began = time.monotonic()
        try:
            result = part(quick, budget_seconds)
        except Exception:
            traceback.print_exc()
            failed.append(name)
            continue
        result.seconds, result.quick = time.monotonic() - began, quick
        found.append(result)
        if folder:
            result.save(folder)
    print("\n" + "\n".join(result.markdown() for result in found))
    if folder == RESULTS and not quick:
        report.fill()
    if failed:
        sys.exit(f"Failed: {', '.join(failed)}")


def _exit(*_: int | FrameType | None) -> None:
    """As an exception, so that every engine is ended."""
    raise SystemExit(143)


if __name__ == "__main__":
    app = typer.Typer(pretty_exceptions_enable=False, add_completion=False)
    app.command()(main)
    app()
