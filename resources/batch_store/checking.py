"""Every line of an input checked and written as a row of `requests/`. Needs the names of the catalog, and no model."""

import threading
import time
from collections.abc import Generator
from contextlib import closing
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa

from resources.ahead import one_ahead
from resources.batch_format.lines import MAX_LINE_BYTES, iter_lines
from resources.batch_format.requests import Code, Rejected, check_line
from resources.batch_store.requests import (
    GROUP_BYTES,
    GROUP_ROWS,
    RequestRow,
    RequestsSummary,
    RequestsWriter,
    to_table,
)
from resources.engine.catalog import Catalog
from resources.errors import BatchStopped
from resources.progress import Progress, ProgressCallback, silent


def check_stream(
    stream: BinaryIO,
    suffix: str,
    model: str | None,
    catalog: Catalog,
    folder: Path,
    *,
    total: int = 0,
    stop: threading.Event | None = None,
    progress: ProgressCallback = silent,
) -> RequestsSummary:
    """Check the lines of an input and write them into `folder` as Parquet. `model` stands for that of every line."""
    writer = RequestsWriter(folder)
    summary = RequestsSummary(names=catalog.names)
    started = time.monotonic()
    with closing(one_ahead(_checked(stream, suffix, model, catalog))) as groups:
        for group in groups:
            if stop is not None and stop.is_set():
                raise BatchStopped("Stopped while the lines were checked; the next run checks them anew.")
            writer.write(group)
            summary.last_line = group["line"][-1].as_py()
            rate = writer.rows / max(time.monotonic() - started, 1e-6)
            progress(Progress("check", summary.last_line, max(total, summary.last_line), rows_per_second=rate))
    return writer.finish(summary)


def _checked(stream: BinaryIO, suffix: str, model: str | None, catalog: Catalog) -> Generator[pa.Table, None, None]:
    """The rows of the lines, in groups that are written as they are."""
    rows: list[RequestRow] = []
    size = 0
    for number, raw in iter_lines(stream, suffix):
        rows.append(_request_row(number, raw, model, catalog))
        size += len(raw or b"")
        if len(rows) >= GROUP_ROWS or size >= GROUP_BYTES:
            yield to_table(rows)
            rows, size = [], 0
    if rows:
        yield to_table(rows)


def _request_row(number: int, raw: bytes | None, override: str | None, catalog: Catalog) -> RequestRow:
    if raw is None:
        message = f"the line is over {MAX_LINE_BYTES} bytes"
        return (number, None, None, None, None, str(Code.LINE_TOO_LONG), message, None)
    try:
        request = check_line(raw)
    except Rejected as bad:
        return (number, bad.custom_id, None, None, None, str(bad.code), bad.message, bad.param)
    asked = override or request.model
    if asked is None:
        code, message = str(Code.MISSING), "`body.model` is missing, and the batch has no option `model`"
        return (number, request.custom_id, request.url, None, None, code, message, "body.model")
    model = catalog.resolve(asked)
    if model is None:
        code, message = str(Code.MODEL_NOT_FOUND), catalog.unknown(asked)
        return (number, request.custom_id, request.url, asked[:200], None, code, message, "body.model")
    return (number, request.custom_id, request.url, model, request.body, None, None, None)
