"""One line of an input file: OpenAI Batch format (https://platform.openai.com/docs/guides/batch), checked.

`check_line` has two paths with one meaning: a fast one that accepts what is plainly right, and a slow one that
decides everything else and says what is wrong. Tests hold them against each other.
"""

import json
import math
from collections import Counter
from enum import StrEnum
from typing import Annotated, Any, Literal, NamedTuple, NoReturn, get_args

import msgspec

MAX_NESTING = 100
MAX_ID_CHARACTERS = 4096
"""Of a custom_id and of a model's name: they are held in memory for many lines at once."""
Endpoint = Literal[
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/responses",
    "/v1/embeddings",
    "/v1/score",
    "/score",
    "/v1/rerank",
    "/rerank",
    "/v2/rerank",
]
ENDPOINTS: frozenset[str] = frozenset(get_args(Endpoint))


class Code(StrEnum):
    """Why a line is not sent."""

    INVALID_UTF8 = "invalid_utf8"
    INVALID_JSON = "invalid_json"
    NOT_AN_OBJECT = "not_an_object"
    LINE_TOO_LONG = "line_too_long"
    MISSING = "missing_required_parameter"
    INVALID_TYPE = "invalid_type"
    INVALID_METHOD = "invalid_method"
    INVALID_URL = "invalid_url"
    DUPLICATE_CUSTOM_ID = "duplicate_custom_id"
    MODEL_NOT_FOUND = "model_not_found"
    STREAM_NOT_SUPPORTED = "stream_not_supported"


class Request(NamedTuple):
    """A line that can be sent. `body` is the JSON text as it stood in the line; `model` is None where it names none."""

    custom_id: str
    url: str
    model: str | None
    body: bytes


class Rejected(Exception):
    """A line that cannot be sent: a code, a message for people, the field, and the custom_id where it is known."""

    def __init__(self, code: Code, message: str, param: str | None = None, custom_id: str | None = None) -> None:
        super().__init__(message)
        self.code, self.message, self.param, self.custom_id = code, message, param, custom_id


class _Envelope(msgspec.Struct, gc=False):
    body: msgspec.Raw


class _PlainEnvelope(_Envelope, gc=False):
    custom_id: Annotated[str, msgspec.Meta(min_length=1, max_length=MAX_ID_CHARACTERS)]
    method: Literal["POST"]
    url: Endpoint


_decode_envelope = msgspec.json.Decoder(_Envelope).decode
_decode_plain = msgspec.json.Decoder(_PlainEnvelope).decode
_decode_any = msgspec.json.Decoder().decode
_encode = msgspec.json.encode


def check_line(raw: bytes) -> Request:
    """The request in a line.

    Raises:
        Rejected: with the first thing that is wrong. `model_not_found` and `duplicate_custom_id` need more than the
            line and are found by the caller.
    """
    try:
        envelope = _decode_plain(raw)
        document = _decode_any(raw)
        body = document["body"]
        model = body.get("model")
        colons = raw.count(b":")
        plain = (
            (model is None or (type(model) is str and 0 < len(model) <= MAX_ID_CHARACTERS))
            and not body.get("stream")
            and (b"\\" not in raw or b"\\u00" not in raw)
            # Each level is an array or an object, and each object but the innermost has a colon.
            and (colons + raw.count(b"[") < MAX_NESTING or raw.count(b"{") + raw.count(b"[") <= MAX_NESTING)
            # A key that stands twice is dropped by the decoder, and its colon with it.
            and colons == _encode(document).count(b":")
        )
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, AttributeError, ValueError):
        plain = False
    if not plain:
        return _check_slowly(raw)
    return Request(envelope.custom_id, envelope.url, model, bytes(envelope.body))


def _check_slowly(raw: bytes) -> Request:
    document = _parse_strictly(raw)
    if not isinstance(document, dict):
        raise Rejected(Code.NOT_AN_OBJECT, f"a line must be a JSON object, this one is {_kind(document)}")
    given = document.get("custom_id")
    custom_id = given[:MAX_ID_CHARACTERS] if isinstance(given, str) and given else None

    def reject(code: Code, message: str, param: str) -> NoReturn:
        raise Rejected(code, message, param, custom_id)

    for field, wanted in (("custom_id", str), ("method", str), ("url", str), ("body", dict)):
        value = document.get(field)
        if value is None or value == "":
            reject(Code.MISSING, f"`{field}` is missing", field)
        if not isinstance(value, wanted):
            reject(Code.INVALID_TYPE, f"`{field}` must be {_name(wanted)}, not {_kind(value)}", field)
    method, url, body = document["method"], document["url"], document["body"]
    if method != "POST":
        reject(Code.INVALID_METHOD, f"`method` must be POST, not {method[:40]!r}", "method")
    if url not in ENDPOINTS:
        reject(Code.INVALID_URL, f"`url` {url[:80]!r} is not one of {', '.join(sorted(ENDPOINTS))}", "url")
    model = body.get("model")
    if model is not None and (not isinstance(model, str) or not model):
        reject(Code.INVALID_TYPE, f"`body.model` must be a non-empty string, not {_kind(model)}", "body.model")
    if len(document["custom_id"]) > MAX_ID_CHARACTERS:
        message = f"`custom_id` is longer than {MAX_ID_CHARACTERS} characters"
        reject(Code.INVALID_TYPE, message, "custom_id")
    if model is not None and len(model) > MAX_ID_CHARACTERS:
        reject(Code.INVALID_TYPE, f"`body.model` is longer than {MAX_ID_CHARACTERS} characters", "body.model")
    if body.get("stream"):
        reject(Code.STREAM_NOT_SUPPORTED, "`body.stream` is not supported in a batch; leave it out", "body.stream")
    assert custom_id is not None
    return Request(custom_id, url, model, bytes(_decode_envelope(raw).body))


def _parse_strictly(raw: bytes) -> Any:
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise Rejected(Code.INVALID_UTF8, f"not UTF-8 at byte {error.start + 1}") from None
    try:
        document = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
        _no_surprises(document, MAX_NESTING)
    except RecursionError:
        raise Rejected(Code.INVALID_JSON, f"nested deeper than {MAX_NESTING} levels") from None
    except json.JSONDecodeError as error:
        raise Rejected(Code.INVALID_JSON, f"not JSON at character {error.pos + 1}: {error.msg}") from None
    except ValueError as error:
        raise Rejected(Code.INVALID_JSON, str(error)) from None
    return document


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    document = dict(pairs)
    if len(document) != len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"the key {twice[:80]!r} stands twice in one object")
    return document


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _no_surprises(value: Any, levels: int) -> None:
    """Refuse what Python's parser lets through: lone surrogates, numbers over the range, deep nesting."""
    if isinstance(value, str):
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:
            raise ValueError("a string holds a lone surrogate (half of a \\u escape pair)") from None
    elif isinstance(value, float):
        if math.isinf(value):
            raise ValueError("a number is out of range")
    elif isinstance(value, dict | list):
        if levels == 0:
            raise RecursionError
        for item in value.items() if isinstance(value, dict) else value:
            if isinstance(item, tuple):
                _no_surprises(item[0], levels)
                _no_surprises(item[1], levels - 1)
            else:
                _no_surprises(item, levels - 1)


def _kind(value: Any) -> str:
    return "null" if value is None else _name(type(value))


def _name(kind: type) -> str:
    return {
        dict: "an object",
        list: "an array",
        str: "a string",
        bool: "a boolean",
        int: "a number",
        float: "a number",
    }[kind]
