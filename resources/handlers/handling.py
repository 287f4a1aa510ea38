"""A handler at work: in a process of its own, on the published lines of one batch."""

import inspect
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from resources.batch_store.batch import Batch
from resources.batch_store.store import BatchStore
from resources.child import Tell
from resources.errors import BatchError
from resources.exports.published import Published
from resources.handlers.loading import make_handler

log = logging.getLogger(__name__)


class Results:
    """The lines of `output.jsonl` and then those of `errors.jsonl`, parsed one at a time, anew at each `for`."""

    def __init__(self, published: Published) -> None:
        self._published = published

    def __len__(self) -> int:
        return self._published.count

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for path in self._published.files("jsonl"):
            with path.open("rb") as lines:
                yield from map(json.loads, lines)


def handle_batch(tell: Tell, data_root: str, key: str, path: str) -> dict[str, Any]:
    """What runs there: `handled` is False where the handler does not want this batch.

    Raises:
        BatchError: the handler returned something else than True. Or what it raised.
    """
    batch = BatchStore(Path(data_root)).get(key)
    published = Published.of(batch)
    handler = make_handler(path)
    metadata = _metadata(batch, published)
    if not handler.enabled(metadata):
        return {"handled": False}
    try:
        answer = handler.handle(batch.key, Results(published), metadata)
    except Exception as error:
        _tell_of_error(handler, {"batch_id": batch.key, "error": error, "metadata": metadata})
        raise
    if answer is not True:
        raise BatchError(f"handle() returned {answer!r}; True says that it is done")
    return {"handled": True}


def _metadata(batch: Batch, published: Published) -> dict[str, Any]:
    """The metadata of the batch's options, and what we know of the batch under one key of ours."""
    summary = published.summary
    ours = {
        "batch_id": batch.key,
        "source": batch.spec.source_name,
        "revision": published.revision,
        "models": [*batch.current()],
        "lines": summary["lines"],
        "succeeded": summary["succeeded"],
        "failed": summary["failed"],
        "output_dir": str(published.folder),
    }
    return {**batch.spec.options.metadata, "vllm_batch": ours}


def _tell_of_error(handler: Any, known: dict[str, Any]) -> None:
    """Call `on_error` with those of `batch_id`, `error` and `metadata` that it takes."""
    if not callable(getattr(handler, "on_error", None)):
        return
    try:
        takes = inspect.signature(handler.on_error).parameters
        handler.on_error(**{name: value for name, value in known.items() if name in takes})
    except Exception:
        log.exception("on_error failed too")
