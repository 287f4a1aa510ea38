"""Whether an answer fits the JSON schema that its request asked for.

A request asks for one in `response_format`, in `text.format` (responses), or in vLLM's `structured_outputs` or the
older `guided_json`. Engines hold answers to it in most cases: not one that `max_tokens` cuts, and not all engines do.
"""

from functools import lru_cache
from typing import Any

import msgspec

from resources.batch_format.answers import summarize
from resources.chunk_store.schema import ChunkRow

_PATTERN_SECONDS = 1.0
_ANY_OBJECT: dict[str, Any] = {"type": "object"}
_TEXT_ENDPOINTS = frozenset({"/v1/chat/completions", "/v1/completions", "/v1/responses"})


class _Asked(msgspec.Struct):
    response_format: Any = None
    text: Any = None
    structured_outputs: Any = None
    guided_json: Any = None


_decode_asked = msgspec.json.Decoder(_Asked).decode
_decode = msgspec.json.Decoder().decode
_encode = msgspec.json.encode


class AskedSchemas:
    """The schemas of the requests in flight, by line; nothing is kept for one without. `note` and `judge` may be called
    in two threads."""

    def __init__(self) -> None:
        self._by_line: dict[int, bytes] = {}

    def note(self, line: int, url: str, body: bytes) -> None:
        """Keep the schema that a body as it is sent asks for."""
        if b"json" in body and (schema := asked_schema(url, body)) is not None:
            self._by_line[line] = _shared(schema)

    def judge(self, rows: list[ChunkRow]) -> list[ChunkRow]:
        """The rows, with `fits_schema` where a schema was noted; forgets it."""
        return [self._judged(row) for row in rows] if self._by_line else rows

    def _judged(self, row: ChunkRow) -> ChunkRow:
        schema = self._by_line.pop(row.line, None)
        if schema is None or row.failed or row.response is None:
            return row
        text = summarize(row.response).text
        if text is None:  # a tool call, say; or cut off before the answer began
            return row._replace(fits_schema=False) if row.finish_reason == "length" else row
        return row._replace(fits_schema=fits(schema, text))


def asked_schema(url: str, body: bytes) -> bytes | None:
    """The JSON schema that an answer is to fit, as JSON text; None where the request asks for none."""
    if url not in _TEXT_ENDPOINTS:
        return None
    asked = _decode_asked(body)
    ways = (
        _of_format(asked.response_format),
        _of_format(_get(asked.text, "format")),
        _get(asked.structured_outputs, "json"),
        _ANY_OBJECT if _get(asked.structured_outputs, "json_object") is True else None,
        asked.guided_json,
    )
    found = next((schema for schema in ways if schema is not None), None)
    if found is None:
        return None
    return found.encode() if isinstance(found, str) else _encode(found)


def _of_format(wanted: Any) -> Any:
    """The schema of a `response_format`, or of a `text.format`, which has it one level higher."""
    kind = _get(wanted, "type")
    if kind == "json_object":
        return _ANY_OBJECT
    return _get(_get(wanted, "json_schema") or wanted, "schema") if kind == "json_schema" else None


def _get(value: Any, key: str) -> Any:
    return value.get(key) if isinstance(value, dict) else None


def fits(schema: bytes, text: str) -> bool | None:
    """Whether a text is JSON that fits a schema; None where that cannot be told, as with a schema that is none."""
    validator = _validator(schema)
    if validator is None:
        return None
    try:
        answer = _decode(text)
    except (msgspec.DecodeError, RecursionError):
        return False
    try:
        return bool(validator.is_valid(answer))
    except Exception:  # a schema is a stranger's program: a reference to nowhere, a pattern without end, no floor
        return None


@lru_cache(maxsize=64)
def _shared(schema: bytes) -> bytes:
    """The same object for equal schemas: most files have one, and many lines of it wait to be committed."""
    return schema


@lru_cache(maxsize=64)
def _validator(schema: bytes) -> Any:
    from jsonschema import Draft202012Validator  # takes a third of a second, which few batches need
    from jsonschema.validators import extend, validator_for
    from referencing import Registry

    try:
        document = _decode(schema)
        kind = validator_for(document, default=Draft202012Validator)
        kind.check_schema(document)
        # With no registry of ours, it would fetch whatever URL a `$ref` names.
        return extend(kind, {"pattern": _pattern})(document, registry=Registry())
    except Exception:
        return None


def _pattern(_: Any, pattern: str, instance: Any, __: Any) -> Any:
    """The keyword `pattern` with a limit of time: a pattern that backtracks for ever would hold the whole process."""
    import regex
    from jsonschema import ValidationError

    if isinstance(instance, str) and not regex.search(pattern, instance, timeout=_PATTERN_SECONDS):
        yield ValidationError(f"{instance[:100]!r} does not match {pattern!r}")
