"""The checked lines of a batch as Parquet: one row a line, valid or not. Written once, then read in order."""

import os
from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from resources.batch_format.requests import Code
from resources.chunk_store.schema import REQUESTS

PART_ROWS = 65_536
_PART_BYTES = 64 * 1024 * 1024
_GROUP_ROWS = 8_192
_GROUP_BYTES = 16 * 1024 * 1024
FIRST_REJECTS = 20

RequestRow = tuple[int, str | None, str | None, str | None, bytes | None, str | None, str | None, str | None]
"""(line, custom_id, url, model, body, error_code, error_message, error_param): the columns of REQUESTS."""


@dataclass
class RequestsSummary:
    """What the check found; `summary.json` beside the parts. `names` is what the catalog's names stood for then."""

    lines: int = 0
    last_line: int = 0
    valid: int = 0
    rejected: int = 0
    rejects_by_code: dict[str, int] = field(default_factory=dict)
    models: dict[str, int] = field(default_factory=dict)
    first_rejects: list[dict[str, Any]] = field(default_factory=list)
    endpoints: list[str] = field(default_factory=list)
    names: dict[str, str] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class RequestsWriter:
    """Writes the parts into a folder that is not published yet; `finish` finds custom_ids that stand twice.

    Memory: one row group, and eight bytes a line for the hashes of the custom_ids.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._rows: list[RequestRow] = []
        self._bytes = 0
        self._ids = array("q")
        self._part_rows = self._part_bytes = 0
        self._parts = 0
        self._writer: pq.ParquetWriter | None = None

    def add(self, row: RequestRow) -> None:
        self._rows.append(row)
        self._bytes += sum(len(text) for text in row[1:] if text)
        if row[5] is None:
            self._ids.append(hash(row[1]))
        if len(self._rows) >= _GROUP_ROWS or self._bytes >= _GROUP_BYTES:
            self._write_group()

    def finish(self, summary: RequestsSummary) -> RequestsSummary:
        """Close the parts, mark repeated custom_ids in them, and count."""
        self._write_group()
        self._close_part()
        suspects = _repeated(self._ids)
        seen: set[str] = set()
        codes: Counter[str] = Counter()
        models: Counter[str] = Counter()
        endpoints: set[str] = set()
        for path in request_parts(self._folder):
            if suspects:
                _mark_repeated(path, suspects, seen)
            for batch in pq.ParquetFile(path).iter_batches(
                _GROUP_ROWS, columns=["line", "custom_id", "url", "model", "error_code", "error_message", "error_param"]
            ):
                valid = batch.filter(pc.is_null(batch["error_code"]))
                summary.lines += len(batch)
                summary.valid += len(valid)
                _count(models, valid["model"])
                endpoints.update(valid["url"].unique().to_pylist())
                if len(valid) < len(batch):
                    rejects = batch.filter(pc.is_valid(batch["error_code"]))
                    _count(codes, rejects["error_code"])
                    room = FIRST_REJECTS - len(summary.first_rejects)
                    summary.first_rejects += rejects.slice(0, room).drop_columns(["url", "model"]).to_pylist()
        summary.rejected = summary.lines - summary.valid
        summary.models, summary.rejects_by_code = dict(models), dict(codes)
        summary.endpoints = sorted(endpoints)
        return summary

    def _write_group(self) -> None:
        if not self._rows:
            return
        if self._writer is None:
            path = self._folder / f"part-{self._parts:05d}.parquet"
            self._writer = pq.ParquetWriter(
                path, REQUESTS, compression="zstd", compression_level=1, use_dictionary=_DICT
            )
            self._parts += 1
        columns = zip(*self._rows, strict=True)
        arrays = [
            pa.array(column, pa.binary()).cast(pa.string()) if field.name == "body" else pa.array(column, field.type)
            for column, field in zip(columns, REQUESTS, strict=True)
        ]
        self._writer.write_table(pa.Table.from_arrays(arrays, schema=REQUESTS))
        self._part_rows += len(self._rows)
        self._part_bytes += self._bytes
        self._rows, self._bytes = [], 0
        if self._part_rows >= PART_ROWS or self._part_bytes >= _PART_BYTES:
            self._close_part()

    def _close_part(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer, self._part_rows, self._part_bytes = None, 0, 0


_DICT = ["url", "model", "error_code", "error_message", "error_param"]


def request_parts(folder: Path) -> list[Path]:
    return sorted(folder.glob("part-*.parquet"))


def read_batches(folder: Path, columns: list[str] | None = None) -> Iterator[pa.RecordBatch]:
    """All rows in line order, a row group or less at a time."""
    for path in request_parts(folder):
        yield from _read_part(path, columns)


def _read_part(path: Path, columns: list[str] | None) -> Iterator[pa.RecordBatch]:
    with pq.ParquetFile(path) as part:
        for group in range(part.num_row_groups):
            yield from part.read_row_group(group, columns).combine_chunks().to_batches()


ValidRow = tuple[int, str, bytes]
"""(line, url, body) of a line that can be sent."""


def valid_rows(folder: Path, model: str, wanted: npt.NDArray[np.bool_]) -> Iterator[ValidRow]:
    """The valid rows of one model whose lines are `wanted` (index is the line number), in line order."""
    for path in request_parts(folder):
        for rows in valid_batches(path, model, wanted):
            yield from as_tuples(rows)


def valid_batches(path: Path, model: str, wanted: npt.NDArray[np.bool_]) -> Iterator[pa.RecordBatch]:
    """The rows of `valid_rows` that stand in one part, a row group or less at a time; empty ones are left out."""
    for batch in _read_part(path, ["line", "url", "model", "body", "error_code"]):
        mask = pc.and_(pc.is_null(batch["error_code"]), pc.fill_null(pc.equal(batch["model"], model), False))
        mask = pc.and_(mask, pa.array(wanted[batch["line"].to_numpy()]))
        rows = batch.filter(mask)
        if len(rows):
            yield rows


def as_tuples(rows: pa.RecordBatch | pa.Table) -> Iterator[ValidRow]:
    return zip(
        rows["line"].to_pylist(),
        rows["url"].to_pylist(),
        rows["body"].cast(pa.binary()).to_pylist(),
        strict=True,
    )


def lines_of(folder: Path, model: str, last_line: int) -> npt.NDArray[np.bool_]:
    """Which lines are valid requests for a model; index is the line number."""
    mine = np.zeros(last_line + 1, np.bool_)
    for batch in read_batches(folder, ["line", "model", "error_code"]):
        valid = pc.and_(pc.is_null(batch["error_code"]), pc.fill_null(pc.equal(batch["model"], model), False))
        mine[batch["line"].to_numpy()[valid.to_numpy(zero_copy_only=False)]] = True
    return mine


def sync_parts(folder: Path) -> None:
    for path in request_parts(folder):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _repeated(ids: "array[int]") -> set[int]:
    """Hashes that occur more than once: candidates, confirmed on the strings."""
    ordered = np.sort(np.frombuffer(ids, np.int64)) if len(ids) else np.empty(0, np.int64)
    return set(np.unique(ordered[1:][ordered[1:] == ordered[:-1]]).tolist())


def _mark_repeated(path: Path, suspects: set[int], seen: set[str]) -> None:
    """Turn the second and later valid rows of a custom_id into rejects, rewriting the part only where there are any."""
    narrow = pq.read_table(path, columns=["custom_id", "error_code"])
    repeats = []
    for index, (custom_id, code) in enumerate(zip(*(c.to_pylist() for c in narrow.columns), strict=True)):
        if code is None and hash(custom_id) in suspects:
            if custom_id in seen:
                repeats.append(index)
            seen.add(custom_id)
    if not repeats:
        return
    table = pq.read_table(path).combine_chunks()
    mask = np.zeros(len(table), np.bool_)
    mask[repeats] = True
    marked = pa.array(mask)
    texts = {
        "error_code": pa.scalar(str(Code.DUPLICATE_CUSTOM_ID)),
        "error_message": pa.scalar("an earlier line has this custom_id; the first one stands"),
        "error_param": pa.scalar("custom_id"),
        "body": pa.scalar(None, pa.string()),
    }
    for name, text in texts.items():
        column = pc.if_else(marked, text, table[name])
        table = table.set_column(table.column_names.index(name), REQUESTS.field(name), column)
    pq.write_table(
        table, path, compression="zstd", compression_level=1, use_dictionary=_DICT, row_group_size=_GROUP_ROWS
    )


def _count(counter: Counter[str], column: pa.Array) -> None:
    for item in column.value_counts().to_pylist():
        counter[item["values"]] += item["counts"]
