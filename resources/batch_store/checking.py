"""Every line of an input checked and written as a row of `requests/`. Needs the names of the catalog, and no model."""

import threading
import time
from pathlib import Path
from typing import BinaryIO

from resources.batch_format.lines import MAX_LINE_BYTES, iter_lines
from resources.batch_format.requests import Code, Rejected, check_line
from resources.batch_store.requests import RequestRow, RequestsSummary, RequestsWriter
from resources.engine.catalog import Catalog
from resources.errors import BatchStopped
from resources.progress import Progress, ProgressCallback, silent

_LINES_BETWEEN_LOOKS = 4096


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
    for count, (number, raw) in enumerate(iter_lines(stream, suffix)):
        writer.add(_request_row(number, raw, model, catalog))
        summary.last_line = number
        if count % _LINES_BETWEEN_LOOKS == 0:
            if stop is not None and stop.is_set():
                raise BatchStopped("Stopped while the lines were checked; the next run checks them anew.")
            rate = count / max(time.monotonic() - started, 1e-6)
            progress(Progress("check", number, max(total, number), rows_per_second=rate))
    return writer.finish(summary)


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
