"""The published rows of a batch, a piece at a time."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

COLUMNS = ["line", "custom_id", "text", "status_code", "error_code"]


def data_root() -> Path:
    """Where vllm_batch_pipelines keeps its batches: the same variable that it reads."""
    return Path(os.environ.get("VLLM_BATCH_DATA", "data"))


class PublishedBatch:
    """The latest revision: `output` is a link that is changed in one step, so it is followed once and then kept to."""

    def __init__(self, root: Path, key: str) -> None:
        self.key = key
        self._folder = (root / "batches" / key / "output").resolve(strict=True)

    @property
    def metadata(self) -> dict[str, str]:
        """What the batch's options say of it (`metadata: {team: support}` in its sidecar)."""
        summary = json.loads((self._folder / "summary.json").read_bytes())
        found: dict[str, str] = summary["metadata"]
        return found

    def rows(self) -> Iterator[dict[str, Any]]:
        for part in sorted((self._folder / "results").glob("part-*.parquet")):
            with pq.ParquetFile(part) as file:
                for piece in file.iter_batches(1000, columns=COLUMNS):
                    yield from piece.to_pylist()
