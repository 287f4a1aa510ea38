"""Answers held against the JSON schema that their request asked for."""

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from resources.chunk_store.generation import Generation
from resources.engine.protocol import EngineRequest, EngineResponse
from resources.structured_outputs import AskedSchemas, asked_schema, fits
from tests.helpers import CHAT, Asked, catalog_of, chat, completion, ok, refusal

NUMBER = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"], "additionalProperties": False}
JSON_SCHEMA = {"type": "json_schema", "json_schema": {"name": "number", "schema": NUMBER}}


def encoded(schema: Any) -> bytes:
    return json.dumps(schema).encode()


@pytest.mark.parametrize(
    ("url", "body", "schema"),
    [
        (CHAT, {"response_format": JSON_SCHEMA}, NUMBER),
        ("/v1/completions", {"response_format": JSON_SCHEMA}, NUMBER),
        (CHAT, {"response_format": {"type": "json_object"}}, {"type": "object"}),
        (CHAT, {"structured_outputs": {"json": NUMBER}}, NUMBER),
        (CHAT, {"structured_outputs": {"json": json.dumps(NUMBER)}}, NUMBER),
        (CHAT, {"structured_outputs": {"json_object": True}}, {"type": "object"}),
        (CHAT, {"guided_json": NUMBER}, NUMBER),
        (CHAT, {"response_format": JSON_SCHEMA, "structured_outputs": {"json": {}}}, NUMBER),
        (CHAT, {"response_format": {"type": "text"}, "structured_outputs": {"json": {}}}, {}),
        ("/v1/responses", {"text": {"format": {"type": "json_schema", "name": "n", "schema": NUMBER}}}, NUMBER),
        ("/v1/responses", {"text": {"format": {"type": "json_object"}}}, {"type": "object"}),
    ],
)
def test_schema_is_found_wherever_a_request_may_ask_for_it(url: str, body: dict[str, Any], schema: Any) -> None:
    found = asked_schema(url, encoded(body))
    assert found is not None
    assert json.loads(found) == schema


@pytest.mark.parametrize(
    ("url", "body"),
    [
        (CHAT, {"messages": [{"content": 'say "json_schema"'}]}),
        (CHAT, {"response_format": {"type": "text"}}),
        (CHAT, {"response_format": "json_schema"}),
        (CHAT, {"response_format": {"type": "json_schema"}}),
        (CHAT, {"response_format": {"type": "json_schema", "json_schema": "no"}}),
        (CHAT, {"structured_outputs": {"regex": "json"}, "guided_json": None, "text": "json"}),
        ("/v1/embeddings", {"response_format": JSON_SCHEMA}),
    ],
)
def test_request_without_a_schema_asks_for_none(url: str, body: dict[str, Any]) -> None:
    assert asked_schema(url, encoded(body)) is None


@pytest.mark.parametrize(
    ("text", "fit"),
    [('{"n": 1}', True), ('{"n": "1"}', False), ("{}", False), ('{"n": 1', False), ("n is 1", False), ("", False)],
)
def test_answer_fits_or_does_not(text: str, fit: bool) -> None:
    assert fits(encoded(NUMBER), text) is fit


@pytest.mark.parametrize(
    "schema",
    [
        b"not json",
        b"5",
        encoded({"type": "no such type"}),
        encoded({"pattern": "("}),
        encoded({"$ref": "#/$defs/missing"}),
        encoded({"$ref": "#"}),
        encoded({"$schema": {}}),
    ],
)
def test_schema_that_is_none_judges_nothing(schema: bytes) -> None:
    assert fits(schema, '"text"') is None


def test_reference_to_another_host_is_not_followed() -> None:
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_error(404)

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            schema = {"$ref": f"http://127.0.0.1:{server.server_address[1]}/schema.json"}
            assert fits(encoded(schema), "5") is None
        finally:
            server.shutdown()
            thread.join()
    assert asked == []


def test_pattern_that_backtracks_for_ever_is_given_up() -> None:
    schema = {"type": "string", "pattern": "^(a|aa)+$"}
    assert fits(encoded(schema), json.dumps("a" * 60 + "!")) is None
    assert fits(encoded(schema), json.dumps("aaa")) is True
    assert fits(encoded(schema), json.dumps("b")) is False


def test_nothing_is_kept_for_requests_without_a_schema() -> None:
    schemas, rows = AskedSchemas(), [object()]
    schemas.note(1, CHAT, b'{"messages":[]}')
    assert schemas.judge(rows) is rows  # type: ignore[arg-type]


ANSWERS = {"good": ('{"n": 1}', True), "bad": ("none", False), "cut": (None, False), "tool": (None, None)}


def answer(request: EngineRequest) -> EngineResponse:
    question = json.loads(request.body)["messages"][-1]["content"]
    if question == "refused":
        return refusal(400)
    if question not in ANSWERS:
        return ok(request)
    text, _ = ANSWERS[question]
    finish = {"cut": "length", "tool": "tool_calls"}.get(question, "stop")
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish}
    return EngineResponse(200, completion(choices=[choice]), request.request_id)


def test_answers_that_do_not_fit_are_counted_and_stay_answers(tmp_path: Path) -> None:
    text = "".join(chat(name, name, response_format=JSON_SCHEMA) for name in [*ANSWERS, "refused"])
    text += chat("free", "bad") + chat("odd", "good", response_format={"type": "json_schema", "json_schema": 5})
    asked = Asked(tmp_path, text)
    asked.run(answer)
    assert (asked.summary.schema_violations, asked.summary.succeeded, asked.summary.failed) == (2, 6, 1)
    (chunk,) = asked.batch.results_dir.glob("*/*/chunk-*.parquet")
    fit = {row["line"]: row["fits_schema"] for row in pq.read_table(chunk).to_pylist()}
    assert [fit[line] for line in sorted(fit)] == [*(fits for _, fits in ANSWERS.values()), None, None, None]


def test_schema_from_the_defaults_of_the_batch_counts_and_copies_are_judged_as_their_leader(tmp_path: Path) -> None:
    options = {"defaults": {"response_format": JSON_SCHEMA, "temperature": 0}, "dedupe": True}
    asked = Asked(tmp_path, chat("a", "bad") + chat("b", "good") + chat("c", "bad"), options)
    assert sorted(asked.run(answer).lines) == [1, 2]
    assert asked.summary.schema_violations == 2


def test_chunks_from_before_the_column_are_read_and_merged(tmp_path: Path) -> None:
    asked = Asked(tmp_path, "".join(chat(f"r{n}", "bad", response_format=JSON_SCHEMA) for n in range(4)))
    asked.run(answer)
    (path,) = asked.batch.results_dir.glob("*/*/chunk-*.parquet")
    older = pq.read_table(path).drop_columns(["fits_schema"]).replace_schema_metadata(None)
    pq.write_table(older.slice(0, 2), path)
    asked.batch.set_work(0, "resume")
    assert len(asked.run(answer).lines) == 2
    assert asked.summary.schema_violations == 2
    generation = Generation.of(asked.batch.results_dir, catalog_of().get("dry-run"))
    (number,) = generation.chunk_numbers()
    table = generation.read_chunk(number)
    assert isinstance(table, pa.Table)
    assert sorted(zip(table["line"].to_pylist(), table["fits_schema"].to_pylist(), strict=True), key=str) == [
        (1, None), (2, None), (3, False), (4, False),
    ]  # fmt: skip
