"""A generation: the committed answers of one batch by one model under one fingerprint. The checkpoint.

The rules, in the order in which they hold:

1. A chunk is written under a temporary name, synced, renamed, and the folder synced. One that has its name is whole
   and committed; there is no other state of progress. A checksum over all its bytes tells when that is no longer so.
2. A chunk holds rows in the order in which they finished. Each row carries its line number; what is done is the set of
   these numbers, never a count.
3. A line may have several rows, from later attempts; the highest attempt wins.
4. Small chunks are merged into full ones. The merged chunk names its sources and is committed before they are removed,
   so a reader may meet both and sees each (line, attempt) once.
5. Only the holder of the batch's lock writes.
6. A chunk that is damaged is nobody's answer. The holder of the lock moves it to `damaged/`, where nobody looks, before
   it reads anything else; its lines have no row then, and are asked again.
"""

import errno
import json
import logging
import secrets
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from resources import durable, failpoints
from resources.chunk_store.checksum import is_intact
from resources.chunk_store.fingerprint import engine_versions, fingerprint, fingerprint_inputs
from resources.chunk_store.retry import Retry
from resources.chunk_store.schema import CHUNK
from resources.engine.catalog import ModelEntry
from resources.errors import CheckpointError, ChunkDamaged

log = logging.getLogger(__name__)

SOURCES_KEY = b"merged_from"
_STATE_COLUMNS = ["line", "attempt", "status_code", "prompt_tokens", "completion_tokens"]


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
        self._intact: set[int] = set()

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
        """A chunk whose every byte was compared with its checksum, by this object, when it opened it first.

        Raises:
            ChunkDamaged: names the file and says what becomes of it.
            CheckpointError: it is not there, or is a chunk of something else.
        """
        path = self.chunk_path(number)
        if number not in self._intact:
            self.verify(number)
        try:
            chunk = pq.ParquetFile(path)
        except FileNotFoundError:
            raise CheckpointError(f"{path} is gone; run the batch again: lines without a row are asked.") from None
        if not chunk.schema_arrow.equals(CHUNK):
            raise CheckpointError(f"{path} has other columns than a chunk; move it away and run the batch again.")
        return chunk

    def verify(self, number: int) -> None:
        """Compare a chunk with its checksum. Raises as `open_chunk`."""
        path = self.chunk_path(number)
        try:
            intact = is_intact(path.read_bytes())
        except FileNotFoundError:
            raise CheckpointError(f"{path} is gone; run the batch again: lines without a row are asked.") from None
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            intact = False
        if not intact:
            raise ChunkDamaged(
                f"{path} is damaged. Run the batch again: the chunk is set aside and its lines are asked anew."
            )
        self._intact.add(number)

    def damaged(self) -> list[int]:
        """Verify every chunk; the numbers of those that are not as they were written."""
        found = []
        for number in self.chunk_numbers():
            try:
                self.verify(number)
            except ChunkDamaged:
                found.append(number)
        return found

    def set_aside(self, number: int) -> Path:
        """Move a chunk to `damaged/`; where it is now. For the lock's holder."""
        path = self.chunk_path(number)
        kept = self.folder / "damaged" / f"{path.stem}-{secrets.token_hex(3)}{path.suffix}"
        log.warning("%s is damaged: it is moved to %s, and its lines are asked again", path, kept)
        durable.make_folder(kept.parent)
        path.rename(kept)
        failpoints.reached("set aside", path)
        for folder in (kept.parent, self.folder):
            durable.sync_folder(folder)
        return kept

    def committed(self, last_line: int, retry: Retry | None = None) -> Committed:
        """Read what is committed: a few narrow columns of every chunk. `last_line` sizes the arrays."""
        size = last_line + 1
        state = Committed(np.zeros(size, np.int8), np.zeros(size, np.bool_), np.zeros(size, np.bool_))
        columns = _STATE_COLUMNS + (retry.columns if retry else [])
        for number in self.chunk_numbers():
            chunk = self.open_chunk(number)
            table = chunk.read(columns)
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
        """Finish a merge that was cut off between its commit and the removal of its sources. For the lock's holder,
        once damaged chunks are set aside: the sources of a sound one are not needed."""
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
        first = max(self.chunk_numbers(), default=-1) + 1
        if manifest is None:
            for folder in (self.folder.parent.parent, self.folder.parent, self.folder):
                durable.make_folder(folder)
            manifest = {
                "format_version": 1,
                "fingerprint": self.folder.name,
                "inputs": fingerprint_inputs(entry),
                "created_at": datetime.now(UTC).isoformat(),
                "versions": [{"from_chunk": first, **versions}],
            }
        else:
            last = {k: v for k, v in manifest["versions"][-1].items() if k != "from_chunk"}
            if last == versions:
                return
            log.warning("%s goes on from chunk %d with %s; before it was %s", self.name, first, versions, last)
            manifest["versions"].append({"from_chunk": first, **versions})
        durable.write_file(self.folder / "manifest.json", json.dumps(manifest, indent=1).encode())

    def manifest(self) -> dict[str, Any] | None:
        """What `start` noted; None where it is not there or damaged. The folder's name decides, so nothing is lost."""
        path = self.folder / "manifest.json"
        try:
            content = json.loads(path.read_bytes())
            if isinstance(content["versions"][-1], dict):
                return dict(content)
        except FileNotFoundError:
            return None
        except (ValueError, LookupError, TypeError):
            pass
        log.warning("%s is damaged; the next run writes it anew, without the versions of earlier chunks", path)
        return None

    def __iter__(self) -> Iterator[tuple[int, pq.ParquetFile]]:
        for number in self.chunk_numbers():
            yield number, self.open_chunk(number)


def merged_from(chunk: pq.ParquetFile) -> list[int]:
    """The numbers of the chunks that this one replaces."""
    return list(json.loads((chunk.metadata.metadata or {}).get(SOURCES_KEY, b"[]")))


def _total(column: pa.ChunkedArray) -> int:
    return int(np.asarray(column.fill_null(0)).sum())
