"""Annotations and gold stars kept in step with a real Label Studio, and the datasets that are made of them."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from openai.types.chat import ChatCompletionMessageParam
from pydantic import TypeAdapter

from resources.errors import CurationError
from resources.label_studio.datasets import FORMATS, Dataset, Format, write_dataset
from resources.label_studio.quality import quality
from resources.label_studio.reviews import Reviews
from resources.label_studio.schema import load_schema
from tests.helpers import ok, read_jsonl
from tests.reviewing import Fault, Proxy, Reviewing, nth

pytestmark = pytest.mark.label_studio


def stars(reviewing: Reviewing) -> list[tuple[int, str]]:
    return [(row.line, row.final_response) for row in reviewing.reviews.gold_stars()]


def kinds(reviewing: Reviewing, after: int = 0) -> list[tuple[str, int]]:
    found = reviewing.reviews.changes(after)
    return [(event["type"].removeprefix("gold_star."), event["data"]["line"]) for event in found]


def dataset(reviewing: Reviewing, form: Format, share: float = 0.0) -> Dataset:
    found = reviewing.reviews.gold_stars()
    return write_dataset(reviewing.root / "datasets", "t", reviewing.schema, found, form, share)


@pytest.fixture
def reviewed(reviewing: Reviewing) -> Reviewing:
    return review(reviewing)


def review(reviewing: Reviewing) -> Reviewing:
    """Four answers: the first starred and mended, the second starred by the control, the third rated, the fourth
    untouched."""
    reviewing.load(reviewing.batch(4, lambda request: ok(request, f"answer {request.line}")))
    first, second, third, _ = (task["id"] for task in reviewing.tasks())
    reviewing.annotate(first, final_response="better 1", rating=5, _ground_truth=True)
    reviewing.annotate(second, final_response="answer 2", rating=4, gold_star=True)
    reviewing.annotate(third, final_response="answer 3", rating=1)
    reviewing.sync()
    return reviewing


def test_both_marks_make_a_gold_star_and_nothing_else_does(reviewed: Reviewing) -> None:
    assert stars(reviewed) == [(1, "better 1"), (2, "answer 2")]
    rows = reviewed.reviews.annotations()
    assert [(row.line, row.gold, row.edited, row.rating) for row in rows] == [
        (1, True, True, 5.0),
        (2, True, False, 4.0),
        (3, False, False, 1.0),
    ]
    assert {row.annotator for row in rows} == {"1"}
    assert rows[0].original_response == "answer 1"
    assert rows[0].prompt == "question 1 of batch 1"
    assert kinds(reviewed) == [("created", 1), ("created", 2)]


def test_a_cancelled_annotation_is_no_gold_star(reviewed: Reviewing) -> None:
    fourth = reviewed.tasks()[3]["id"]
    reviewed.annotate(fourth, final_response="x", gold_star=True, _was_cancelled=True, _ground_truth=True)
    assert reviewed.sync().gold == 2
    assert len(reviewed.reviews.annotations()) == 4


def test_what_people_change_is_followed_and_told(reviewed: Reviewing) -> None:
    first, second = (row.annotation for row in reviewed.reviews.gold_stars())
    seen = reviewed.reviews.state().number
    reviewed.change(first, _ground_truth=False)
    reviewed.change(second, final_response="changed 2", gold_star=True)
    fourth = reviewed.annotate(reviewed.tasks()[3]["id"], final_response="answer 4", gold_star=True)
    report = reviewed.sync()
    assert (report.created, report.updated, report.removed) == (1, 1, 1)
    assert kinds(reviewed, seen) == [("removed", 1), ("updated", 2), ("created", 4)]
    assert stars(reviewed) == [(2, "changed 2"), (4, "answer 4")]
    reviewed.delete("annotations", fourth)
    reviewed.sync()
    assert stars(reviewed) == [(2, "changed 2")]
    assert kinds(reviewed)[-1] == ("removed", 4)
    ids = [event["id"] for event in reviewed.reviews.changes()]
    assert len(set(ids)) == len(ids)


def test_nothing_new_makes_no_new_version(reviewed: Reviewing) -> None:
    before = reviewed.reviews.state()
    for full in (False, True):
        report = reviewed.sync(full=full)
        assert (report.created, report.updated, report.removed) == (0, 0, 0)
    assert reviewed.reviews.state().number == before.number
    assert reviewed.news() is None


def test_a_change_with_the_timestamp_of_the_cursor_is_not_missed(reviewed: Reviewing) -> None:
    """The cursor is moved to a change that was not read: the overlap brings it in."""
    reviewed.annotate(reviewed.tasks()[3]["id"], final_response="answer 4", gold_star=True)
    state = json.loads((reviewed.reviews.folder / "state.json").read_text())
    state["cursor"] = max(task["updated_at"] for task in reviewed.tasks())
    (reviewed.reviews.folder / "state.json").write_text(json.dumps(state))
    assert (4, "answer 4") not in stars(reviewed)
    reviewed.sync()
    assert (4, "answer 4") in stars(reviewed)


@pytest.mark.parametrize("page_size", [1, 2, 3])
def test_small_pages_find_what_a_large_one_does(reviewed: Reviewing, page_size: int) -> None:
    for task in reviewed.tasks():
        reviewed.annotate(task["id"], final_response="again", gold_star=True)
    assert reviewed.sync(page_size=page_size).annotations == 7


def test_a_deleted_task_takes_its_star_with_it_at_the_full_reconcile(reviewed: Reviewing) -> None:
    reviewed.delete("tasks", reviewed.tasks()[0]["id"])
    assert reviewed.sync(full=True).removed == 1
    assert stars(reviewed) == [(2, "answer 2")]


def test_a_deleted_project_takes_no_star_with_it(reviewed: Reviewing) -> None:
    reviewed.delete("projects", reviewed.project["id"])
    report = reviewed.sync(full=True)
    assert report.project_gone
    assert len(stars(reviewed)) == 2


def test_tasks_of_other_people_in_the_project_are_left_alone(reviewed: Reviewing) -> None:
    path = f"/api/projects/{reviewed.project['id']}/import?return_task_ids=true"
    data = {"prompt": "theirs", "response": "theirs", "conversation": [], "system": ""}
    (theirs,) = reviewed.server.ask("POST", path, [{"data": data}])["task_ids"]
    reviewed.annotate(theirs, final_response="x", gold_star=True)
    assert reviewed.sync(full=True).gold == 2


def test_news_are_seen_without_reading_them(reviewed: Reviewing) -> None:
    assert reviewed.news() is None
    annotation = reviewed.annotate(reviewed.tasks()[3]["id"], rating=1)
    assert reviewed.news() is not None
    reviewed.sync()
    assert reviewed.news() is None
    reviewed.delete("annotations", annotation)
    assert reviewed.news() is not None
    reviewed.sync()
    assert reviewed.news() is None


def test_a_sync_that_is_cut_off_before_its_commit_is_done_again_under_the_same_number(
    reviewed: Reviewing, monkeypatch: pytest.MonkeyPatch
) -> None:
    number = reviewed.reviews.state().number
    reviewed.annotate(reviewed.tasks()[3]["id"], final_response="answer 4", gold_star=True)

    def die(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Reviews, "_remove_older", die)
        real = Reviews._write_snapshot
        patch.setattr(Reviews, "_write_snapshot", lambda self, *rest: (real(self, *rest), die())[0])
        with pytest.raises(KeyboardInterrupt):
            reviewed.sync()
    assert kinds(reviewed) == [("created", 1), ("created", 2)]
    assert len(stars(reviewed)) == 2
    reviewed.sync()
    assert reviewed.reviews.state().number == number + 1
    assert kinds(reviewed) == [("created", 1), ("created", 2), ("created", 4)]


@pytest.fixture
def broken(reviewing: Reviewing) -> Iterator[tuple[Reviewing, Proxy]]:
    """What `reviewed` is, by a proxy that breaks nothing yet; all four tasks have one more star that is not read."""
    with Proxy(reviewing.server) as proxy:
        reviewing.url = proxy.url
        review(reviewing)
        for task in reviewing.tasks():
            reviewing.annotate(task["id"], final_response="again", gold_star=True)
        yield reviewing, proxy


PAGE_FAULTS = {"the connection breaks": Fault(), "500": Fault(500), "429": Fault(429, retry_after=7)}


@pytest.mark.parametrize("name", PAGE_FAULTS)
def test_a_page_that_goes_wrong_is_read_again(broken: tuple[Reviewing, Proxy], name: str) -> None:
    reviewing, proxy = broken
    proxy.rule = nth(2, "/api/tasks", PAGE_FAULTS[name], "GET")
    report = reviewing.sync(page_size=1)
    assert (report.annotations, report.gold) == (7, 6)
    assert len(reviewing.pauses) == 1
    assert (reviewing.pauses[0] >= 7) == (name == "429")


@pytest.mark.parametrize("status", [401, 403, 503])
def test_a_server_that_says_no_in_the_middle_leaves_what_was_known(
    broken: tuple[Reviewing, Proxy], status: int
) -> None:
    reviewing, proxy = broken
    before = (reviewing.reviews.state(), stars(reviewing))
    first = nth(1, "/api/tasks", Fault(), "GET")
    proxy.rule = lambda method, path: (
        Fault(status) if path.endswith("/api/tasks/") and not first(method, path) else None
    )
    with pytest.raises(CurationError, match=str(status)):
        reviewing.sync()
    assert (reviewing.reviews.state(), stars(reviewing)) == before
    proxy.rule = lambda method, path: None
    assert reviewing.sync().created == 4


def test_three_reviewers_of_one_task_are_three_annotations_and_one_example(reviewed: Reviewing) -> None:
    fourth = reviewed.tasks()[3]["id"]
    for text, rating in (("one", 3), ("two", 5), ("three", 4)):
        reviewed.annotate(fourth, final_response=text, rating=rating, gold_star=True)
    assert reviewed.sync().gold == 5
    chats = read_jsonl(dataset(reviewed, "chat").folder / "train.jsonl")
    assert [chat["messages"][-1]["content"] for chat in chats] == ["better 1", "answer 2", "two"]


# --- Datasets -------------------------------------------------------------------------------------------------------


def test_every_format_line_by_line(reviewed: Reviewing) -> None:
    one, two = "question 1 of batch 1", "question 2 of batch 1"
    lines = {form: read_jsonl(dataset(reviewed, form).folder / "train.jsonl") for form in FORMATS if form != "raw"}
    assert lines["chat"] == [
        {"messages": [{"role": "user", "content": one}, {"role": "assistant", "content": "better 1"}]},
        {"messages": [{"role": "user", "content": two}, {"role": "assistant", "content": "answer 2"}]},
    ]
    assert [line["metadata"]["rating"] for line in lines["icl"]] == [5.0, 4.0]
    for line in lines["chat"]:  # by the rules of OpenAI's fine-tuning: their types, nothing empty, an answer at the end
        messages = TypeAdapter(list[ChatCompletionMessageParam]).validate_python(line["messages"])
        assert all(str(message.get("content") or "").strip() for message in messages)
        assert messages[-1]["role"] == "assistant"
    assert lines["alpaca"][0] == {"instruction": one, "input": "", "output": "better 1"}
    assert lines["input_output"][0] == {"input": {"prompt": one}, "output": {"final_response": "better 1"}}
    assert lines["dpo"] == [{"prompt": one, "chosen": "better 1", "rejected": "answer 1"}]
    raw = pd.read_parquet(dataset(reviewed, "raw").folder / "train.parquet")
    assert raw["final_response"].tolist() == ["better 1", "answer 2"]
    card = dataset(reviewed, "dpo").card
    assert card["counts"] == {"gold_stars": 2, "duplicates_removed": 0, "left_out": 1, "train": 1, "validation": 0}


def test_an_unstarred_example_leaves_the_next_version_while_the_old_one_stays(reviewed: Reviewing) -> None:
    old = dataset(reviewed, "chat")
    before = {path.name: path.read_bytes() for path in old.folder.iterdir()}
    assert not dataset(reviewed, "chat").is_new
    reviewed.change(reviewed.reviews.gold_stars()[0].annotation, _ground_truth=False)
    reviewed.sync()
    new = dataset(reviewed, "chat")
    assert new.is_new
    assert new.version != old.version
    assert new.train == 1
    assert {path.name: path.read_bytes() for path in old.folder.iterdir()} == before
    assert (old.folder.parent / "latest").readlink() == Path(new.version)


def test_the_star_of_an_answer_that_came_later_keeps_the_answer_it_was_given_for(reviewed: Reviewing) -> None:
    row = reviewed.reviews.gold_stars()[0]
    assert row.original_response == "answer 1"
    reviewed.load(reviewed.batch(4, lambda request: ok(request, f"later {request.line}")))
    reviewed.sync(full=True)
    assert reviewed.reviews.gold_stars()[0].original_response == "answer 1"


def test_answers_that_are_json_are_stars_of_their_fields(reviewing: Reviewing) -> None:
    reviewing.schema = load_schema("candidate_evaluation")
    answer = {"recommendation": "YES", "reasoning": "Ships.", "trajectory_rating": 4, "note": "kept"}
    reviewing.load(reviewing.batch(2, lambda request: ok(request, json.dumps(answer))))
    same, changed = (task["id"] for task in reviewing.tasks())
    values = {name: value for name, value in answer.items() if name != "note"}
    reviewing.annotate(same, **values, gold_star=True)
    reviewing.annotate(changed, **{**values, "recommendation": "NO"}, gold_star=True)
    reviewing.sync()
    first, second = reviewing.reviews.gold_stars()
    assert (first.edited, first.final_response) == (False, json.dumps(answer))
    assert second.edited
    assert json.loads(second.final_response) == {**answer, "recommendation": "NO"}
    line = read_jsonl(dataset(reviewing, "input_output").folder / "train.jsonl")[1]
    assert line["output"]["recommendation"] == "NO"
    assert line["output"]["is_software_engineer"] is None
    (numbers,) = quality(reviewing.reviews.annotations())
    assert numbers["edit_rate"] == 0.5
    assert numbers["gold_rate"] == 1.0
    assert numbers["agreement"] == {"reasoning": 1.0, "recommendation": 0.5, "trajectory_rating": 1.0}
