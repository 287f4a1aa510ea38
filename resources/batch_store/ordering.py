"""The order in which lines are asked: as they stand, shared prefixes together, or the longest answers first.

The window is one part of the requests (at most 65,536 lines, about 64 MB): lines are sorted within it, and the parts
follow one another, so that memory is bounded however long the file is.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from resources.batch_format.options import Order
from resources.batch_store.requests import ValidRow, as_tuples, request_parts, valid_batches, valid_rows

_ROWS_AT_ONCE = 1024
_NONE = msgspec.Raw()


class _Prompt(msgspec.Struct):
    """What an engine reads of a request, in the order in which it stands in the prompt; the JSON text of each field.

    Sampling fields are not among them: they do not matter to the prefix cache."""

    tools: msgspec.Raw = _NONE
    instructions: msgspec.Raw = _NONE
    messages: msgspec.Raw = _NONE
    prompt: msgspec.Raw = _NONE
    input: msgspec.Raw = _NONE
    query: msgspec.Raw = _NONE
    queries: msgspec.Raw = _NONE
    text_1: msgspec.Raw = _NONE
    documents: msgspec.Raw = _NONE
    text_2: msgspec.Raw = _NONE


class _Limits(msgspec.Struct):
    max_completion_tokens: Any = None
    max_output_tokens: Any = None
    max_tokens: Any = None


_decode_prompt = msgspec.json.Decoder(_Prompt).decode
_decode_limits = msgspec.json.Decoder(_Limits).decode
_PROMPT_FIELDS = _Prompt.__struct_fields__


def rows_to_ask(
    folder: Path, model: str, wanted: npt.NDArray[np.bool_], order: Order, transform: Callable[[bytes], bytes]
) -> Iterator[ValidRow]:
    """The rows of `valid_rows` in that order. `transform` makes of a body what is sent: its limit may be a default.

    Memory: one part of the requests, and with `prefix` the prompts in it once more.
    """
    if order == "input":
        return valid_rows(folder, model, wanted)
    key = _prompt_of if order == "prefix" else lambda body: _longest_first(transform(body))
    return _sorted_rows(folder, model, wanted, key)


def _sorted_rows(
    folder: Path, model: str, wanted: npt.NDArray[np.bool_], key: Callable[[bytes], Any]
) -> Iterator[ValidRow]:
    for path in request_parts(folder):
        batches = list(valid_batches(path, model, wanted))
        if not batches:
            continue
        keys = [key(body) for batch in batches for _, _, body in as_tuples(batch)]
        order = sorted(range(len(keys)), key=keys.__getitem__)
        del keys
        rows = pa.Table.from_batches(batches).combine_chunks()
        del batches
        for start in range(0, len(order), _ROWS_AT_ONCE):
            yield from as_tuples(rows.take(pa.array(order[start : start + _ROWS_AT_ONCE])))


def _prompt_of(body: bytes) -> bytes:
    prompt = _decode_prompt(body)
    return b"".join([bytes(getattr(prompt, name)) for name in _PROMPT_FIELDS])


def _longest_first(body: bytes) -> tuple[float, int]:
    """By the length that an answer may have, then by the body's own. Without a limit it may be the longest."""
    limits = _decode_limits(body)
    given = (limits.max_completion_tokens, limits.max_output_tokens, limits.max_tokens)
    limit = next((value for value in given if type(value) is int), float("inf"))
    return -limit, -len(body)
