"""From what came back to the row that is committed."""

import time

import msgspec

from resources.batch_format.answers import one_line, summarize
from resources.chunk_store.schema import ChunkRow, is_success
from resources.engine.protocol import EngineRequest, EngineResponse, TransportFailure

_MAX_INT8 = 127


def answered(request: EngineRequest, response: EngineResponse, started: int, attempt: int) -> ChunkRow:
    """The row of an answer, whatever its status. `started` is in microseconds since 1970.

    Raises:
        TransportFailure: the body is not JSON in UTF-8.
    """
    try:
        body = one_line(response.body)
        body.decode()
        summary = summarize(body)
    except (msgspec.DecodeError, UnicodeDecodeError):
        raise TransportFailure("the answer is not JSON in UTF-8") from None
    refused = not is_success(response.status)
    return ChunkRow(
        request.line,
        response.status,
        response.request_id,
        body,
        summary.finish_reason,
        f"http_{response.status}" if refused else None,
        _refusal(body) if refused else None,
        summary.prompt_tokens,
        summary.completion_tokens,
        summary.cached_tokens,
        started,
        time.time_ns() // 1000,
        min(attempt, _MAX_INT8),
    )


def unanswered(line: int, request_id: str, code: str, message: str, started: int, attempt: int) -> ChunkRow:
    """The row of a request that has no answer: the code and the message say why."""
    now = time.time_ns() // 1000
    return ChunkRow(
        line, None, request_id, None, None, code, message, None, None, None, started, now, min(attempt, _MAX_INT8)
    )  # fmt: skip


class _ErrorDetail(msgspec.Struct):
    message: str | None = None


class _ErrorBody(msgspec.Struct):
    error: _ErrorDetail | None = None
    message: str | None = None


_decode_error = msgspec.json.Decoder(_ErrorBody).decode


def _refusal(body: bytes) -> str | None:
    try:
        error = _decode_error(body)
    except msgspec.DecodeError:
        return None
    message = error.error.message if error.error else error.message
    return message[:2000] if message else None
