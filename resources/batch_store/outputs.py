"""The published files of a batch: `output.jsonl`, `errors.jsonl` and `results/part-*.parquet`, all in input order."""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from resources import durable
from resources.batch_format.answers import error_line, response_line, summarize
from resources.batch_store.batch import Batch
from resources.batch_store.requests import read_batches
from resources.chunk_store.generation import Generation
from resources.chunk_store.ordered import OrderedRows, ranges_of_lines
from resources.chunk_store.schema import RESULTS, is_success
from resources.chunk_store.writer import write_parquet

SAMPLES = 5
_REQUEST_COLUMNS = ["line", "custom_id", "url", "model", "error_code", "error_message", "error_param"]
_MISSING_MESSAGES = {
    "batch_expired": "the deadline of the batch passed before this request had an answer",
    "batch_incomplete": "the batch is not complete; this request has no answer yet",
    "batch_cancelled": "the batch was stopped before this request had an answer",
}


@dataclass
class OutputSummary:
    """Counts of what was published; `summary.json` beside the files.

    `generations` is the content of `results/current.json` that the files were made from. `missing` counts lines without
    an answer, which are in the errors with the code of `missing_code`. `schema_violations` counts answers that do not
    fit the JSON schema that was asked for: they are answers, and among those that succeeded.
    """

    lines: int = 0
    succeeded: int = 0
    failed: int = 0
    truncated: int = 0
    schema_violations: int = 0
    missing: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    errors_by_code: dict[str, int] = field(default_factory=dict)
    generations: dict[str, dict[str, Any]] = field(default_factory=dict)
    samples: list[dict[str, Any]] = field(default_factory=list)
    metadata: dict[str, str] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def write_outputs(
    batch: Batch,
    generations: dict[str, Generation],
    last_line: int,
    folder: Path,
    missing_code: str,
    step: Callable[[int], None],
) -> OutputSummary:
    """Write the three outputs into `folder`, synced. `step` gets the number of lines written so far."""
    summary = OutputSummary(metadata=batch.spec.options.metadata)
    writer = _Writer(batch, summary, missing_code, list(generations))
    scratch = folder / f"{durable.TEMPORARY}scratch"
    scratch.mkdir()
    (folder / "results").mkdir()
    span = ranges_of_lines(list(generations.values()), last_line)
    answers = OrderedRows(list(generations.values()), span, scratch)
    with (
        (folder / "output.jsonl").open("w", encoding="utf-8") as output,
        (folder / "errors.jsonl").open("w", encoding="utf-8") as errors,
    ):
        for part, (index, requests) in enumerate(_ranges(batch.requests_dir, span)):
            table = writer.write(requests, answers.between(index), output, errors)
            write_parquet(table, folder / "results" / f"part-{part:05d}.parquet")
            step(summary.lines)
    durable.remove_temporaries(folder)
    durable.sync_file(folder / "output.jsonl")
    durable.sync_file(folder / "errors.jsonl")
    summary.errors_by_code = dict(writer.codes)
    return summary


def _ranges(requests_dir: Path, span: int) -> Iterator[tuple[int, pa.Table]]:
    """The requests cut at multiples of `span` lines."""
    held: list[pa.RecordBatch] = []
    current = 0
    for batch in read_batches(requests_dir, _REQUEST_COLUMNS):
        owners = batch["line"].to_numpy() // span
        start = 0
        for index in np.unique(owners).tolist():
            end = int(np.searchsorted(owners, index, side="right"))
            if index != current and held:
                yield current, pa.Table.from_batches(held)
                held = []
            current = index
            held.append(batch.slice(start, end - start))
            start = end
    if held:
        yield current, pa.Table.from_batches(held)


class _Writer:
    def __init__(self, batch: Batch, summary: OutputSummary, missing_code: str, models: list[str]) -> None:
        self._models = pa.array(models, pa.string())
        self._prefix = f"batch_req_{batch.spec.identity[:12]}_"
        self._summary = summary
        self._missing_code = missing_code
        self.codes: Counter[str] = Counter()

    def write(self, requests: pa.Table, answers: pa.Table, output: TextIO, errors: TextIO) -> pa.Table:
        """Write the lines of one range; returns their published rows. Every request row becomes exactly one line."""
        joined = self._join(requests.combine_chunks(), answers)
        summary = self._summary
        texts: list[str | None] = []
        columns = ["line", "custom_id", "status_code", "request_id", "response", "error_code", "error_message", "param"]
        for line, custom_id, status, request_id, response, code, message, param in zip(
            *(joined[name].to_pylist() for name in columns), strict=True
        ):
            text = None
            if response is not None:
                text = summarize(response.encode()).text
                entry = response_line(f"{self._prefix}{line}", custom_id, status, request_id, response)
                (output if is_success(status) else errors).write(entry)
            else:
                at = line if param is not None or request_id is None else None
                errors.write(error_line(f"{self._prefix}{line}", custom_id, code, message, at, param))
            texts.append(text)
            if code is None:
                summary.succeeded += 1
                if len(summary.samples) < SAMPLES:
                    summary.samples.append({"line": line, "custom_id": custom_id, "text": (text or response)[:2000]})
            else:
                self.codes[code] += 1
        summary.lines += len(joined)
        summary.failed = summary.lines - summary.succeeded
        summary.prompt_tokens += _sum(joined["prompt_tokens"])
        summary.completion_tokens += _sum(joined["completion_tokens"])
        summary.truncated += joined["finish_reason"].to_pylist().count("length")
        summary.schema_violations += len(joined) - _sum(pa.compute.fill_null(joined["fits_schema"], True))
        joined = joined.append_column("text", pa.array(texts, pa.string()))
        return joined.select(RESULTS.names).cast(RESULTS)

    def _join(self, requests: pa.Table, answers: pa.Table) -> pa.Table:
        """Requests with their answers beside them: by line, and by the generation of the request's model."""
        count = max(len(self._models), 1)
        model = pa.compute.index_in(requests["model"], value_set=self._models).fill_null(0).to_numpy()
        lines = requests["line"].to_numpy() * count + model
        answered = answers["line"].to_numpy() * count + answers["source"].to_numpy()
        rejected = requests["error_code"].is_valid().to_numpy()
        position = np.searchsorted(answered, lines)
        position = np.minimum(position, max(len(answered) - 1, 0))
        found = (answered[position] == lines) & ~rejected if len(answered) else np.zeros(len(lines), np.bool_)
        taken = answers.take(pa.array(np.where(found, position, 0), mask=~found))
        missing = pa.array(~found & ~rejected)
        self._summary.missing += missing.true_count
        code = pa.scalar(self._missing_code)
        message = pa.scalar(_MISSING_MESSAGES[self._missing_code])
        columns = {name: requests[name] for name in ("line", "custom_id", "url", "model")}
        columns |= {name: taken[name] for name in answers.column_names if name not in ("line", "source")}
        for name, missing_value in (("error_code", code), ("error_message", message)):
            own = pa.compute.coalesce(requests[name], taken[name])
            columns[name] = pa.compute.if_else(missing, missing_value, own)
        columns["param"] = requests["error_param"]
        return pa.table(columns)


def _sum(column: pa.ChunkedArray) -> int:
    return int(pa.compute.sum(column).as_py() or 0)


def verify_outputs(batch: Batch) -> list[str]:
    """What is wrong with the published files, in words; empty where each line of the input stands in them once.

    Reads them back: the line numbers of the rows against those of the requests, and the count of lines in both files.
    """
    published = np.concatenate(
        [np.empty(0, np.int64)]
        + [
            pq.read_table(p, columns=["line"])["line"].to_numpy()
            for p in sorted(batch.output_dir.glob("results/part-*"))
        ]
    )
    wanted = np.concatenate(
        [np.empty(0, np.int64)] + [b["line"].to_numpy() for b in read_batches(batch.requests_dir, ["line"])]
    )
    problems = []
    if len(wanted) and not np.array_equal(published, wanted):
        missing = np.setdiff1d(wanted, published)
        twice = len(published) - len(np.unique(published))
        problems.append(f"results: {len(missing)} lines missing, {twice} twice, of {len(wanted)}")
    written = sum(_count_lines(batch.output_dir / name) for name in ("output.jsonl", "errors.jsonl"))
    if written != len(published):
        problems.append(f"output.jsonl and errors.jsonl hold {written} lines, not {len(published)}")
    return problems


def _count_lines(path: Path) -> int:
    with path.open("rb") as stream:
        return sum(block.count(b"\n") for block in iter(lambda: stream.read(1024 * 1024), b""))
