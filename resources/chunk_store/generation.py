"""A generation: the committed answers of one batch by one model under one fingerprint. The checkpoint.

The rules, in the order in which they hold:

1. A chunk is written under a temporary name, synced, renamed, and the folder synced. One that has its name is whole
   and committed; there is no other state of progress.
2. A chunk holds rows in the order in which they finished. Each row carries its line number; what is done is the set of
   these numbers, never a count.
3. A line may have several rows, from later attempts; the highest attempt wins.
4. Small chunks are merged into full ones. The merged chunk names its sources and is committed before they are removed,
   so a reader may meet both and sees each (line, attempt) once.
5. Only the holder of the batch's lock writes.
"""

import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from resources import durable
from resources.chunk_store.fingerprint import engine_versions, fingerprint, fingerprint_inputs
from resources.chunk_store.retry import Retry
from resources.chunk_store.schema import CHUNK
from resources.engine.catalog import ModelEntry
from resources.errors import CheckpointError

log = logging.getLogger(__name__)

SOURCES_KEY = b"merged_from"
_STATE_COLUMNS = ["line", "attempt", "status_code", "prompt_tokens", "completion_tokens"]
_CHUNK_BEFORE = pa.schema([field for field in CHUNK if field.name != "fits_schema"])
"""The columns of chunks written before `fits_schema` was one. They are read as if it were null."""


@dataclass
class Committed:
    """What a generation holds, in three bytes a line. Index is the line number.

    `attempts` is the highest attempt of a line, 0 where it has no row; `failed` tells whether that attempt failed, and
    `chosen` whether the retry that was asked about chooses it. `rows` counts all rows, superseded ones included.
    """

    attempts: npt.NDArray[np.int8]
    failed: npt.NDArray[np.bool_]
    chosen: npt.NDArray[np.bool_]
    rows: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    small_chunks: list[tuple[int, int]] = field(default_factory=list)
    """(number, rows) of chunks that may be merged."""

    def only(self, mine: npt.NDArray[np.bool_]) -> None:
        """Forget lines that are not asked for (any more): rejected by a later check, or another model's now."""
        self.attempts[~mine] = 0
        self.failed[~mine] = False
        self.chosen[~mine] = False

    @property
    def done(self) -> int:
        return int(np.count_nonzero(self.attempts))

    @property
    def failures(self) -> int:
        return int(np.count_nonzero(self.failed))


class Generation:
    """The folder `results/<model>/<fingerprint>`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @staticmethod
    def of(results_dir: Path, entry: ModelEntry, restarts: int = 0) -> "Generation":
        """The generation of a catalog entry's answers, another one after each restart. Makes nothing on disk."""
        name = fingerprint(fingerprint_inputs(entry)) + (f"-{restarts}" if restarts else "")
        return Generation(results_dir / entry.name.replace("/", "--").replace(":", "--") / name)

    @property
    def name(self) -> str:
        return f"{self.folder.parent.name}/{self.folder.name}"

    def chunk_path(self, number: int) -> Path:
        return self.folder / f"chunk-{number:06d}.parquet"

    def chunk_numbers(self) -> list[int]:
        """Numbers of the committed chunks, in order."""
        if not self.folder.is_dir():
            return []
        names = (p.stem.removeprefix("chunk-") for p in self.folder.glob("chunk-*.parquet"))
        return sorted(int(name) for name in names if name.isdigit())

    def open_chunk(self, number: int) -> pq.ParquetFile:
        """Raises CheckpointError where the file is no chunk; names it and says what to do."""
        path = self.chunk_path(number)
        try:
            chunk = pq.ParquetFile(path)
            if not chunk.schema_arrow.equals(CHUNK) and not chunk.schema_arrow.equals(_CHUNK_BEFORE):
                raise pa.ArrowInvalid("it has other columns")
        except (pa.ArrowInvalid, OSError) as error:
            raise CheckpointError(
                f"{path} is damaged ({error}). Move it away and run the batch again: its lines will be asked anew."
            ) from None
        return chunk

    def read_chunk(self, number: int) -> pa.Table:
        """All rows of a chunk, in the columns of CHUNK."""
        table = self.open_chunk(number).read()
        if "fits_schema" not in table.column_names:
            table = table.append_column(CHUNK.field("fits_schema"), pa.nulls(len(table), pa.bool_()))
        return table

    def committed(self, last_line: int, retry: Retry | None = None) -> Committed:
        """Read what is committed: a few narrow columns of every chunk. `last_line` sizes the arrays."""
        size = last_line + 1
        state = Committed(np.zeros(size, np.int8), np.zeros(size, np.bool_), np.zeros(size, np.bool_))
        columns = _STATE_COLUMNS + (retry.columns if retry else [])
        for number in self.chunk_numbers():
            chunk = self.open_chunk(number)
            table = chunk.read([name for name in columns if name in chunk.schema_arrow.names])
            lines = table["line"].to_numpy()
            if len(lines) and int(lines.max()) > last_line:
                raise CheckpointError(f"{self.chunk_path(number)} holds line {lines.max()}, the input has {last_line}.")
            attempts = table["attempt"].to_numpy()
            status = table["status_code"].fill_null(0).to_numpy()
            newer = attempts > state.attempts[lines]
            failed = (status < 200) | (status >= 300)
            state.failed[lines[newer]] = failed[newer]
            if retry is not None:
                state.chosen[lines[newer]] = retry.chooses(table, failed)[newer]
            state.attempts[lines[newer]] = attempts[newer]
            state.rows += len(lines)
            state.prompt_tokens += _total(table["prompt_tokens"])
            state.completion_tokens += _total(table["completion_tokens"])
            state.small_chunks.append((number, len(lines)))
        return state

    def remove_superseded(self) -> None:
        """Finish a merge that was cut off between its commit and the removal of its sources. For the lock's holder."""
        if not self.folder.is_dir():
            return
        durable.remove_temporaries(self.folder)
        numbers = self.chunk_numbers()
        for number in numbers:
            for source in merged_from(self.open_chunk(number)):
                self.chunk_path(source).unlink(missing_ok=True)

    def start(self, entry: ModelEntry) -> None:
        """Make the folder and its manifest, or note in it that other versions go on from here."""
        manifest = self.manifest()
        versions = engine_versions(entry)
        if manifest is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            durable.sync_folder(self.folder.parent)
            manifest = {
                "format_version": 1,
                "fingerprint": self.folder.name,
                "inputs": fingerprint_inputs(entry),
                "created_at": datetime.now(UTC).isoformat(),
                "versions": [{"from_chunk": 0, **versions}],
            }
        else:
            last = {k: v for k, v in manifest["versions"][-1].items() if k != "from_chunk"}
            if last == versions:
                return
            first = max(self.chunk_numbers(), default=-1) + 1
            log.warning("%s goes on from chunk %d with %s; before it was %s", self.name, first, versions, last)
            manifest["versions"].append({"from_chunk": first, **versions})
        durable.write_file(self.folder / "manifest.json", json.dumps(manifest, indent=1).encode())

    def manifest(self) -> dict[str, Any] | None:
        try:
            content = json.loads((self.folder / "manifest.json").read_bytes())
        except FileNotFoundError:
            return None
        except ValueError:
            raise CheckpointError(
                f"{self.folder / 'manifest.json'} is not JSON; remove it to have it written anew."
            ) from None
        return content if isinstance(content, dict) else None

    def __iter__(self) -> Iterator[tuple[int, pq.ParquetFile]]:
        for number in self.chunk_numbers():
            yield number, self.open_chunk(number)


def merged_from(chunk: pq.ParquetFile) -> list[int]:
    """The numbers of the chunks that this one replaces."""
    return list(json.loads((chunk.metadata.metadata or {}).get(SOURCES_KEY, b"[]")))


def _total(column: pa.ChunkedArray) -> int:
    return int(np.asarray(column.fill_null(0)).sum())
