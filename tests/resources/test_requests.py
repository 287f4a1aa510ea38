"""Checking a line: what is refused, with which code, and that the two paths mean the same."""

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from resources.batch_format.lines import open_regular
from resources.batch_format.requests import ENDPOINTS, MAX_NESTING, Code, Rejected, Request, _check_slowly, check_line
from resources.batch_store.checking import check_stream
from tests.helpers import catalog_of, chat

CHAT = "/v1/chat/completions"


def line(**changes: Any) -> bytes:
    """A valid line with other fields; None takes a field out."""
    document = {"custom_id": "a", "method": "POST", "url": CHAT, "body": {"model": "m"}} | changes
    return json.dumps({key: value for key, value in document.items() if value is not None}).encode()


def with_body(text: str) -> bytes:
    return f'{{"custom_id":"a","method":"POST","url":"{CHAT}","body":{text}}}'.encode()


def nested(levels: int) -> bytes:
    """A line that is nested that many levels deep: the line, its body, and arrays in it."""
    return with_body('{"x":' + "[" * (levels - 2) + "1" + "]" * (levels - 2) + "}")


def outcome(check: Any, raw: bytes) -> tuple[Any, ...]:
    try:
        return tuple(check(raw))
    except Rejected as bad:
        return bad.code, bad.param, bad.custom_id, bad.message


@pytest.mark.parametrize(
    ("raw", "code", "param", "custom_id"),
    [
        (b'{"custom_id":"\xff"}', Code.INVALID_UTF8, None, None),
        (b"\xc3", Code.INVALID_UTF8, None, None),
        (b"not json", Code.INVALID_JSON, None, None),
        (line()[:-1], Code.INVALID_JSON, None, None),
        (line() + b"x", Code.INVALID_JSON, None, None),
        (line() + line(), Code.INVALID_JSON, None, None),
        (with_body('{"t":NaN}'), Code.INVALID_JSON, None, None),
        (with_body('{"t":Infinity}'), Code.INVALID_JSON, None, None),
        (with_body('{"t":-Infinity}'), Code.INVALID_JSON, None, None),
        (with_body('{"t":1e999}'), Code.INVALID_JSON, None, None),
        (with_body('{"t":%s}' % ("9" * 5000)), Code.INVALID_JSON, None, None),
        (with_body('{"t":1,"t":2}'), Code.INVALID_JSON, None, None),
        (b'{"custom_id":"a","custom_id":"b","method":"POST"}', Code.INVALID_JSON, None, None),
        (with_body('{"a":{"b":[{"t":1,"t":1}]}}'), Code.INVALID_JSON, None, None),
        (with_body('{"t":1,"\\u0074":2}'), Code.INVALID_JSON, None, None),
        (with_body('{"a:b":1,"a\\u003ab":2}'), Code.INVALID_JSON, None, None),
        (with_body('{"t":"x\\u003ay","t":"x"}'), Code.INVALID_JSON, None, None),
        (with_body('{"a/b":1,"a\\/b":2}'), Code.INVALID_JSON, None, None),
        (with_body('{"t":"\\ud800"}'), Code.INVALID_JSON, None, None),
        (with_body('{"\\udfff":1}'), Code.INVALID_JSON, None, None),
        (with_body('{"t":"\\udc00\\ud800"}'), Code.INVALID_JSON, None, None),
        (nested(MAX_NESTING + 1), Code.INVALID_JSON, None, None),
        (nested(100_000), Code.INVALID_JSON, None, None),
        (b"[1]", Code.NOT_AN_OBJECT, None, None),
        (b'"text"', Code.NOT_AN_OBJECT, None, None),
        (b"null", Code.NOT_AN_OBJECT, None, None),
        (b"5", Code.NOT_AN_OBJECT, None, None),
        (line(custom_id=None), Code.MISSING, "custom_id", None),
        (line(custom_id=""), Code.MISSING, "custom_id", None),
        (line(method=None), Code.MISSING, "method", "a"),
        (line(url=None), Code.MISSING, "url", "a"),
        (line(body=None), Code.MISSING, "body", "a"),
        (b"{}", Code.MISSING, "custom_id", None),
        (line(custom_id=5), Code.INVALID_TYPE, "custom_id", None),
        (line(method=True), Code.INVALID_TYPE, "method", "a"),
        (line(url=[CHAT]), Code.INVALID_TYPE, "url", "a"),
        (line(body=[]), Code.INVALID_TYPE, "body", "a"),
        (line(body="{}"), Code.INVALID_TYPE, "body", "a"),
        (line(body={"model": 5}), Code.INVALID_TYPE, "body.model", "a"),
        (line(body={"model": ""}), Code.INVALID_TYPE, "body.model", "a"),
        (line(method="GET"), Code.INVALID_METHOD, "method", "a"),
        (line(method="post"), Code.INVALID_METHOD, "method", "a"),
        (line(url="/v1/models"), Code.INVALID_URL, "url", "a"),
        (line(url="https://api.openai.com/v1/chat/completions"), Code.INVALID_URL, "url", "a"),
        (line(url=CHAT + "/"), Code.INVALID_URL, "url", "a"),
        (line(body={"model": "m", "stream": True}), Code.STREAM_NOT_SUPPORTED, "body.stream", "a"),
        (line(body={"model": "m", "stream": "yes"}), Code.STREAM_NOT_SUPPORTED, "body.stream", "a"),
    ],
)
def test_bad_line_gets_its_code_and_field(raw: bytes, code: Code, param: str | None, custom_id: str | None) -> None:
    with pytest.raises(Rejected) as caught:
        check_line(raw)
    assert (caught.value.code, caught.value.param, caught.value.custom_id) == (code, param, custom_id)
    assert caught.value.message


@pytest.mark.parametrize("url", sorted(ENDPOINTS))
def test_every_endpoint_is_taken(url: str) -> None:
    assert check_line(line(url=url)).url == url


@pytest.mark.parametrize(
    "raw",
    [
        nested(MAX_NESTING),
        line(body={"model": "m", "stream": False}),
        line(body={"model": "m", "stream": None}),
        line(extra="a field that we do not know"),
        line(custom_id="ümläut:\U0001f600\x00"),
        with_body('{"model":"m","t":"\\ud83d\\ude00 \\u003a \\u0000"}'),
        with_body('{"model":"m","n":123456789012345678901234567890,"f":-0.0,"e":1E-999}'),
        b' \t{ "custom_id" : "a" , "method":"POST","url":"/v1/embeddings","body": { } } '.strip(),
    ],
)
def test_odd_but_valid_line_is_taken(raw: bytes) -> None:
    assert isinstance(check_line(raw), Request)


def test_body_is_passed_on_verbatim() -> None:
    body = '{ "model":"m",  "temperature":1.0, "seed":1e2, "text":"\\u00e9 \\/ é", "n":[ 1,2 ] }'
    assert check_line(with_body(body)).body == body.encode()


def test_line_without_model_has_none() -> None:
    assert check_line(line(body={})).model is None


def test_repeated_key_in_a_large_object_is_found_in_linear_time() -> None:
    keys = ",".join(f'"k{number}":1' for number in range(100_000))
    with pytest.raises(Rejected, match="'last' stands twice"):
        check_line(with_body(f'{{{keys},"last":1,"last":2}}'))


_texts = st.one_of(
    st.text(max_size=8),
    st.sampled_from(["", ":", "\\", '"', "\x00", "\\u003a", "model", "stream", "a:b", "é", "\U0001f600", "{", "[1]"]),
)
_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(allow_nan=False), _texts),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(_texts, inner, max_size=3)),
    max_leaves=8,
)
_documents = st.fixed_dictionaries(
    {
        "custom_id": st.one_of(_texts, st.just("a")),
        "method": st.sampled_from(["POST", "POST", "POST", "GET"]),
        "url": st.sampled_from([*sorted(ENDPOINTS), "/v1/other"]),
        "body": st.dictionaries(st.one_of(_texts, st.sampled_from(["model", "stream"])), _values, max_size=4),
    },
    optional={"extra": _values},
)
_pieces = [
    b'"',
    b":",
    b"\\",
    b"\\u0061",
    b"\\ud800",
    b"{",
    b"}",
    b"[",
    b",",
    b"1e999",
    b"NaN",
    b'"a":1,',
    b"\xff",
    b" ",
]
_mutations = st.lists(
    st.tuples(st.floats(0, 1), st.sampled_from(["insert", "delete", "copy"]), st.sampled_from(_pieces)), max_size=3
)


def _mutated(raw: bytes, mutations: list[tuple[float, str, bytes]]) -> bytes:
    for where, how, piece in mutations:
        at = int(where * len(raw))
        if how == "insert":
            raw = raw[:at] + piece + raw[at:]
        elif how == "delete":
            raw = raw[:at] + raw[at + 1 :]
        else:
            raw = raw[:at] + raw[at : at + 12] + raw[at:]
    return raw


@settings(max_examples=100, deadline=None)
@given(document=_documents, mutations=_mutations, ascii_only=st.booleans(), compact=st.booleans())
def test_fast_and_slow_path_mean_the_same(document: Any, mutations: Any, ascii_only: bool, compact: bool) -> None:
    text = json.dumps(document, ensure_ascii=ascii_only, separators=(",", ":") if compact else None)
    raw = _mutated(text.encode("utf-8", "surrogatepass"), mutations)
    fast = outcome(check_line, raw)
    assert fast == outcome(_check_slowly, raw)
    if not isinstance(fast[0], Code):
        accepted = msgspec.json.decode(fast[3])
        assert accepted == json.loads(raw)["body"]


def check_file(tmp_path: Any, content: bytes, model: str | None = None) -> Any:
    source = tmp_path / "in.jsonl"
    source.write_bytes(content)
    folder = tmp_path / "requests"
    folder.mkdir()
    with open_regular(source) as stream:
        return check_stream(stream, ".jsonl", model, catalog_of("dry-run", aliases=("alias",)), folder)


def rejects(summary: Any) -> list[tuple[int, str, str | None, str | None]]:
    return [(r["line"], r["error_code"], r["error_param"], r["custom_id"]) for r in summary.first_rejects]


def test_line_numbers_count_blank_lines_and_every_code_is_reported_with_its_line(tmp_path: Any) -> None:
    def text(*args: Any, **fields: Any) -> bytes:
        return chat(*args, **fields).rstrip().encode()

    summary = check_file(
        tmp_path,
        b"\n".join(
            [
                b"\xef\xbb\xbf" + text("a") + b"\r",
                b"",
                b"  \t\r",
                text("b", model="alias"),
                text("a"),
                text("c", model="nobody"),
                text("d", model=None),
                b"x" * (16 * 1024 * 1024 + 1),
                b"{",
                text("a", model="nobody"),
                text("b", stream=True),
                text("truncated")[:-5],
            ]
        ),
    )
    assert (summary.lines, summary.valid, summary.rejected, summary.last_line) == (10, 2, 8, 12)
    assert rejects(summary) == [
        (5, "duplicate_custom_id", "custom_id", "a"),
        (6, "model_not_found", "body.model", "c"),
        (7, "missing_required_parameter", "body.model", "d"),
        (8, "line_too_long", None, None),
        (9, "invalid_json", None, None),
        (10, "model_not_found", "body.model", "a"),
        (11, "stream_not_supported", "body.stream", "b"),
        (12, "invalid_json", None, None),
    ]
    assert summary.models == {"dry-run": 2}


def test_a_bad_line_does_not_take_the_custom_id_from_a_good_one(tmp_path: Any) -> None:
    lines = [chat("a", stream=True), chat("a"), chat("a")]
    summary = check_file(tmp_path, "".join(lines).encode())
    assert [(r[0], r[1]) for r in rejects(summary)] == [(1, "stream_not_supported"), (3, "duplicate_custom_id")]


def test_option_model_stands_for_that_of_every_line(tmp_path: Any) -> None:
    lines = [chat("a", model="nobody"), chat("b", model=None)]
    summary = check_file(tmp_path, "".join(lines).encode(), model="alias")
    assert (summary.valid, summary.models) == (2, {"dry-run": 2})


def test_repeated_custom_ids_far_apart_are_found(tmp_path: Any) -> None:
    count = 70_000  # more than one part
    lines = [
        b'{"custom_id":"%d","method":"POST","url":"/v1/score","body":{"model":"dry-run"}}' % (n % (count - 1))
        for n in range(count)
    ]
    summary = check_file(tmp_path, b"\n".join(lines))
    assert rejects(summary) == [(count, "duplicate_custom_id", "custom_id", "0")]
