"""The published outputs of a batch, as exports and handlers read them."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from resources.batch_store.batch import Batch, revision_number
from resources.chunk_store.schema import RESULTS
from resources.errors import BatchError
from resources.exports.rows import REVISION, Rows

_PIECE_BYTES = 8 * 1024 * 1024
_MOST_PIECE_ROWS = 8192
_BLOCK = 1024 * 1024

BATCH = "batch"
EXPORTED = pa.schema([pa.field(BATCH, pa.string(), nullable=False), *RESULTS, REVISION])
"""A row of an exported table: the batch, a published row, the revision that it is of."""


@dataclass(frozen=True)
class Published:
    """One revision of a batch. Its files never change; they go when a newer revision takes their place."""

    key: str
    folder: Path

    @classmethod
    def of(cls, batch: Batch) -> "Published":
        """The latest revision.

        Raises:
            BatchError: nothing is published yet.
        """
        if batch.output_summary() is None:
            raise BatchError(f"{batch.key}: it has no outputs yet; materialize batch_output first.")
        return cls(batch.key, batch.output_dir.resolve())

    def is_latest_of(self, batch: Batch) -> bool:
        return batch.output_dir.resolve() == self.folder

    @property
    def revision(self) -> str:
        """The name of the folder: unique to what was published at one moment."""
        return self.folder.name

    @property
    def number(self) -> int:
        """Greater for a later revision."""
        return revision_number(self.folder)

    @cached_property
    def summary(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.folder / "summary.json").read_bytes())
        return found

    @property
    def count(self) -> int:
        """How many rows there are: one a line of the input."""
        return int(self.summary["lines"])

    def parts(self) -> list[Path]:
        return sorted((self.folder / "results").glob("part-*.parquet"))

    def files(self, kind: Literal["parquet", "jsonl", "both"]) -> list[Path]:
        lines = [] if kind == "parquet" else [self.folder / "output.jsonl", self.folder / "errors.jsonl"]
        return lines + ([] if kind == "jsonl" else self.parts())

    def rows(self) -> Rows:
        """The rows as a table of a database takes them."""
        return Rows(EXPORTED, (BATCH, "line"), {BATCH: self.key}, self.number, self.count, self._read)

    def _read(self) -> Iterator[pa.RecordBatch]:
        for part in self.parts():
            with pq.ParquetFile(part) as file:
                for found in file.iter_batches(_rows_a_piece(file.metadata)):
                    key = pa.repeat(self.key, len(found))
                    revision = pa.repeat(pa.scalar(self.number, pa.int64()), len(found))
                    yield pa.RecordBatch.from_arrays([key, *found.columns, revision], schema=EXPORTED)


def _rows_a_piece(metadata: pq.FileMetaData) -> int:
    """As many as make a piece of some megabytes, so that memory does not grow with the length of the answers."""
    size = sum(metadata.row_group(index).total_byte_size for index in range(metadata.num_row_groups))
    fitting = int(_PIECE_BYTES * metadata.num_rows // max(size, 1))
    return max(1, min(_MOST_PIECE_ROWS, fitting))


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()
