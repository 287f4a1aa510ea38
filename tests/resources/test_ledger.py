"""Where the tokens went: into rows, or to waste."""

from pathlib import Path

from resources.chunk_store.ledger import Ledger, Tokens, booking
from resources.engine.dispatcher import Life
from resources.engine.protocol import Load


def life(made: tuple[int, int], useful: tuple[int, int], ended: str | None = "closed", before: int = 0) -> Life:
    first = Load(0, 0, before, before)
    return Life(first, Load(0, 0, before + made[0], before + made[1]), (0, 0), useful, ended)  # type: ignore[arg-type]


def test_what_is_not_in_rows_was_wasted(tmp_path: Path) -> None:
    Ledger(tmp_path, Tokens()).note([life((100, 50), (90, 50), before=1000), life((30, 9), (10, 2), "crashed")])
    booked = booking(tmp_path, Tokens(100, 52))
    assert booked is not None
    assert booked.as_dict() == {
        "useful": {"prompt": 100, "completion": 52},
        "wasted_by_retry": {"prompt": 10, "completion": 0},
        "wasted_by_crash": {"prompt": 20, "completion": 7},
        "lower_bound": True,
    }


def test_lives_of_later_runs_stand_beside_those_before(tmp_path: Path) -> None:
    Ledger(tmp_path, Tokens()).note([life((10, 10), (10, 10))])
    second = Ledger(tmp_path, Tokens(10, 10))
    second.note([life((5, 5), (0, 0), None)])
    second.note([life((8, 8), (7, 8))])
    booked = booking(tmp_path, Tokens(17, 18))
    assert booked is not None
    assert (booked.wasted_by_retry, booked.wasted_by_crash, booked.lower_bound) == (Tokens(1, 0), Tokens(), False)


def test_run_that_was_killed_is_settled_by_what_is_committed(tmp_path: Path) -> None:
    Ledger(tmp_path, Tokens()).note([life((10, 10), (10, 10)), life((20, 20), (18, 18), None)])
    # of the 18 that had finished, 12 were committed
    Ledger(tmp_path, Tokens(22, 22)).note([life((6, 6), (6, 6))])
    booked = booking(tmp_path, Tokens(28, 28))
    assert booked is not None
    assert (booked.wasted_by_crash, booked.wasted_by_retry, booked.lower_bound) == (Tokens(8, 8), Tokens(), True)


def test_life_shared_with_others_tells_nothing_of_our_waste(tmp_path: Path) -> None:
    shared = life((1000, 1000), (10, 10))
    shared.shared = True
    Ledger(tmp_path, Tokens()).note([shared, life((8, 8), (7, 8))])
    booked = booking(tmp_path, Tokens(17, 18))
    assert booked is not None
    assert (booked.wasted_by_retry, booked.lower_bound) == (Tokens(1, 0), True)


def test_engine_that_tells_nothing_is_not_booked(tmp_path: Path) -> None:
    Ledger(tmp_path, Tokens()).note([])
    assert booking(tmp_path, Tokens(5, 5)) is None
    (tmp_path / "usage.json").write_text('{"lives": [')
    assert booking(tmp_path, Tokens(5, 5)) is None
