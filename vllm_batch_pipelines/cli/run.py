"""`vllm-batch run`: the lean core. One process, no Dagster, no database, no daemon; same store, same checkpoint."""

import contextlib
import signal
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.markup import escape

from resources import pipeline
from resources.answering import Mode
from resources.batch_format.options import options_from_text
from resources.batch_store.batch import Batch
from resources.engine.catalog import Catalog, EngineKind
from resources.engine.factory import EngineStarter
from resources.errors import InputRefused
from resources.pipeline import AnswerReport
from resources.settings import settings
from vllm_batch_pipelines.cli import common
from vllm_batch_pipelines.cli.common import Exit

KEEP_ALIVE_SECONDS = 60.0
"""For how long a server stays that nobody but a lone run has asked for."""


def register(app: typer.Typer) -> None:
    app.command()(run)


def run(
    file: Annotated[Path, typer.Argument(help="A .jsonl, .jsonl.gz or .jsonl.zst file in OpenAI Batch format.")],
    model: Annotated[str | None, typer.Option(help="Replaces body.model in every line.")] = None,
    engine: Annotated[
        EngineKind | None, typer.Option(help="null: a dry run, kept apart from real answers. Default: the catalog's.")
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Where to copy the answers to.")] = None,
    errors: Annotated[Path | None, typer.Option("--errors", "-e", help="Where to copy the error lines to.")] = None,
    mode: Annotated[Mode, typer.Option(help="What to ask of a batch that was begun before.")] = Mode.RESUME,
    failed: common.Failed = None,
    option: Annotated[list[str] | None, typer.Option(help="A batch option, key=value. May be repeated.")] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Take only the first N lines, as a batch of their own.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")] = False,
) -> None:
    """Register a file, answer it in this process, write the outputs.

    A run that was interrupted or killed goes on where it stopped when the same command is given again.
    Exit codes: 0 every line has an answer, 1 completed with error rows, 2 cannot be run, 3 interrupted.

    Examples:

        vllm-batch run examples/demo.jsonl --output answers.jsonl --errors errors.jsonl

        vllm-batch run big.jsonl --engine null --json          # dry run: checks the file, loads no model

        vllm-batch run big.jsonl --limit 20 --option chunk_rows=10

        vllm-batch run big.jsonl --mode retry_failed --failed errors,truncated
    """
    with common.errors_for_people(), _terminate_as_interrupt():
        started = time.monotonic()
        failures = common.failures(failed)
        if failed is not None and mode is not Mode.RETRY_FAILED:
            raise InputRefused("--failed says what `--mode retry_failed` asks again; give both.")
        catalog = common.open_catalog()
        options = options_from_text(option or [])
        if model is not None:
            options["model"] = model
        dry_run: Literal["null"] | None = "null" if engine is EngineKind.NULL else None
        registration = common.open_store().register(
            file, options, engine=dry_run, limit=limit, restore=mode is Mode.RESTART
        )
        batch = registration.batch
        if registration.note:
            common.stderr.print(f"[yellow]Note:[/] {registration.note}")
        for what, _, names in batch.spec.options.targets():
            if names:
                named = escape(", ".join(names))
                common.stderr.print(f"[yellow]Note:[/] {what} ({named}) only happens on the stack: `vllm-batch up`.")
        config = settings()
        starter = EngineStarter(
            config.runtime_root,
            config.data_root / "logs" / "engines",
            f"{batch.key}, vllm-batch run",
            KEEP_ALIVE_SECONDS,
        )
        stop = threading.Event()
        with batch.lock("vllm-batch run"), common.progress_bar() as progress:
            checked = pipeline.check(batch, catalog, recheck=mode is not Mode.RESUME, stop=stop, progress=progress)
            _expect_engine(engine, catalog, checked.models)
            report = pipeline.answer(batch, catalog, starter, mode=mode, failed=failures, stop=stop, progress=progress)
            published = pipeline.publish(batch, stop=stop, progress=progress)
            copies = _copy(batch, {"output.jsonl": output, "errors.jsonl": errors})
        document = {
            "key": batch.key,
            "status": "completed",
            "engine": sorted({entry.engine for entry in report.models}),
            "request_counts": {
                "total": published.lines,
                "completed": published.succeeded,
                "failed": published.failed,
                "rejected": checked.rejected,
                "asked_now": report.asked,
            },
            "schema_violations": published.schema_violations,
            "errors_by_code": published.errors_by_code,
            "usage": {"prompt_tokens": published.prompt_tokens, "completion_tokens": published.completion_tokens},
            "models": [entry.as_dict() for entry in report.models],
            "seconds": round(time.monotonic() - started, 3),
            "output_file": str(copies["output.jsonl"]),
            "error_file": str(copies["errors.jsonl"]),
            "results": str(batch.output_dir / "results"),
        }
        if as_json:
            common.print_json(document)
        else:
            _tell(document)
        _tell_of_servers(report, catalog)
    raise typer.Exit(Exit.WITH_ERRORS if published.failed else Exit.OK)


def _expect_engine(engine: EngineKind | None, catalog: Catalog, models: Iterable[str]) -> None:
    for entry in map(catalog.get, models):
        if engine not in (None, EngineKind.NULL, entry.engine):
            raise InputRefused(
                f"--engine {engine}: model `{entry.name}` is on engine {entry.engine} in {catalog.origin}."
            )


def _tell(document: dict[str, Any]) -> None:
    counts = document["request_counts"]
    print = common.stderr.print
    print(f"[bold]{document['key']}[/]: {counts['completed']} of {counts['total']} lines answered", end="")
    print(f", {counts['failed']} error rows ({_codes(document)})" if counts["failed"] else "", end="")
    print(f"; {counts['asked_now']} asked now", end="")
    copied = sum(model["copied"] for model in document["models"])
    print(f", {copied} more the same as one of these" if copied else "", end="")
    print(f", {document['seconds']:.1f} s.")
    if document["schema_violations"]:
        print(f"  {document['schema_violations']} answers do not fit their JSON schema")
    print(f"  answers  {document['output_file']}")
    if counts["failed"]:
        print(f"  errors   {document['error_file']}")
    print(f"  rows     {document['results']}")


def _tell_of_servers(report: AnswerReport, catalog: Catalog) -> None:
    """One line, where a server of ours stays for the next run."""
    kept = [model.model for model in report.models if model.engine == EngineKind.VLLM and model.asked]
    if kept:
        seconds = min(KEEP_ALIVE_SECONDS, catalog.get(kept[-1]).keep_alive)
        common.stderr.print(
            f"The server of {kept[-1]} stays warm for {seconds:.0f} s more; `vllm-batch engine stop` ends it now."
        )


def _codes(document: dict[str, Any]) -> str:
    return ", ".join(f"{count} {code}" for code, count in sorted(document["errors_by_code"].items()))


def _copy(batch: Batch, targets: dict[str, Path | None]) -> dict[str, Path]:
    """Copy published files to where the user wants them; the paths to tell."""
    places = {}
    for name, target in targets.items():
        if target is not None:
            common.copy(batch.output_dir / name, target)
        places[name] = target or batch.output_dir / name
    return places


_ENDINGS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextlib.contextmanager
def _terminate_as_interrupt() -> Iterator[None]:
    """SIGTERM and SIGHUP end a run as Ctrl-C does: in-flight requests aborted, finished rows committed.

    SIGINT is set too: a process that a script started in the background ignores it otherwise, `cancel` included.
    """

    def interrupt(number: int, _: object) -> None:
        raise KeyboardInterrupt(signal.Signals(number).name)

    previous = {number: signal.signal(number, interrupt) for number in _ENDINGS}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
