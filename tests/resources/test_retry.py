"""What a retry asks again: errors, cut answers, answers that do not fit; and nothing twice when it is cut off."""

import asyncio
import json
import threading
from datetime import timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from resources import pipeline
from resources.answering import Mode
from resources.chunk_store.retry import FailureKind, Failures, failures_of
from resources.engine.protocol import EngineRequest, EngineResponse
from resources.errors import BatchStopped, OptionsError
from tests.helpers import Asked, catalog_of, chat, completion, refusal

KINDS = ["fine", "error", "cut", "misfit", "cut misfit", "fine"]
RETRY = Mode.RETRY_FAILED


def question_of(request: EngineRequest) -> str:
    return str(json.loads(request.body)["messages"][-1]["content"])


def answer(request: EngineRequest) -> EngineResponse:
    """As the question says."""
    question = question_of(request)
    if question == "error":
        return refusal(400)
    text = "no object" if "misfit" in question else '{"said": "yes"}'
    return reply(request, text, "length" if "cut" in question else "stop")


def reply(request: EngineRequest, text: str, finish: str = "stop") -> EngineResponse:
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish}
    return EngineResponse(200, completion(choices=[choice]), request.request_id)


def better(request: EngineRequest) -> EngineResponse:
    return reply(request, '{"said": "better"}')


def asked_once(folder: Path, kinds: list[str] = KINDS, **options: Any) -> Asked:
    text = "".join(chat(f"r{n}", kind, response_format={"type": "json_object"}) for n, kind in enumerate(kinds))
    asked = Asked(folder, text, options, catalog_of(concurrency=1))
    asked.run(answer)
    return asked


@pytest.mark.parametrize(
    ("failed", "lines"),
    [
        ("errors", [2]),
        ("truncated", [3, 5]),
        ("schema", [4, 5]),
        ("errors,schema", [2, 4, 5]),
        (" errors, truncated ,schema", [2, 3, 4, 5]),
    ],
)
def test_what_is_chosen_is_asked_again_and_nothing_else_changes(tmp_path: Path, failed: str, lines: list[int]) -> None:
    asked = asked_once(tmp_path)
    before = asked.rows
    assert asked.run(better, mode=RETRY, failed=failures_of(failed.split(","))).lines == lines
    for old, new in zip(before, asked.rows, strict=True):
        again = old["line"] in lines
        assert new["attempt"] == (2 if again else 1)
        assert again or new == old
        assert not again or new["text"] == '{"said": "better"}'


def test_errors_are_what_a_retry_asks_where_nothing_is_said(tmp_path: Path) -> None:
    assert asked_once(tmp_path).run(better, mode=RETRY).lines == [2]


def test_latest_attempt_is_shown_also_where_it_is_worse(tmp_path: Path) -> None:
    asked = asked_once(tmp_path)
    asked.run(lambda request: refusal(400), mode=RETRY, failed=failures_of(["truncated"]))
    assert [row["status_code"] for row in asked.rows] == [200, 400, 400, 200, 400, 200]
    assert asked.run(better, mode=RETRY, failed=failures_of(["truncated"])).lines == []


def test_a_line_is_judged_by_its_latest_row(tmp_path: Path) -> None:
    asked = asked_once(tmp_path)
    failed = failures_of(["schema"])
    asked.run(better, mode=RETRY, failed=failed)
    assert asked.run(better, mode=RETRY, failed=failed).lines == []
    assert asked.summary.schema_violations == 0


def cut_off(asked: Asked, failed: Failures, after: int) -> list[int]:
    """A retry that is stopped when so many lines have been asked again, all as bad as before; these lines."""
    stop, seen = threading.Event(), []

    async def hang() -> EngineResponse:
        stop.set()
        await asyncio.Event().wait()
        raise AssertionError

    def some(request: EngineRequest) -> Any:
        if len(seen) == after:
            return hang()
        seen.append(request.line)
        return answer(request)

    with pytest.raises(BatchStopped):
        asked.run(some, mode=RETRY, failed=failed, stop=stop)
    return seen


@pytest.mark.parametrize("again", [{}, {"mode": RETRY, "failed": failures_of(["truncated", "schema"])}])
def test_retry_that_was_cut_off_goes_on_with_the_same_choice_and_repeats_nothing(
    tmp_path: Path, again: dict[str, Any]
) -> None:
    asked = asked_once(tmp_path, ["error", *["cut"] * 3, *["misfit"] * 3])
    assert cut_off(asked, failures_of(["truncated", "schema"]), after=4) == [2, 3, 4, 5]
    assert not pipeline.is_complete(asked.batch, asked.catalog)
    assert asked.run(better, **again).lines == [6, 7]
    assert pipeline.is_complete(asked.batch, asked.catalog)
    assert asked.batch.work().retry is None


def test_clock_that_was_set_back_keeps_nothing_from_a_retry(tmp_path: Path) -> None:
    asked = asked_once(tmp_path)
    (path,) = asked.batch.results_dir.glob("*/*/chunk-*.parquet")
    rows = pq.read_table(path)
    later = pc.add(rows["finished_at"], pa.scalar(timedelta(days=1)))
    pq.write_table(rows.set_column(rows.column_names.index("finished_at"), rows.field("finished_at"), later), path)
    assert asked.run(better, mode=RETRY).lines == [2]


def test_another_choice_is_another_retry(tmp_path: Path) -> None:
    asked = asked_once(tmp_path, ["error", "cut", "cut"])
    assert cut_off(asked, failures_of(["truncated"]), after=1) == [2]
    assert asked.run(better, mode=RETRY, failed=failures_of(["truncated", "errors"])).lines == [1, 2, 3]


def test_retry_begun_by_an_older_version_asks_the_errors(tmp_path: Path) -> None:
    asked = asked_once(tmp_path)
    (asked.batch.root / "work.json").write_text('{"restarts": 0, "mode": "retry_failed"}')
    assert asked.run(better).lines == [2]


def test_names_are_checked() -> None:
    assert failures_of(["errors", " schema"]) == {FailureKind.ERRORS, FailureKind.SCHEMA}
    for wrong in (["error"], [""], [], ["errors", "all"]):
        with pytest.raises(OptionsError, match="is none of errors, truncated, schema"):
            failures_of(wrong)
