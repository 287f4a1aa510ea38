"""kill -9 at any moment: no committed row is lost, none comes twice, and little is asked again.

A short form of `make torture` (tests/e2e/torture.py, which says how much is little).
"""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.torture import WINDOWS, Torture

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

ON_THE_WAY = [
    ("written input", 1),
    ("synced batch.json", 1),
    ("registered batch", 1),
    ("written requests", 1),
    ("ready requests", 1),
    ("published requests", 1),
    ("made generation", 1),
    ("synced manifest.json", 1),
    ("opened chunk", 2),
    ("written chunk", 2),
    ("synced chunk", 2),
    ("renamed chunk", 2),
    ("durable chunk", 2),
    ("merged chunk", 1),
    ("source removed chunk", 1),
    ("synced current.json", 1),
    ("renamed part", 1),
    ("ready revision", 1),
    ("link made output", 1),
]
"""In the order in which a run passes them: each is met by the run that goes on after the kill before."""

BEGUN_ANEW = [
    ("retry_failed", "renamed work.json", 1),
    ("retry_failed", "set aside requests", 1),
    ("retry_failed", "renamed chunk", 1),
    ("restart", "synced work.json", 1),
    ("restart", "source removed chunk", 2),
    ("restart", "published revision", 1),
    ("restart", "link switched output", 1),
]


@pytest.fixture
def torture(tmp_path: Path) -> Iterator[Torture]:
    with Torture(tmp_path, seed=7) as made:
        made.begin(160)
        yield made


def test_killed_at_every_step_of_the_way_a_batch_is_answered_once(torture: Torture) -> None:
    for window, nth in ON_THE_WAY:
        assert torture.killed("resume", window, nth), f"{window} was not passed"
    torture.complete()
    torture.heal()
    for mode, window, nth in BEGUN_ANEW:
        assert torture.killed(mode, window, nth), f"{window} was not passed by {mode}"
    torture.complete("restart")
    assert torture.passed == set(WINDOWS)
    assert torture.figures.kills == len(ON_THE_WAY) + len(BEGUN_ANEW)


def test_killed_whenever_it_pleases_the_dice_a_batch_is_answered_once(torture: Torture) -> None:
    for mode in ("resume", "restart"):
        for _ in range(4):
            torture.killed(mode)
        torture.complete(mode)
        torture.heal()
    assert torture.figures.kills >= 2


def test_run_that_nobody_kills_asks_every_line_once(torture: Torture) -> None:
    torture.complete()
    asked = torture.texts_asked()
    assert (len(asked), set(asked.values())) == (160, {1})
