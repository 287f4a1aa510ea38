"""The import against a real Label Studio: each row exactly one task, whatever happens on the way."""

import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from resources.answering import Mode
from resources.chunk_store.retry import FailureKind, failures_of
from resources.engine.protocol import EngineRequest, EngineResponse
from resources.errors import CurationError, LabelStudioDown, LabelStudioRefused
from resources.label_studio import importing
from resources.label_studio.schema import load_schema
from tests.helpers import ROOT, completion, ok, refusal
from tests.reviewing import Fault, Proxy, Reviewing, nth

pytestmark = pytest.mark.label_studio

GOOD = '{"recommendation": "yes", "reasoning": "Ships.", "trajectory_rating": 4, "is_software_engineer": true}'


def answering(*texts: str) -> Callable[[EngineRequest], EngineResponse]:
    """Answers lines 1, 2 and so on with these texts."""
    return lambda request: ok(request, texts[request.line - 1])


@pytest.fixture
def small_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importing, "PAGE_ROWS", 4)


def test_every_successful_row_is_one_task_with_the_answer_filled_in(reviewing: Reviewing) -> None:
    def reply(request: EngineRequest) -> EngineResponse:
        return refusal(400) if request.line == 2 else ok(request, f"answer {request.line}")

    report = reviewing.load(reviewing.batch(3, reply))
    assert (report.rows, report.tasks, report.imported) == (2, 2, 2)
    assert report.is_complete
    first, third = reviewing.tasks()
    assert first["data"]["prompt"] == "question 1 of batch 1"
    assert first["data"]["response"] == "answer 1"
    assert first["data"]["conversation"] == [{"role": "user", "content": "question 1 of batch 1"}]
    wanted = {"line": 3, "custom_id": "r3", "model": "dry-run"}
    assert third["data"].items() >= wanted.items()
    assert third["meta"]["source"] == "vllm_batch_pipelines"
    (prediction,) = third["predictions"]
    assert prediction["model_version"] == "dry-run"
    assert prediction["score"] is None
    (region,) = prediction["result"]
    assert region["value"] == {"text": ["answer 3"]}


def test_an_import_that_is_repeated_changes_nothing(reviewing: Reviewing, small_pages: None) -> None:
    asked = reviewing.batch(10)
    assert reviewing.load(asked).imported == 10
    before = reviewing.tasks()
    again = reviewing.load(asked)
    assert (again.imported, again.there_before, again.tasks) == (0, 10, 10)
    assert [task["id"] for task in reviewing.tasks()] == [task["id"] for task in before]
    assert [task["updated_at"] for task in reviewing.tasks()] == [task["updated_at"] for task in before]


def test_a_lost_journal_is_made_good_from_the_server(reviewing: Reviewing) -> None:
    asked = reviewing.batch(5)
    reviewing.load(asked)
    for path in [*asked.batch.review_dir.iterdir(), *reviewing.reviews.folder.iterdir()]:
        path.unlink()
    assert reviewing.load(asked).imported == 0
    assert reviewing.lines() == [1, 2, 3, 4, 5]


def test_json_answers_are_filled_in_and_those_that_do_not_fit_are_counted(reviewing: Reviewing) -> None:
    reviewing.schema = load_schema("candidate_evaluation")
    fenced = f"Here you are:\n```json\n{GOOD}\n```"
    made_up = GOOD.replace("yes", "PERHAPS")
    report = reviewing.load(reviewing.batch(4, answering(GOOD, fenced, "no idea", made_up)))
    assert (report.tasks, report.prefilled, report.not_fitting) == (4, 2, 2)
    assert [misfit["problem"] for misfit in report.misfits] == [
        "not a JSON object",
        "`recommendation` does not fit a choice",
    ]
    good, also, none, made = reviewing.tasks()
    regions = {region["from_name"]: region["value"] for region in good["predictions"][0]["result"]}
    assert regions == {
        "recommendation": {"choices": ["YES"]},
        "reasoning": {"text": ["Ships."]},
        "trajectory_rating": {"rating": 4},
        "is_software_engineer": {"choices": ["Yes"]},
    }
    assert also["predictions"][0]["result"] == good["predictions"][0]["result"]
    assert none["predictions"] == made["predictions"] == []


def test_a_score_comes_from_logprobs_alone_and_only_where_the_schema_asks_for_it(reviewing: Reviewing) -> None:
    def reply(request: EngineRequest) -> EngineResponse:
        body = json.loads(completion("fine"))
        if request.line == 1:
            tokens = [{"token": "fi", "logprob": math.log(0.25)}, {"token": "ne", "logprob": 0.0}]
            body["choices"][0]["logprobs"] = {"content": tokens}
        return EngineResponse(200, json.dumps(body).encode(), "r")

    def scores() -> list[float | None]:
        return [task["predictions"][0]["score"] for task in reviewing.tasks()]

    reviewing.load(reviewing.batch(2, reply))
    assert scores() == [None, None]
    rendering = reviewing.schema.rendering.model_copy(update={"score": True})
    reviewing.schema = reviewing.schema.model_copy(update={"rendering": rendering})
    reviewing.load(reviewing.batch(2, reply))
    assert sorted(scores(), key=str) == [0.5, None, None, None]


@pytest.mark.parametrize("kind", ["legacy", "personal"])
def test_both_kinds_of_tokens_are_taken(reviewing: Reviewing, kind: str) -> None:
    if kind == "personal":
        reviewing.token = reviewing.server.personal_access_token()
    assert reviewing.load(reviewing.batch(2)).is_complete


def test_text_that_databases_and_json_trip_over_is_imported(reviewing: Reviewing) -> None:
    def reply(request: EngineRequest) -> EngineResponse:
        body = completion("x").replace(b'"x"', b'"nul \\u0000 <script>alert(1)</script> \\ud83d\\ude00"')
        return EngineResponse(200, body, "r")

    assert reviewing.load(reviewing.batch(1, reply)).is_complete
    (task,) = reviewing.tasks()
    assert "\0" not in task["data"]["response"]
    assert "<script>alert(1)</script> \U0001f600" in task["data"]["response"]


# --- Rows answered again --------------------------------------------------------------------------------------------


def ask_truncated_again(asked: Any, text: str) -> None:
    asked.run(lambda request: ok(request, text), mode=Mode.RETRY_FAILED, failed=failures_of([FailureKind.TRUNCATED]))


def cut(request: EngineRequest) -> EngineResponse:
    body = json.loads(completion(f"cut {request.line}"))
    body["choices"][0]["finish_reason"] = "length"
    return EngineResponse(200, json.dumps(body).encode(), "r")


def test_a_row_answered_again_changes_its_task_while_nobody_has_annotated_it(reviewing: Reviewing) -> None:
    asked = reviewing.batch(3, cut)
    reviewing.load(asked)
    first, second, third = (task["id"] for task in reviewing.tasks())
    reviewing.annotate(second, rating=4)
    reviewing.annotate(third, _was_cancelled=True)
    ask_truncated_again(asked, "whole")
    report = reviewing.load(asked)
    assert (report.updated, report.new_after_annotation, report.imported) == (1, 2, 2)
    assert report.is_complete
    tasks = reviewing.tasks()
    assert [(task["data"]["line"], task["data"]["response"]) for task in tasks] == [
        (1, "whole"),
        (2, "cut 2"),
        (2, "whole"),
        (3, "cut 3"),
        (3, "whole"),
    ]
    assert tasks[0]["id"] == first
    (prediction,) = tasks[0]["predictions"]
    assert prediction["result"][0]["value"] == {"text": ["whole"]}
    assert tasks[1]["predictions"][0]["result"][0]["value"] == {"text": ["cut 2"]}
    assert reviewing.load(asked).imported == 0


def test_a_draft_of_a_person_counts_as_their_work(reviewing: Reviewing) -> None:
    asked = reviewing.batch(1, cut)
    reviewing.load(asked)
    (task,) = reviewing.tasks()
    body = {"result": task["predictions"][0]["result"], "lead_time": 1, "draft_id": 0}
    reviewing.server.ask("POST", f"/api/tasks/{task['id']}/drafts?project={reviewing.project['id']}", body)
    ask_truncated_again(asked, "whole")
    assert reviewing.load(asked).new_after_annotation == 1
    assert [found["data"]["response"] for found in reviewing.tasks()] == ["cut 1", "whole"]


# --- Faults on the way ----------------------------------------------------------------------------------------------


IMPORT = "/import"
FAULTS = {
    "the reply is lost after the work": Fault(forward=True),
    "the connection breaks before the work": Fault(),
    "500 after the work": Fault(500, forward=True),
    "500 without the work": Fault(500),
    "504 after the work": Fault(504, forward=True),
    "429": Fault(429, retry_after=3),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_page_that_goes_wrong_leaves_each_row_once(reviewing: Reviewing, small_pages: None, name: str) -> None:
    asked = reviewing.batch(10)
    with Proxy(reviewing.server, nth(2, IMPORT, FAULTS[name])) as proxy:
        reviewing.url = proxy.url
        report = reviewing.load(asked)
    assert report.is_complete
    assert reviewing.lines() == [*range(1, 11)]
    if name == "429":
        assert 3.0 in reviewing.pauses


def test_an_import_that_the_server_does_later_is_waited_for(reviewing: Reviewing) -> None:
    polls = 0

    def rule(method: str, path: str) -> Fault | None:
        nonlocal polls
        if method == "POST" and path.endswith(IMPORT):
            return Fault(forward=True, body={"import": 77})
        if path.rstrip("/").endswith("imports/77"):
            polls += 1
            done = {"status": "completed", **proxy.replies[0]}
            return Fault(200, body=done if polls > 2 else {"status": "in_progress"})
        return None

    with Proxy(reviewing.server, rule) as proxy:
        reviewing.url = proxy.url
        report = reviewing.load(reviewing.batch(3))
    assert polls == 3
    assert report.is_complete
    assert reviewing.lines() == [1, 2, 3]


def test_a_page_that_arrives_after_all_leaves_no_second_task(reviewing: Reviewing, small_pages: None) -> None:
    """The server takes a page, is slow, and does it after we have looked for it in vain and sent it again."""
    held: list[tuple[str, list[dict[str, Any]]]] = []
    asked = reviewing.batch(6)

    def rule(method: str, path: str) -> Fault | None:
        if method == "POST" and path.endswith(IMPORT):
            if not held:
                held.append((path, []))
                return Fault()
            if len(held) == 1:
                held.append((path, []))
                tasks = [
                    {"data": task["data"], "meta": task["meta"], "predictions": []} for task in copies_of_page(asked)
                ]
                reviewing.server.ask("POST", path, tasks)
        return None

    def copies_of_page(asked: Any) -> list[dict[str, Any]]:
        from resources.label_studio.tasks import fill_in, make_task, review_rows

        rows = [row for row in review_rows(asked.batch) if row.line <= 4]
        return [make_task(asked.batch, reviewing.schema, row, fill_in(reviewing.schema, row)) for row in rows]

    with Proxy(reviewing.server, rule) as proxy:
        reviewing.url = proxy.url
        report = reviewing.load(asked)
    assert report.duplicates_removed == 4
    assert report.is_complete
    assert reviewing.lines() == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(("status", "words"), [(401, "the token is not taken"), (403, "the token may not do that")])
def test_a_token_that_is_refused_in_the_middle_keeps_what_is_done(
    reviewing: Reviewing, small_pages: None, status: int, words: str
) -> None:
    asked = reviewing.batch(10)
    with Proxy(reviewing.server, nth(2, IMPORT, Fault(status))) as proxy:
        reviewing.url = proxy.url
        with pytest.raises(LabelStudioRefused, match=words):
            reviewing.load(asked)
        assert reviewing.lines() == [1, 2, 3, 4]
        assert reviewing.load(asked).imported == 6
    assert reviewing.lines() == [*range(1, 11)]


def test_a_wrong_token_is_told_without_being_shown(reviewing: Reviewing) -> None:
    reviewing.token = "5ecret" * 6
    with pytest.raises(LabelStudioRefused, match="401, the token is not taken") as raised:
        reviewing.load(reviewing.batch(1))
    assert "5ecret" not in str(raised.value)
    assert "5ecret" not in repr(reviewing.connection)


def test_a_server_that_is_down_is_tried_and_then_told(reviewing: Reviewing) -> None:
    asked = reviewing.batch(3)
    with Proxy(reviewing.server, lambda method, path: Fault(503)) as proxy:
        reviewing.url = proxy.url
        with pytest.raises(LabelStudioDown, match="503"):
            reviewing.load(asked)
        assert len(proxy.seen) == 5
    with pytest.raises(LabelStudioDown, match="not reached"):
        reviewing.load(asked)
    assert reviewing.pauses == sorted(reviewing.pauses[:4]) + sorted(reviewing.pauses[4:])


_CHILD = """
import os, signal, sys
from pathlib import Path
from pydantic import SecretStr
from resources.batch_store.store import BatchStore
from resources.label_studio import importing
from resources.label_studio.client import LabelStudioClient
from resources.label_studio.connection import Connection
from resources.label_studio.schema import load_schema
data, key, url, title, folder, token, page = sys.argv[1:]
importing.PAGE_ROWS = 4
connection = Connection("t", url, title, load_schema("generic"), SecretStr(token))
batch = BatchStore(Path(data)).get(key)
class Dying(LabelStudioClient):
    sends = 0
    def import_tasks(self, project, tasks):
        Dying.sends += 1
        if page == f"before {Dying.sends}":
            os.kill(os.getpid(), signal.SIGKILL)
        ids = super().import_tasks(project, tasks)
        if page == f"after {Dying.sends}":
            os.kill(os.getpid(), signal.SIGKILL)
        return ids
with batch.lock("a child"):
    importing.import_batch(batch, Dying(connection), connection, Path(folder))
"""


@pytest.mark.parametrize("page", ["before 1", "after 1", "before 2", "after 2", "after 3"])
def test_an_import_killed_at_any_moment_is_gone_on_with(reviewing: Reviewing, small_pages: None, page: str) -> None:
    asked = reviewing.batch(10)
    arguments = [asked.folder / "data", asked.batch.key, reviewing.server.url, reviewing.title]
    arguments += [reviewing.reviews.folder, reviewing.server.account.token, page]
    child = subprocess.run(
        [sys.executable, "-c", _CHILD, *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        timeout=60,
        check=False,
    )
    assert child.returncode == -signal.SIGKILL
    report = reviewing.load(asked)
    assert report.is_complete
    assert report.duplicates_removed == 0
    assert reviewing.lines() == [*range(1, 11)]


# --- What people do to the project ----------------------------------------------------------------------------------


def test_a_task_that_a_person_deleted_stays_deleted_unless_asked_for(reviewing: Reviewing) -> None:
    asked = reviewing.batch(4)
    reviewing.load(asked)
    reviewing.delete("tasks", reviewing.tasks()[1]["id"])
    report = reviewing.load(asked)
    assert (report.imported, report.deleted_by_people, report.tasks) == (0, 1, 3)
    assert report.is_complete
    assert reviewing.lines() == [1, 3, 4]
    assert reviewing.load(asked, reimport_deleted=True).imported == 1
    assert reviewing.lines() == [1, 2, 3, 4]


def test_a_project_that_a_person_deleted_takes_its_batches_with_it_but_not_new_ones(reviewing: Reviewing) -> None:
    old = reviewing.batch(3)
    reviewing.load(old)
    reviewing.delete("projects", reviewing.project["id"])
    new = reviewing.batch(2)
    assert reviewing.load(new).imported == 2
    report = reviewing.load(old)
    assert (report.imported, report.deleted_by_people) == (0, 3)
    assert len(reviewing.tasks()) == 2
    assert reviewing.load(old, reimport_deleted=True).imported == 3


def test_a_project_is_found_by_its_name_and_kept_when_a_person_renames_it(reviewing: Reviewing) -> None:
    made = reviewing.server.ask("POST", "/api/projects/", {"title": reviewing.title})
    asked = reviewing.batch(2)
    assert reviewing.load(asked).project == made["id"]
    reviewing.server.ask("PATCH", f"/api/projects/{made['id']}/", {"title": f"{reviewing.title} renamed"})
    assert reviewing.load(asked).project == made["id"]
    assert reviewing.load(reviewing.batch(1)).project == made["id"]


def test_a_project_that_was_made_although_the_reply_was_lost_is_found(reviewing: Reviewing) -> None:
    with Proxy(reviewing.server, nth(1, "/api/projects", Fault(forward=True))) as proxy:
        reviewing.url = proxy.url
        assert reviewing.load(reviewing.batch(1)).is_complete
        assert proxy.count("POST", "/api/projects") == 1


def test_a_label_config_that_a_person_extended_stays(reviewing: Reviewing) -> None:
    reviewing.load(reviewing.batch(1))
    project = reviewing.project
    extra = '<TextArea name="comment" toName="response_shown"/></View>'
    config = project["label_config"][: -len("</View>")] + extra
    reviewing.server.ask("PATCH", f"/api/projects/{project['id']}/", {"label_config": config})
    report = reviewing.load(reviewing.batch(1))
    assert "changed by a person" in report.note
    assert "comment" in reviewing.project["label_config"]


def test_a_label_config_that_would_break_annotations_is_refused(reviewing: Reviewing) -> None:
    asked = reviewing.batch(1)
    reviewing.load(asked)
    (task,) = reviewing.tasks()
    annotation = reviewing.annotate(task["id"], rating=5)
    before = reviewing.project["label_config"]
    reviewing.schema = load_schema("candidate_evaluation")
    with pytest.raises(CurationError, match=r"would lose the controls final_response, rating"):
        reviewing.load(asked)
    assert reviewing.project["label_config"] == before
    reviewing.delete("annotations", annotation)
    assert reviewing.load(asked).is_complete
    assert "recommendation" in reviewing.project["label_config"]


def test_a_row_whose_prediction_is_refused_goes_without_it(reviewing: Reviewing) -> None:
    """A person took an option away: answers that name it are imported all the same."""
    reviewing.schema = load_schema("candidate_evaluation")
    bad = GOOD.replace("yes", "maybe")
    reviewing.load(reviewing.batch(1, answering(GOOD)))
    project = reviewing.project
    config = project["label_config"].replace('<Choice value="MAYBE" />', '<Choice value="LATER" />')
    reviewing.server.ask("PATCH", f"/api/projects/{project['id']}/", {"label_config": config})
    report = reviewing.load(reviewing.batch(5, answering(GOOD, bad, GOOD, GOOD, bad)))
    assert report.is_complete
    assert report.imported == 5
    if report.without_predictions:  # the server looks closely at predictions only where that is switched on there
        assert report.without_predictions == 2


def test_a_journal_with_a_torn_last_line_is_read_up_to_it(reviewing: Reviewing) -> None:
    asked = reviewing.batch(2)
    reviewing.load(asked)
    with (asked.batch.review_dir / "t.jsonl").open("ab") as stream:
        stream.write(b'{"sent": [[3, 9, "torn')
    assert reviewing.load(asked).tasks == 2
    reviewing.delete("tasks", reviewing.tasks()[0]["id"])
    assert reviewing.load(asked).deleted_by_people == 1
