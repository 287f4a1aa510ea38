"""The folder of one batch. This class is the only one that knows the names in it.

batch.json                  spec, written once (operational options may be replaced)
lock                        held by the process that works on the batch
work.json                   a restart or retry that was begun and is not published; how many restarts there were
run.json                    what the last or current run says of itself; shown to people, never trusted as progress
input.jsonl[.gz|.zst]       the immutable snapshot
requests/part-*.parquet     one row a line, valid or not; summary.json beside them
results/<model>/<fingerprint>/manifest.json chunk-*.parquet       the checkpoint
results/current.json        which generation of each model readers see
output -> outputs/<revision>/output.jsonl errors.jsonl results/part-*.parquet summary.json
webhooks/<event>.<target>.json        what was sent to whom, with every attempt; see resources/webhooks/records.py
label_studio/<target>.jsonl  which lines are tasks in Label Studio
"""

import json
import logging
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from resources import durable
from resources.batch_store.lock import ensure_held, lock_owner, writer_lock
from resources.batch_store.spec import BatchSpec
from resources.chunk_store.retry import ERRORS, FailureKind, Retry
from resources.errors import BatchNotFound, CheckpointError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Work:
    """`mode` is what was begun: a mode of a run, or `publish...` once all is answered; None where nothing is left.
    `restarts` counts how often all was asked anew: each time in generations of their own. `retry` is what the mode
    retry_failed asks again."""

    restarts: int
    mode: str | None
    retry: Retry | None = None


@dataclass(frozen=True)
class Batch:
    root: Path
    spec: BatchSpec

    @property
    def key(self) -> str:
        return self.spec.key

    @property
    def input_path(self) -> Path:
        return self.root / f"input{self.spec.suffix}"

    @property
    def requests_dir(self) -> Path:
        return self.root / "requests"

    @property
    def results_dir(self) -> Path:
        return self.root / "results"

    @property
    def output_dir(self) -> Path:
        """The published outputs, of the latest revision."""
        return self.root / "output"

    @property
    def outputs_dir(self) -> Path:
        return self.root / "outputs"

    @property
    def webhooks_dir(self) -> Path:
        """The record of what was sent to webhooks."""
        return self.root / "webhooks"

    @property
    def review_dir(self) -> Path:
        """What was imported into Label Studio, a journal a target."""
        return self.root / "label_studio"

    @contextmanager
    def lock(self, owner: str) -> Iterator[None]:
        """Be the one that works on this batch. Leftovers of a killed process are removed on entry."""
        with writer_lock(self.root / "lock", owner):
            for folder in (self.root, self.results_dir, self.outputs_dir):
                durable.remove_temporaries(folder)
            yield

    def locked_by(self) -> dict[str, Any] | None:
        return lock_owner(self.root / "lock")

    def ensure_locked(self) -> None:
        """Raises BatchLocked where this process does not hold the batch's lock, or no longer the one others meet."""
        ensure_held(self.root / "lock")

    # What the stages say of themselves: small JSON files, each written in one step.

    def requests_summary(self) -> dict[str, Any] | None:
        """What `check` found; None where the lines have not been checked."""
        return _read_json(self.requests_dir / "summary.json")

    def output_summary(self) -> dict[str, Any] | None:
        """What `publish` wrote; None where nothing is published."""
        return _read_json(self.output_dir / "summary.json")

    def current(self) -> dict[str, dict[str, Any]]:
        """The generation of each model that readers see: `{model: {generation, revision, rows}}`."""
        return _read_json(self.results_dir / "current.json") or {}

    def set_current(self, current: dict[str, dict[str, Any]]) -> None:
        self.ensure_locked()
        durable.write_file(self.results_dir / "current.json", json.dumps(current, indent=1).encode())

    def work(self) -> "Work":
        """What was begun and is not published yet. A plain run goes on with it."""
        content = _read_json(self.root / "work.json")
        if content is None:
            return Work(self._restarts_by_folders(), None)
        mode = content.get("mode")
        retry = None
        if mode == "retry_failed":
            failures = frozenset(map(FailureKind, content.get("failed", ERRORS)))
            retry = Retry(failures, content.get("begun_at"))
        return Work(int(content.get("restarts", 0)), mode, retry)

    def _restarts_by_folders(self) -> int:
        """What `work.json` said, where it is damaged: a generation is named after the restart that began it."""
        found = (re.search(r"-(\d+)$", path.name) for path in self.results_dir.glob("*/*"))
        return max((int(match[1]) for match in found if match), default=0)

    def set_work(self, restarts: int, mode: str | None, retry: Retry | None = None) -> None:
        self.ensure_locked()
        content: dict[str, Any] = {"restarts": restarts, "mode": mode}
        if retry is not None:
            content |= {"failed": sorted(retry.failures), "begun_at": retry.begun_at}
        durable.write_file(self.root / "work.json", json.dumps(content).encode())

    def run_record(self) -> dict[str, Any]:
        """The last run's word: `status` running|completed|failed|interrupted, `phase`, `progress`, `error`."""
        return _read_json(self.root / "run.json") or {}

    def write_run_record(self, record: dict[str, Any], *, durable_write: bool = False) -> None:
        self.ensure_locked()
        record = {**record, "updated_at": datetime.now(UTC).isoformat(timespec="milliseconds")}
        durable.write_file(self.root / "run.json", json.dumps(record, indent=1).encode(), durable=durable_write)

    def final_failure(self) -> dict[str, Any] | None:
        """Why this batch cannot complete (`code`, `message`, `errors`); None where another run may help."""
        record = self.run_record()
        error = record.get("error")
        return error if record.get("status") == "failed" and isinstance(error, dict) and error.get("final") else None

    def is_published(self) -> bool:
        """Whether the outputs are there and tell of the current results."""
        summary = self.output_summary()
        return summary is not None and bool(self.current()) and summary.get("generations") == self.current()

    def next_revision_number(self) -> int:
        """For the outputs about to be published: nanoseconds since 1970, and greater than that of any before, also
        where the clock was set back."""
        last = revision_number(self.output_dir.resolve()) if self.output_dir.is_symlink() else 0
        return max(time.time_ns(), last + 1)

    def deadline(self) -> datetime | None:
        """The moment after which nothing more is asked, in UTC."""
        return self.spec.options.deadline_at(self.spec.registered_at)

    def is_pruned(self) -> bool:
        """Whether the snapshot was removed to free space."""
        return not self.input_path.exists()


def revision_number(folder: Path) -> int:
    """Greater for a later revision of the outputs. It ends the name of its folder, in hex."""
    return int(folder.name.rpartition("-")[2], 16)


def read_spec(root: Path) -> BatchSpec:
    try:
        return BatchSpec.model_validate_json((root / "batch.json").read_bytes())
    except FileNotFoundError:
        raise BatchNotFound(f"{root.name}: no batch is registered under that key.") from None
    except ValidationError as error:
        raise CheckpointError(f"{root / 'batch.json'} is damaged: {error}") from None


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError:
        content = None
    if not isinstance(content, dict):
        log.warning("%s is damaged and taken as not there; the next run writes it anew", path)
        return None
    return content
