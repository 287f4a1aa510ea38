"""Answers: what is read out of a body, and lines that the official client's types take."""

import asyncio
import json
from typing import Any

import msgspec
import pyarrow as pa
import pytest
from openai.types import BatchError, Completion, CreateEmbeddingResponse
from openai.types.chat import ChatCompletion
from openai.types.responses import Response
from pydantic import BaseModel

from resources.batch_format.answers import Summary, error_line, one_line, response_lines, summarize
from resources.batch_format.requests import ENDPOINTS
from resources.engine.null import NullEngine
from resources.engine.protocol import EngineRequest
from tests.helpers import completion

OPENAI_TYPES: dict[str, type[BaseModel]] = {
    "/v1/chat/completions": ChatCompletion,
    "/v1/completions": Completion,
    "/v1/responses": Response,
    "/v1/embeddings": CreateEmbeddingResponse,
}


def null_body(url: str, body: bytes = b"{}") -> bytes:
    answer = asyncio.run(NullEngine().ask(EngineRequest(1, url, body, "id")))
    assert (answer.status, answer.request_id) == (200, "id")
    return answer.body


def encoded(document: Any) -> bytes:
    return json.dumps(document).encode()


@pytest.mark.parametrize("url", sorted(OPENAI_TYPES))
def test_null_engine_answers_with_openai_types(url: str) -> None:
    OPENAI_TYPES[url].model_validate_json(null_body(url), strict=True)


@pytest.mark.parametrize("url", sorted(ENDPOINTS))
def test_null_engine_answers_every_endpoint_alike_every_time_and_never_passes_for_a_model(url: str) -> None:
    assert json.loads(null_body(url))["model"] == "null"
    assert null_body(url) == null_body(url)
    assert null_body(url) != null_body(url, b'{"a":1}')
    assert b"\n" not in null_body(url)


def test_output_line_holds_the_body_as_it_came() -> None:
    body = completion('say "hi"\n\u2028 ümläut')
    row = [["batch_req_1"], ['a"b\n'], [200], ["r-1"], [body.decode()]]
    (line,) = response_lines(*(pa.array(column) for column in row)).to_pylist()
    assert line.count("\n") == 1
    assert line.endswith("}\n")
    assert body.decode() in line
    document = json.loads(line)
    assert set(document) == {"id", "custom_id", "response", "error"}
    assert (document["id"], document["custom_id"], document["error"]) == ("batch_req_1", 'a"b\n', None)
    assert (document["response"]["status_code"], document["response"]["request_id"]) == (200, "r-1")
    answer = ChatCompletion.model_validate(document["response"]["body"], strict=True)
    assert answer.choices[0].message.content == 'say "hi"\n\u2028 ümläut'


def test_error_line_holds_the_error_of_openai_types() -> None:
    document = json.loads(error_line("batch_req_1", None, "invalid_json", 'not "JSON"\n', 7, "body"))
    assert (document["response"], document["custom_id"]) == (None, None)
    error = BatchError.model_validate(document["error"], strict=True)
    assert (error.code, error.line, error.param, error.message) == ("invalid_json", 7, "body", 'not "JSON"\n')


def test_error_line_of_a_request_that_was_sent_has_code_and_message_alone() -> None:
    document = json.loads(error_line("batch_req_1", "a", "request_timeout", "no answer"))
    assert document["error"] == {"code": "request_timeout", "message": "no answer"}


def test_body_of_many_lines_becomes_one() -> None:
    body = json.dumps({"a": ["x\ny", 1.0], "b": {}}, indent=2).replace("\n", "\r\n").encode()
    assert b"\n" not in one_line(body)
    assert b"\r" not in one_line(body)
    assert json.loads(one_line(body)) == json.loads(body)
    with pytest.raises(msgspec.DecodeError):
        one_line(b'{"a":\n')


USAGE = {"prompt_tokens": 3, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 1}}
RESPONSE = {
    "status": "completed",
    "output": [
        {"type": "reasoning", "content": [{"type": "reasoning_text", "text": "hm"}]},
        {"type": "message", "content": [{"type": "output_text", "text": "a"}, {"type": "output_text", "text": "b"}]},
    ],
    "usage": {"input_tokens": 3, "output_tokens": 2, "input_tokens_details": {"cached_tokens": 1}},
}


@pytest.mark.parametrize(
    ("body", "summary"),
    [
        (
            {"choices": [{"message": {"content": "hi"}, "finish_reason": "length"}], "usage": USAGE},
            Summary("hi", "length", 3, 2, 1),
        ),
        ({"choices": [{"text": "hi", "finish_reason": "stop"}], "usage": USAGE}, Summary("hi", "stop", 3, 2, 1)),
        (
            {"choices": [{"message": {"content": None, "tool_calls": []}, "finish_reason": "tool_calls"}]},
            Summary(None, "tool_calls"),
        ),
        ({"choices": [{"message": {"content": [{"text": "part"}]}}]}, Summary()),
        (RESPONSE, Summary("ab", "stop", 3, 2, 1)),
        (
            RESPONSE | {"status": "incomplete", "incomplete_details": {"reason": "max_output_tokens"}},
            Summary("ab", "length", 3, 2, 1),
        ),
        (RESPONSE | {"status": "failed", "output": []}, Summary(None, "failed", 3, 2, 1)),
        ({"data": [{"embedding": [0.5]}], "usage": {"prompt_tokens": 3, "total_tokens": 3}}, Summary(None, None, 3)),
        ({"error": {"message": "no"}}, Summary()),
        ({"choices": []}, Summary()),
    ],
)
def test_summary_of_each_kind_of_answer(body: Any, summary: Summary) -> None:
    assert summarize(encoded(body)) == summary


@pytest.mark.parametrize(
    "body",
    [
        b"[]",
        b"null",
        b'"text"',
        b'{"choices":5}',
        b'{"choices":[5]}',
        b'{"choices":[{"message":"hi"}]}',
        b'{"usage":[]}',
        b'{"usage":{"prompt_tokens":"3"}}',
        b'{"usage":{"prompt_tokens":99999999999}}',
        b'{"usage":{"completion_tokens":-1}}',
    ],
)
def test_odd_shape_has_an_empty_summary(body: bytes) -> None:
    assert summarize(body) == Summary()


@pytest.mark.parametrize("body", [b"", b"garbage", b'{"choices":[]', b'{"choices":5} and more'])
def test_what_is_not_json_has_no_summary(body: bytes) -> None:
    with pytest.raises(msgspec.DecodeError):
        summarize(body)
