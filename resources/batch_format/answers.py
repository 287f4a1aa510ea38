"""Answers: what is worth a column in a response body, and the lines of `output.jsonl` and `errors.jsonl`."""

from typing import Annotated, Any

import msgspec
import pyarrow as pa
import pyarrow.compute as pc


class Summary(msgspec.Struct, frozen=True, gc=False):
    """The parts of a response that people filter and count by; None where the response has none."""

    text: str | None = None
    finish_reason: str | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    cached_tokens: int | None = None


# The columns are int32; an engine that says otherwise has another shape.
_Count = Annotated[int, msgspec.Meta(ge=0, le=2**31 - 1)]


class _Message(msgspec.Struct, gc=False):
    content: Any = None


class _Choice(msgspec.Struct, gc=False):
    message: _Message | None = None
    text: str | None = None
    finish_reason: str | None = None


class _TokenDetails(msgspec.Struct, gc=False):
    cached_tokens: _Count | None = None


class _Usage(msgspec.Struct, gc=False):
    prompt_tokens: _Count | None = None
    completion_tokens: _Count | None = None
    prompt_tokens_details: _TokenDetails | None = None
    input_tokens: _Count | None = None
    output_tokens: _Count | None = None
    input_tokens_details: _TokenDetails | None = None


class _Incomplete(msgspec.Struct, gc=False):
    reason: str | None = None


class _Content(msgspec.Struct, gc=False):
    text: str | None = None


class _OutputItem(msgspec.Struct, gc=False):
    type: str | None = None
    content: list[_Content] | None = None


class _Body(msgspec.Struct, gc=False):
    """What chat completions, completions, responses and embeddings have in common, all of it optional."""

    choices: list[_Choice] = []
    usage: _Usage | None = None
    output: list[_OutputItem] | None = None
    status: str | None = None
    incomplete_details: _Incomplete | None = None


_decode = msgspec.json.Decoder(_Body).decode
_decode_any = msgspec.json.Decoder().decode
_EMPTY = Summary()


def summarize(body: bytes) -> Summary:
    """The summary of a response body; empty where it has another shape. Raises msgspec.DecodeError: not JSON."""
    try:
        response = _decode(body)
    except msgspec.ValidationError:
        _decode_any(body)
        return _EMPTY
    text = finish = None
    if response.choices:
        choice = response.choices[0]
        content = choice.message.content if choice.message else choice.text
        text, finish = content if isinstance(content, str) else None, choice.finish_reason
    elif response.output is not None:
        parts = [c.text or "" for o in response.output if o.type == "message" for c in o.content or ()]
        text = "".join(parts) if parts else None
        cut = response.incomplete_details is not None and response.incomplete_details.reason == "max_output_tokens"
        finish = "length" if cut else ("stop" if response.status == "completed" else response.status)
    usage = response.usage
    if usage is None:
        return Summary(text, finish)
    details = usage.prompt_tokens_details or usage.input_tokens_details
    return Summary(
        text,
        finish,
        usage.prompt_tokens if usage.prompt_tokens is not None else usage.input_tokens,
        usage.completion_tokens if usage.completion_tokens is not None else usage.output_tokens,
        details.cached_tokens if details else None,
    )


def one_line(body: bytes) -> bytes:
    """The same JSON without line breaks, so that it fits in a line of JSONL. Raises msgspec.DecodeError."""
    return msgspec.json.format(body, indent=-1) if b"\n" in body or b"\r" in body else body


_encode = msgspec.json.encode


def response_lines(
    batch_req_ids: pa.Array, custom_ids: pa.Array, statuses: pa.Array, request_ids: pa.Array, bodies: pa.Array
) -> pa.Array:
    """Lines for requests that the engine answered, whatever the status; null where there is no body.

    Bodies are JSON text and go in as they are. Made column by column: a Python loop takes several times as long.
    """
    pieces: list[str | pa.Array] = [
        '{"id":"',
        batch_req_ids,
        '","custom_id":',
        _json_strings(custom_ids),
        ',"response":{"status_code":',
        statuses,
        ',"request_id":',
        _json_strings(request_ids),
        ',"body":',
        bodies,
        '},"error":null}\n',
    ]
    text = pa.large_string()  # a range of large answers may be over 2 GiB
    columns = [pa.scalar(piece, text) if isinstance(piece, str) else piece.cast(text) for piece in pieces]
    return pc.binary_join_element_wise(*columns, pa.scalar("", text))


def _json_strings(texts: pa.Array) -> pa.Array:
    return pa.array([_encode(text) for text in texts.to_pylist()], pa.binary())


def error_line(
    batch_req_id: str,
    custom_id: str | None,
    code: str,
    message: str | None,
    line: int | None = None,
    param: str | None = None,
) -> str:
    """A line for a request that has no answer. `line` and `param` say where a bad input line is to be mended."""
    error: dict[str, Any] = {"code": code, "message": message}
    if line is not None:
        error |= {"line": line, "param": param}
    row = {"id": batch_req_id, "custom_id": custom_id, "response": None, "error": error}
    return _encode(row).decode() + "\n"
