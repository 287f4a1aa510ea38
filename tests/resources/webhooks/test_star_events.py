"""Each change among the gold stars reaches the outbox of each webhook that asks for it, and none is lost on the way."""

from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

from resources.label_studio.reviews import Reviews
from resources.webhooks.deliveries import Deliveries
from resources.webhooks.star_events import announce_changes
from resources.webhooks.target import STARS, WebhookTarget
from tests.receiver import SECRET
from tests.reviewing import is_cut_off, read_stars, star


@pytest.fixture
def reviews(tmp_path: Path) -> Reviews:
    return Reviews(tmp_path / "curation", "hiring")


def deliveries(folder: Path, *names: str, **fields: Any) -> Deliveries:
    given = {"url": SecretStr("https://example.org/"), "secret": SECRET, "events": list(STARS)} | fields
    return Deliveries(folder, {name: WebhookTarget(name=name, **given) for name in names})


def waiting(made: Deliveries, name: str) -> list[tuple[int, str, int]]:
    events = [one.event for one in made.outbox.waiting(name)]
    return sorted((event.data["number"], event.type, event.data["line"]) for event in events)


def take(made: Deliveries, name: str) -> list[str]:
    """What a delivery does: the ids of what waits, which is then gone."""
    found = made.outbox.waiting(name)
    for one in found:
        made.outbox.remove(one)
    return [one.event.id for one in found]


def test_each_change_is_told_once(reviews: Reviews, tmp_path: Path) -> None:
    made = deliveries(tmp_path, "mirror")
    read_stars(reviews, star(1), star(2))
    assert announce_changes(reviews, made) == {"mirror": 2}
    read_stars(reviews, star(2, final_response="better"))
    assert announce_changes(reviews, made) == {"mirror": 2}
    assert waiting(made, "mirror") == [
        (1, "gold_star.created", 1),
        (1, "gold_star.created", 2),
        (2, "gold_star.removed", 1),
        (2, "gold_star.updated", 2),
    ]
    (update,) = [one.event for one in made.outbox.waiting("mirror") if one.event.type == "gold_star.updated"]
    assert (update.data["target"], update.data["final_response"], update.batch) == ("hiring", "better", None)
    assert announce_changes(reviews, made) == {}


def test_a_webhook_hears_what_it_asks_for_and_one_defined_later_all_there_ever_was(
    reviews: Reviews, tmp_path: Path
) -> None:
    read_stars(reviews, star(1))
    read_stars(reviews)
    removals = deliveries(tmp_path, "removals", events=["gold_star.removed"])
    assert announce_changes(reviews, removals) == {"removals": 1}
    assert announce_changes(reviews, deliveries(tmp_path, "removals", "mirror")) == {"mirror": 2}


def test_nothing_is_noted_while_nobody_listens(reviews: Reviews, tmp_path: Path) -> None:
    read_stars(reviews, star(1))
    assert announce_changes(reviews, deliveries(tmp_path, "batches", events=["batch.completed"])) == {}
    assert not (reviews.folder / "announced.json").exists()
    assert announce_changes(reviews, deliveries(tmp_path, "mirror")) == {"mirror": 1}


def test_signs_that_end_a_line_elsewhere_are_part_of_an_answer(reviews: Reviews, tmp_path: Path) -> None:
    made = deliveries(tmp_path, "mirror")
    read_stars(reviews, star(1, final_response="one\u2028two\u0085three\r\nfour"))
    assert announce_changes(reviews, made) == {"mirror": 1}
    (event,) = [one.event for one in made.outbox.waiting("mirror")]
    assert event.data["final_response"] == "one\u2028two\u0085three\r\nfour"


def test_reviews_that_were_never_read_tell_nothing(reviews: Reviews, tmp_path: Path) -> None:
    assert announce_changes(reviews, deliveries(tmp_path, "mirror")) == {}


def test_broken_off_at_any_moment_every_event_comes_with_its_id(tmp_path: Path) -> None:
    """A delivery takes what waits in between, so that only what is announced again is there again."""
    steps = 0
    while True:
        steps += 1
        folder = tmp_path / str(steps)
        reviews, made = Reviews(folder / "curation", "t"), deliveries(folder, "one", "two")
        read_stars(reviews, star(1), star(2))
        read_stars(reviews, star(2), star(3))
        wanted = {change["id"] for change in reviews.changes()}
        was_cut = is_cut_off(lambda reviews=reviews, made=made: announce_changes(reviews, made), steps)
        before = {name: take(made, name) for name in ("one", "two")}
        announce_changes(reviews, made)
        after = {name: take(made, name) for name in ("one", "two")}
        for name in ("one", "two"):
            assert {*before[name], *after[name]} == wanted
        if not was_cut:
            assert after == {"one": [], "two": []}
            break
    assert steps > 30  # four changes for two webhooks, each several steps
