"""Commits chunks. All of it runs in one thread; the caller holds the batch's lock."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from resources import durable
from resources.chunk_store.generation import SOURCES_KEY, Committed, Generation
from resources.chunk_store.schema import ChunkRow, to_table

MAX_CHUNK_BYTES = 64 * 1024 * 1024
_DICTIONARY_COLUMNS = ["status_code", "finish_reason", "error_code", "attempt"]


class ChunkWriter:
    """Appends chunks to a generation and keeps small ones merged.

    Small chunks come from a slow engine that flushes by time. They are merged once they make up a full chunk, so a row
    is rewritten about once, and what remains at the end is merged by `finish`.
    """

    def __init__(self, generation: Generation, state: Committed, chunk_rows: int) -> None:
        self._generation = generation
        self._chunk_rows = chunk_rows
        numbers = generation.chunk_numbers()
        self._next = max(numbers, default=-1) + 1
        self._small = [(n, rows) for n, rows in state.small_chunks if rows * 2 <= chunk_rows]

    def commit(self, rows: list[ChunkRow]) -> None:
        """Commit rows as the next chunk. When it returns, they survive whatever happens."""
        number = self._write(to_table(rows), [])
        if len(rows) * 2 <= self._chunk_rows:
            self._small.append((number, len(rows)))
            if sum(count for _, count in self._small) >= self._chunk_rows:
                self._merge()

    def finish(self) -> None:
        """Merge the small chunks that are left."""
        if len(self._small) > 1:
            self._merge()

    def _merge(self) -> None:
        sources, self._small = [number for number, _ in self._small], []
        group: list[int] = []
        size = 0
        for number in sources:
            path_bytes = sum(_uncompressed(self._generation.open_chunk(number)))
            if group and size + path_bytes > MAX_CHUNK_BYTES:
                self._merge_group(group)
                group, size = [], 0
            group.append(number)
            size += path_bytes
        self._merge_group(group)

    def _merge_group(self, sources: list[int]) -> None:
        if len(sources) < 2:
            return
        tables = [self._generation.read_chunk(number) for number in sources]
        self._write(pa.concat_tables(tables).combine_chunks(), sources)
        for number in sources:
            self._generation.chunk_path(number).unlink()

    def _write(self, table: pa.Table, sources: list[int]) -> int:
        number = self._next
        if sources:
            table = table.replace_schema_metadata({SOURCES_KEY: json.dumps(sources)})
        write_parquet(table, self._generation.chunk_path(number))
        durable.sync_folder(self._generation.folder)
        self._next += 1
        return number


def write_parquet(table: pa.Table, path: Path) -> None:
    """Write a file under a temporary name, sync it and rename it. The folder's sync is the caller's."""
    with durable.replacing(path) as stream:
        pq.write_table(
            table,
            stream,
            compression="zstd",
            compression_level=1,
            use_dictionary=[name for name in _DICTIONARY_COLUMNS if name in table.column_names],
        )


def _uncompressed(chunk: pq.ParquetFile) -> list[int]:
    return [chunk.metadata.row_group(i).total_byte_size for i in range(chunk.metadata.num_row_groups)]
