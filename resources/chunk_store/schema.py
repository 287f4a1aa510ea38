"""The rows of the three kinds of Parquet files: requests, chunks (private) and published results."""

from typing import NamedTuple

import pyarrow as pa

REQUESTS = pa.schema(
    [
        pa.field("line", pa.int64(), nullable=False),
        ("custom_id", pa.string()),
        ("url", pa.string()),
        ("model", pa.string()),
        ("body", pa.string()),
        ("error_code", pa.string()),
        ("error_message", pa.string()),
        ("error_param", pa.string()),
    ]
)

_ANSWER_COLUMNS = [
    ("finish_reason", pa.string()),
    ("error_code", pa.string()),
    ("error_message", pa.string()),
    ("prompt_tokens", pa.int32()),
    ("completion_tokens", pa.int32()),
    ("cached_tokens", pa.int32()),
    ("started_at", pa.timestamp("us", tz="UTC")),
    ("finished_at", pa.timestamp("us", tz="UTC")),
    ("attempt", pa.int8()),
]

CHUNK = pa.schema(
    [
        pa.field("line", pa.int64(), nullable=False),
        ("status_code", pa.int16()),
        ("request_id", pa.string()),
        ("response", pa.string()),
        *_ANSWER_COLUMNS,
        ("fits_schema", pa.bool_()),
    ]
)

RESULTS = pa.schema(
    [
        pa.field("line", pa.int64(), nullable=False),
        ("custom_id", pa.string()),
        ("url", pa.string()),
        ("model", pa.string()),
        ("status_code", pa.int16()),
        ("response", pa.string()),
        ("text", pa.string()),
        *_ANSWER_COLUMNS,
    ]
)


def is_success(status: int) -> bool:
    """Whether a status stands for an answer. A redirect does not: nobody follows it."""
    return 200 <= status < 300


class ChunkRow(NamedTuple):
    """A finished request, in the order of CHUNK's columns.

    `status_code` and `response` are None where no answer came; then `error_code` says why. Times are microseconds
    since 1970, UTC. `attempt` counts how often the line was sent, over all runs. `fits_schema` tells whether the answer
    fits the JSON schema that it was asked to fit; None where there is none, or no telling.
    """

    line: int
    status_code: int | None
    request_id: str
    response: bytes | None
    finish_reason: str | None
    error_code: str | None
    error_message: str | None
    prompt_tokens: int | None
    completion_tokens: int | None
    cached_tokens: int | None
    started_at: int
    finished_at: int
    attempt: int
    fits_schema: bool | None = None

    @property
    def failed(self) -> bool:
        return self.status_code is None or not is_success(self.status_code)

    @property
    def nbytes(self) -> int:
        """About how much memory the row takes."""
        return 400 + (len(self.response) if self.response else 0)


def to_table(rows: list[ChunkRow]) -> pa.Table:
    """The rows as a table of CHUNK. Raises pyarrow.ArrowInvalid where a response is not UTF-8."""
    columns = zip(*rows, strict=True)
    arrays = [
        pa.array(column, pa.binary()).cast(pa.string()) if field.name == "response" else pa.array(column, field.type)
        for column, field in zip(columns, CHUNK, strict=True)
    ]
    return pa.Table.from_arrays(arrays, schema=CHUNK)
