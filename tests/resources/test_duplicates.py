"""Identical deterministic requests are asked once, and every line gets its own row."""

import asyncio
import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from resources.answering import Mode
from resources.batch_store.duplicates import Duplicates, is_deterministic
from resources.batch_store.outputs import verify_outputs
from resources.chunk_store.schema import ChunkRow
from resources.engine.protocol import EngineRequest, EngineResponse
from resources.errors import BatchStopped
from resources.progress import Progress
from tests.helpers import CHAT, Asked, catalog_of, chat, completion, refusal

DEDUPE = {"dedupe": True}


def echo(request: EngineRequest) -> EngineResponse:
    """The answer says what was asked."""
    question = json.loads(request.body)["messages"][-1]["content"]
    details = {"prompt_tokens": 3, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 1}}
    return EngineResponse(200, completion(f"re: {question}", usage=details), f"id-{request.line}")


def greedy(*questions: str) -> str:
    return "".join(chat(f"r{n}", question, temperature=0) for n, question in enumerate(questions, 1))


def test_identical_requests_are_asked_once_and_each_line_has_its_row(tmp_path: Path) -> None:
    asked = Asked(tmp_path, greedy("a", "b", "a", "c", "a", "b"), DEDUPE)
    assert sorted(asked.run(echo).lines) == [1, 2, 4]
    assert [row["text"] for row in asked.rows] == ["re: a", "re: b", "re: a", "re: c", "re: a", "re: b"]
    assert [row["custom_id"] for row in asked.rows] == [f"r{n}" for n in range(1, 7)]
    assert [row["attempt"] for row in asked.rows] == [1] * 6
    assert verify_outputs(asked.batch) == []
    assert (asked.report.asked, asked.report.copied) == (3, 3)
    lines = [json.loads(line) for line in (asked.batch.output_dir / "output.jsonl").read_text().splitlines()]
    assert [line["response"]["request_id"] for line in lines] == ["id-1", "id-2", "id-1", "id-4", "id-1", "id-2"]


def test_sums_over_rows_are_what_the_engine_did(tmp_path: Path) -> None:
    asked = Asked(tmp_path, greedy("a", "a", "a"), DEDUPE)
    asked.run(echo)
    assert [row["prompt_tokens"] for row in asked.rows] == [3, 0, 0]
    assert [row["completion_tokens"] for row in asked.rows] == [2, 0, 0]
    assert [row["cached_tokens"] for row in asked.rows] == [1, 0, 0]
    assert (asked.summary.prompt_tokens, asked.summary.completion_tokens) == (3, 2)


def test_without_the_option_everything_is_asked(tmp_path: Path) -> None:
    assert len(Asked(tmp_path, greedy("a", "a")).run(echo).lines) == 2


@pytest.mark.parametrize(
    ("body", "deterministic"),
    [
        ({}, False),
        ({"temperature": None}, False),
        ({"temperature": 0}, True),
        ({"temperature": 0.0}, True),
        ({"temperature": 0.7}, False),
        ({"temperature": False}, False),
        ({"temperature": "0"}, False),
        ({"temperature": 1, "seed": 7}, True),
        ({"seed": 0}, True),
        ({"seed": None}, False),
        ({"seed": True}, False),
    ],
)
def test_what_is_sampled_is_no_duplicate(body: dict[str, Any], deterministic: bool) -> None:
    for url in (CHAT, "/v1/completions", "/v1/responses"):
        assert is_deterministic(url, json.dumps(body).encode()) is deterministic
    for url in ("/v1/embeddings", "/v1/score", "/score", "/v1/rerank", "/rerank", "/v2/rerank"):
        assert is_deterministic(url, json.dumps(body).encode())


def test_sampled_lines_are_each_asked(tmp_path: Path) -> None:
    text = chat("a") + chat("b") + chat("c", temperature=0.5) + chat("d", temperature=0.5)
    assert len(Asked(tmp_path, text, DEDUPE).run(echo).lines) == 4


def test_bodies_count_as_they_are_sent(tmp_path: Path) -> None:
    text = chat("a") + chat("b", temperature=0) + chat("c", model="other") + chat("d", temperature=1)
    asked = Asked(tmp_path, text, {**DEDUPE, "model": "dry-run", "defaults": {"temperature": 0}})
    assert sorted(asked.run(echo).lines) == [1, 4]
    assert len(asked.rows) == 4


def test_the_same_body_for_another_endpoint_is_another_request() -> None:
    found = Duplicates([(1, "/v1/score", b"{}"), (2, "/score", b"{}"), (3, "/v1/score", b"{}")])
    assert found.followers.tolist() == [3]


def test_error_of_the_one_is_the_error_of_all_and_a_retry_asks_once(tmp_path: Path) -> None:
    asked = Asked(tmp_path, greedy("a", "a", "b", "a"), DEDUPE)
    asked.run(lambda request: refusal(400, "too long") if request.line == 1 else echo(request))
    assert [row["error_code"] for row in asked.rows] == ["http_400", "http_400", None, "http_400"]
    assert asked.run(echo, mode=Mode.RETRY_FAILED).lines == [1]
    assert [row["text"] for row in asked.rows] == ["re: a", "re: a", "re: b", "re: a"]
    assert [row["attempt"] for row in asked.rows] == [2, 2, 1, 2]


def test_many_copies_are_committed_in_chunks_of_the_wanted_size(tmp_path: Path) -> None:
    count = 950
    asked = Asked(tmp_path, greedy(*["a"] * count), {**DEDUPE, "chunk_rows": 100})
    assert asked.run(echo).lines == [1]
    (generation,) = [path for path in asked.batch.results_dir.glob("*/*") if path.is_dir()]
    assert len(list(generation.glob("chunk-*.parquet"))) == 10
    assert [row["line"] for row in asked.rows] == list(range(1, count + 1))


def test_copies_of_a_large_answer_are_committed_in_bounded_memory() -> None:
    found = Duplicates((line, CHAT, b'{"seed":1}') for line in range(1, 201))
    row = ChunkRow(1, 200, "r", b"x" * 1024 * 1024, "stop", None, None, 1, 1, 0, 1, 2, 1)
    sizes: list[int] = []
    found.commit([row], np.zeros(201, np.int8), 1000, lambda rows: sizes.append(len(rows)))
    assert sum(sizes) == 200
    assert max(sizes) <= 64


def test_progress_counts_the_copies(tmp_path: Path) -> None:
    told: list[Progress] = []
    asked = Asked(tmp_path, greedy(*["a"] * 30, "b"), DEDUPE)
    asked.run(lambda request: refusal(400) if request.line == 1 else echo(request), progress=told.append)
    last = [progress for progress in told if progress.phase == "answer"][-1]
    assert (last.done, last.total, last.failed) == (31, 31, 30)


def test_stopped_run_goes_on_with_the_groups_that_are_left(tmp_path: Path) -> None:
    stop = threading.Event()

    async def hang() -> EngineResponse:
        stop.set()
        await asyncio.Event().wait()
        raise AssertionError

    asked = Asked(tmp_path, greedy("a", "b", "a", "b", "b"), DEDUPE, catalog_of(concurrency=1))
    with pytest.raises(BatchStopped, match="2 of 5"):
        asked.run(lambda request: hang() if request.line == 2 else echo(request), stop=stop)
    assert asked.run(echo).lines == [2]
    assert [row["text"] for row in asked.rows] == ["re: a", "re: b", "re: a", "re: b", "re: b"]


def test_followers_whose_leader_is_committed_already_are_a_group_of_their_own(tmp_path: Path) -> None:
    """As after a kill between the commit of a leader and that of its copies."""
    asked = Asked(tmp_path, greedy("a", "a", "a"), {**DEDUPE, "chunk_rows": 1})
    asked.run(echo)
    (generation,) = [path for path in asked.batch.results_dir.glob("*/*") if path.is_dir()]
    for chunk in sorted(generation.glob("chunk-*.parquet"))[1:]:
        chunk.unlink()
    asked.batch.set_work(0, "resume")
    assert asked.run(echo).lines == [2]
    assert verify_outputs(asked.batch) == []
    assert [row["text"] for row in asked.rows] == ["re: a"] * 3


@settings(max_examples=30, deadline=None)
@given(
    lines=st.lists(
        st.tuples(st.sampled_from("abc"), st.sampled_from([{}, {"temperature": 0}, {"temperature": 1}, {"seed": 1}])),
        min_size=1,
        max_size=40,
    ),
    order=st.sampled_from(["input", "prefix", "longest_first"]),
    chunk_rows=st.integers(1, 10),
    refused=st.sampled_from(["", "a", "b"]),
)
def test_every_line_has_one_row_with_the_answer_to_its_own_question(
    tmp_path_factory: pytest.TempPathFactory,
    lines: list[tuple[str, dict[str, Any]]],
    order: str,
    chunk_rows: int,
    refused: str,
) -> None:
    text = "".join(chat(f"r{n}", question, **body) for n, (question, body) in enumerate(lines))
    asked = Asked(tmp_path_factory.mktemp("b"), text, {**DEDUPE, "order": order, "chunk_rows": chunk_rows})

    def reply(request: EngineRequest) -> EngineResponse:
        answer = echo(request)
        return refusal(400) if refused and f"re: {refused}".encode() in answer.body else answer

    engine = asked.run(reply)
    assert verify_outputs(asked.batch) == []
    assert [row["text"] for row in asked.rows] == [None if q == refused else f"re: {q}" for q, _ in lines]
    sampled = [1 for _, body in lines if body in ({}, {"temperature": 1})]
    groups = {(q, str(body)) for q, body in lines if body not in ({}, {"temperature": 1})}
    assert len(engine.lines) == len(sampled) + len(groups)
