"""Rows in input order, from chunks that are in order of completion, in bounded memory.

Two passes: rows are scattered over ranges of lines, then each range is sorted in memory. A chunk that lies in one range
is read in place; only those that straddle a border go through scratch files. Chunks are opened one at a time.
"""

from collections import defaultdict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from resources.chunk_store.generation import Generation
from resources.chunk_store.schema import CHUNK

RANGE_BYTES = 8 * 1024 * 1024
_MAX_RANGES = 512
_TAGGED = CHUNK.append(pa.field("source", pa.int32()))
_MAX_RANGE_LINES = 16_384


def ranges_of_lines(generations: list[Generation], last_line: int) -> int:
    """How many lines a range should span for its rows to take about RANGE_BYTES."""
    total: int = sum(
        chunk.metadata.row_group(i).total_byte_size
        for generation in generations
        for _, chunk in generation
        for i in range(chunk.metadata.num_row_groups)
    )
    fitting = last_line * RANGE_BYTES // max(total, 1)
    return max(1, min(fitting, _MAX_RANGE_LINES), -(-last_line // _MAX_RANGES))


class OrderedRows:
    """The winning row of each line, range by range. `scratch` is an empty folder for the straddling rows."""

    def __init__(self, generations: list[Generation], span: int, scratch: Path) -> None:
        self._span = span
        self._scratch = scratch
        self._whole: dict[int, list[tuple[int, Generation, int]]] = defaultdict(list)
        self._scatter(generations)

    def between(self, index: int) -> pa.Table:
        """The winning rows of range `index`, lines [index * span, (index + 1) * span), sorted by line.

        The column `source` is the index of the row's generation: a line may have a row in several of them.
        """
        tables = [_tagged(generation.read_chunk(number), source) for source, generation, number in self._whole[index]]
        scattered = self._scratch / f"{index}.arrow"
        if scattered.exists():
            with pa.memory_map(str(scattered)) as source:
                tables.append(pa.ipc.open_stream(source).read_all())
        if not tables:
            return _TAGGED.empty_table()
        return _winners(pa.concat_tables(tables))

    def _scatter(self, generations: list[Generation]) -> None:
        writers: dict[int, pa.ipc.RecordBatchStreamWriter] = {}
        try:
            for source, generation in enumerate(generations):
                for number, chunk in generation:
                    first, last = _line_bounds(chunk)
                    if first // self._span == last // self._span:
                        self._whole[first // self._span].append((source, generation, number))
                        continue
                    table = _tagged(generation.read_chunk(number), source)
                    owner = table["line"].to_numpy() // self._span
                    for index in np.unique(owner):
                        if index not in writers:
                            writers[index] = pa.ipc.new_stream(str(self._scratch / f"{index}.arrow"), _TAGGED)
                        writers[index].write_table(table.filter(pa.array(owner == index)))
        finally:
            for writer in writers.values():
                writer.close()


def _winners(table: pa.Table) -> pa.Table:
    lines = table["line"].to_numpy()
    source = table["source"].to_numpy()
    order = np.lexsort((table["attempt"].to_numpy(), source, lines))
    line, source = lines[order], source[order]
    last_of_line = np.append((line[1:] != line[:-1]) | (source[1:] != source[:-1]), True)
    return table.take(pa.array(order[last_of_line]))


def _tagged(table: pa.Table, source: int) -> pa.Table:
    tags = pa.array(np.full(len(table), source, np.int32))
    return table.replace_schema_metadata(None).append_column(_TAGGED.field("source"), tags)


def _line_bounds(chunk: pq.ParquetFile) -> tuple[int, int]:
    statistics = [chunk.metadata.row_group(i).column(0).statistics for i in range(chunk.metadata.num_row_groups)]
    return min(s.min for s in statistics), max(s.max for s in statistics)
