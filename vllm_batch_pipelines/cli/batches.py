"""Commands about batches: submit, status, results, retry, cancel, validate. They read the store; few need the stack."""

import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterable
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from resources import pipeline
from resources.batch_format.lines import input_suffix, open_regular
from resources.batch_format.options import load_sidecar, options_from_text, parse_options
from resources.batch_store import queue
from resources.batch_store.batch import Batch
from resources.batch_store.checking import check_stream
from resources.batch_store.status import BatchStatus, status_of
from resources.batch_store.store import BatchStore
from resources.errors import BatchError, CheckpointError, InputRefused
from resources.progress import Progress
from resources.settings import settings
from vllm_batch_pipelines import stack
from vllm_batch_pipelines.cli import common
from vllm_batch_pipelines.cli.common import Exit

Key = Annotated[str, typer.Argument(help="The key of a batch, as `vllm-batch status` lists it.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
_WAIT_SECONDS = 0.5


class Format(StrEnum):
    JSONL = "jsonl"
    PARQUET = "parquet"
    CSV = "csv"


def register(app: typer.Typer) -> None:
    for command in (submit, status, results, retry, cancel, validate):
        app.command()(command)


def submit(
    file: Annotated[Path, typer.Argument(help="A .jsonl, .jsonl.gz or .jsonl.zst file in OpenAI Batch format.")],
    model: Annotated[str | None, typer.Option(help="Replaces body.model in every line.")] = None,
    option: Annotated[list[str] | None, typer.Option(help="A batch option, key=value. May be repeated.")] = None,
    wait: Annotated[bool, typer.Option("--wait", help="Show progress until the batch is done.")] = False,
    as_json: AsJson = False,
) -> None:
    """Register a file and queue a run of it on the running stack.

    With --wait the exit codes are those of `vllm-batch run`; Ctrl-C then only ends the waiting.

    Examples:

        vllm-batch submit examples/demo.jsonl --wait

        vllm-batch submit tickets.jsonl --option priority=1 --option metadata={team:support}
    """
    with common.errors_for_people():
        store = common.open_store()
        options = options_from_text(option or []) | ({"model": model} if model is not None else {})
        registration = store.register(file, options)
        batch = registration.batch
        if registration.note:
            common.stderr.print(f"[yellow]Note:[/] {registration.note}")
        if pipeline.is_complete(batch, common.open_catalog()):
            common.stderr.print(f"{batch.key}: answered already, nothing to run.")
            _tell(status_of(store, batch), show=wait, as_json=as_json)
        else:
            _start(store, batch, "resume", wait=wait, as_json=as_json)


def retry(
    key: Key,
    failed: common.Failed = None,
    wait: Annotated[bool, typer.Option("--wait", help="Show progress.")] = False,
    as_json: AsJson = False,
) -> None:
    """Check the lines of a batch again and ask for those that failed, on the running stack.

    Examples:

        vllm-batch retry demo-1a2b3c4d --wait

        vllm-batch retry demo-1a2b3c4d --failed truncated,schema
    """
    with common.errors_for_people():
        store, failures = common.open_store(), common.failures(failed)
        _start(store, store.get(key), "retry_failed", failures, wait=wait, as_json=as_json)


def status(
    key: Annotated[str | None, typer.Argument(help="A batch; all of them where left out.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show how far batches are. Works with the stack down.

    Examples:

        vllm-batch status

        vllm-batch status demo-1a2b3c4d --json
    """
    with common.errors_for_people():
        store = common.open_store()
        if key is not None:
            found = status_of(store, store.get(key))
            common.print_json(found.as_dict()) if as_json else _show_one(found)
            return
        statuses = [status_of(store, batch) for batch in store]
        if as_json:
            common.print_json([found.as_dict() for found in statuses])
        elif not statuses:
            common.stderr.print(
                f"No batches yet. Drop a .jsonl file in {settings().inbox_dir}, or `vllm-batch run FILE`."
            )
        else:
            _show_all(statuses)


def results(
    key: Key,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="A file; stdout where left out.")] = None,
    errors: Annotated[Path | None, typer.Option("--errors", "-e", help="Where the error lines go (jsonl).")] = None,
    format: Annotated[
        Format, typer.Option(help="jsonl: answers as OpenAI writes them; parquet, csv: one row a line.")
    ] = Format.JSONL,
) -> None:
    """Write the results of a batch; those so far where it is not complete. Works with the stack down.

    Examples:

        vllm-batch results demo-1a2b3c4d -o answers.jsonl -e errors.jsonl

        vllm-batch results demo-1a2b3c4d --format csv | head
    """
    with common.errors_for_people():
        if format is Format.PARQUET and output is None:
            raise InputRefused("parquet is not for a terminal: name a file with -o.")
        batch = common.open_store().get(key)
        if batch.is_published():
            _write_results(batch.output_dir, output, errors, format)
            return
        with tempfile.TemporaryDirectory(prefix="vllm-batch-", dir=_scratch(output)) as scratch:
            folder = _partial(batch, Path(scratch))
            _write_results(folder, output, errors, format)


def cancel(key: Key) -> None:
    """Stop a batch: a queued one leaves the queue, a running one ends cleanly. What is committed stays.

    Example:

        vllm-batch cancel demo-1a2b3c4d
    """
    with common.errors_for_people():
        store = common.open_store()
        batch = store.get(key)
        done = ["left the queue"] if queue.withdraw(store, key) else []
        if stack.stack_state(settings()) is not None:
            from vllm_batch_pipelines import instance

            done += instance.cancel_runs(settings(), key)
        owner = batch.locked_by()
        if not done and owner and owner.get("owner") == "vllm-batch run" and owner.get("host") == os.uname().nodename:
            os.kill(int(owner["pid"]), signal.SIGINT)
            done = [f"asked process {owner['pid']} to stop"]
        if not done:
            raise BatchError(f"{key} is neither queued nor running.")
        common.stderr.print(f"{key}: {', '.join(done)}.")


def validate(
    file: Annotated[Path, typer.Argument(help="A .jsonl, .jsonl.gz or .jsonl.zst file in OpenAI Batch format.")],
    model: Annotated[str | None, typer.Option(help="Replaces body.model in every line.")] = None,
    option: Annotated[list[str] | None, typer.Option(help="A batch option, key=value. May be repeated.")] = None,
    as_json: AsJson = False,
) -> None:
    """Check a file line by line without registering it. Loads no model.

    Exit codes: 0 all lines are valid, 1 some are not, 2 the file cannot be run at all.

    Example:

        vllm-batch validate examples/demo.jsonl
    """
    with common.errors_for_people():
        suffix = input_suffix(file)
        if suffix is None:
            raise InputRefused(f"{file}: a batch file ends in .jsonl, .jsonl.gz or .jsonl.zst.")
        given = load_sidecar(file) | options_from_text(option or []) | ({"model": model} if model else {})
        options = parse_options(given, origin=f"options of {file.name}")
        with (
            tempfile.TemporaryDirectory(prefix="vllm-batch-") as scratch,
            open_regular(file) as stream,
            common.progress_bar() as bar,
        ):
            summary = check_stream(stream, suffix, options.model, common.open_catalog(), Path(scratch), progress=bar)
        if as_json:
            common.print_json(summary.as_dict())
        else:
            _show_check(file, summary)
    if summary.valid == 0:
        raise typer.Exit(Exit.UNUSABLE)
    raise typer.Exit(Exit.WITH_ERRORS if summary.rejected else Exit.OK)


def _start(
    store: BatchStore, batch: Batch, mode: str, failed: Iterable[str] = (), *, wait: bool, as_json: bool
) -> None:
    before = None if batch.locked_by() else batch.run_record().get("started_at")
    queue.enqueue(store, batch.key, mode, failed=failed)
    common.stderr.print(f"{batch.key}: queued.")
    if stack.stack_state(settings()) is None:
        common.stderr.print("[yellow]The stack is not running:[/] the run starts when `vllm-batch up` does.")
    found = _wait(store, batch, before) if wait else status_of(store, batch)
    _tell(found, show=wait, as_json=as_json)


def _tell(found: BatchStatus, *, show: bool, as_json: bool) -> None:
    """Print what was waited for, and exit as `vllm-batch run` does."""
    if as_json:
        common.print_json(found.as_dict())
    elif show:
        _show_one(found)
    if show and found.state in ("failed", "interrupted"):
        raise typer.Exit(Exit.UNUSABLE if found.state == "failed" else Exit.INTERRUPTED)
    if show and found.failed:
        raise typer.Exit(Exit.WITH_ERRORS)


def _wait(store: BatchStore, batch: Batch, before: str | None) -> BatchStatus:
    """Follow a batch until a run that began after the one of `before` has ended."""
    with common.progress_bar() as bar:
        while True:
            found = status_of(store, batch)
            if found.state == "running" and found.lines:
                bar(_progress(found))
            elif found.state == "running" or batch.run_record().get("started_at") == before:
                pass  # another run, or ours is being started
            elif found.state == "completed":
                return found
            elif found.state in ("failed", "interrupted"):
                time.sleep(_WAIT_SECONDS)
                if status_of(store, batch).state == found.state:
                    return found
            time.sleep(_WAIT_SECONDS)


def _progress(found: BatchStatus) -> Progress:
    done, lines = found.done or 0, found.lines or 0
    return Progress(
        found.phase or "",
        done,
        lines,
        found.failed or 0,
        found.tokens_per_second or 0.0,
        (lines - done) / found.eta_seconds if found.eta_seconds else 0.0,
        found.note or "",
    )


def _scratch(output: Path | None) -> Path | None:
    return output.absolute().parent if output else None


def _partial(batch: Batch, scratch: Path) -> Path:
    """What is committed so far, written as outputs. A chunk that is merged away meanwhile is met by reading again."""
    generations = pipeline.newest_generations(batch, common.open_catalog())
    for attempt in range(5):
        folder = scratch / f"try-{attempt}"
        try:
            summary = pipeline.write_to(
                batch, folder, generations, "batch_incomplete", threading.Event(), lambda _: None
            )
        except (CheckpointError, FileNotFoundError):
            if attempt == 4 or batch.locked_by() is None:
                raise
            continue
        common.stderr.print(
            f"[yellow]{batch.key} is not complete:[/] "
            f"{summary.lines - summary.missing} of {summary.lines} lines have an answer."
        )
        return folder
    raise AssertionError


def _write_results(folder: Path, output: Path | None, errors: Path | None, format: Format) -> None:
    if errors is not None:
        common.copy(folder / "errors.jsonl", errors)
    if format is Format.JSONL and output is not None:
        common.copy(folder / "output.jsonl", output)
    elif format is Format.JSONL:
        with (folder / "output.jsonl").open("rb") as source:
            shutil.copyfileobj(source, sys.stdout.buffer)
    elif output is None:
        _write_rows(folder, sys.stdout.buffer, format)
    else:
        with common.replacing(output) as target:
            _write_rows(folder, target, format)


def _write_rows(folder: Path, target: Any, format: Format) -> None:
    import pyarrow.csv as pa_csv
    import pyarrow.parquet as pq

    from resources.chunk_store.schema import RESULTS

    kinds = {Format.CSV: pa_csv.CSVWriter, Format.PARQUET: pq.ParquetWriter}
    with kinds[format](target, RESULTS) as writer:
        for part in sorted((folder / "results").glob("part-*.parquet")):
            writer.write_table(pq.read_table(part))


def _show_one(found: BatchStatus) -> None:
    print = common.stdout.print
    print(f"[bold]{found.key}[/]  {found.state}" + (f" ({found.phase})" if found.state == "running" else ""))
    print(
        f"  source      {escape(found.source)}, registered {found.registered_at}"
        + (f", dry run ({found.engine})" if found.engine else "")
    )
    if found.lines is not None:
        print(f"  lines       {found.lines}" + (f", {found.rejected} of them invalid" if found.rejected else ""))
    if found.percent is not None:
        rate = f", {found.tokens_per_second:.0f} tokens/s" if found.tokens_per_second else ""
        left = f", about {common.duration(found.eta_seconds)} left" if found.eta_seconds else ""
        print(f"  done        {found.done} ({found.percent:.0f} %){rate}{left}")
    if found.succeeded is not None:
        misfits = f", {found.schema_violations} do not fit their JSON schema" if found.schema_violations else ""
        print(f"  answered    {found.succeeded}{misfits}, {found.failed} error rows")
    if found.output_file:
        print(f"  answers     {found.output_file}", soft_wrap=True)
    if found.error_file:
        print(f"  errors      {found.error_file}", soft_wrap=True)
    if found.error:
        print(f"  [red]error[/]       {escape(found.error)}", soft_wrap=True)
    for error in (found.errors or {}).get("data", []):
        if error["line"] is not None:
            print(f"    line {error['line']}: {error['code']}, {error['message']}", markup=False, soft_wrap=True)
    if found.run:
        print(f"  run         {found.run.get('owner')}, process {found.run.get('pid')}, since {found.run.get('since')}")


def _show_all(statuses: list[BatchStatus]) -> None:
    table = Table("batch", "state", "lines", "done", "errors", "registered", box=None, header_style="bold")
    for found in statuses:
        done = f"{found.percent:.0f} %" if found.percent is not None else ""
        failed = "" if found.failed is None else str(found.failed)
        table.add_row(found.key, found.state, str(found.lines or ""), done, failed, found.registered_at[:19])
    common.stdout.print(table)


def _show_check(file: Path, summary: Any) -> None:
    print = common.stdout.print
    print(
        f"{escape(str(file))}: {summary.lines} lines, {summary.valid} valid, {summary.rejected} invalid.",
        soft_wrap=True,
    )
    for model, count in sorted(summary.models.items()):
        print(f"  {count} for {model}")
    if summary.first_rejects:
        table = Table("line", "custom_id", "code", "what is wrong", box=None, header_style="bold")
        for reject in summary.first_rejects:
            texts = (reject["custom_id"] or "", reject["error_code"], reject["error_message"])
            table.add_row(str(reject["line"]), *(escape(text) for text in texts))
        print(table)
        if summary.rejected > len(summary.first_rejects):
            print(f"  and {summary.rejected - len(summary.first_rejects)} more")
