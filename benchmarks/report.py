"""Fills the tables of docs/benchmarks.md from the JSON of the last run, so that no number is typed by hand.

python -m benchmarks.report
"""

import re
from pathlib import Path

from benchmarks.common import RESULTS, ROOT, Report

DOCUMENT = ROOT / "docs" / "benchmarks.md"
_PLACE = re.compile(r"(<!-- (\w+): filled by benchmarks/report.py -->\n).*?(<!-- end -->)", re.S)


def fill(document: Path = DOCUMENT, results: Path = RESULTS) -> None:
    """Replace what stands at each place by the table of that benchmark; places without a result stay as they are."""

    def table(place: re.Match[str]) -> str:
        path = results / f"{place[2]}.json"
        return f"{place[1]}{Report.load(path).markdown()}{place[3]}" if path.is_file() else place[0]

    document.write_text(_PLACE.sub(table, document.read_text()))


if __name__ == "__main__":
    fill()
