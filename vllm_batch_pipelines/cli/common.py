"""What the commands share: settings to objects, errors to exit codes, progress to the terminal."""

import json
import logging
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import IntEnum
from pathlib import Path
from typing import Annotated, Any, BinaryIO

import click
import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from resources import durable
from resources.batch_store.store import BatchStore
from resources.chunk_store.retry import ERRORS, Failures, failures_of
from resources.engine.catalog import Catalog, load_catalog
from resources.errors import BatchError, BatchStopped, EngineDown, InputRefused
from resources.progress import Progress as BatchProgress
from resources.settings import settings
from resources.targets import all_targets

Failed = Annotated[
    str | None,
    typer.Option(help="What to ask again, of errors,truncated,schema: no answer, cut, not fitting its JSON schema."),
]

stderr = Console(stderr=True, highlight=False)
stdout = Console(highlight=False)

log = logging.getLogger(__name__)

_LINE_SECONDS = 10


class Exit(IntEnum):
    OK = 0
    WITH_ERRORS = 1
    UNUSABLE = 2
    INTERRUPTED = 3


def open_store() -> BatchStore:
    return BatchStore(settings().data_root, all_targets(settings()))


def open_catalog() -> Catalog:
    return load_catalog(settings().models_file)


def failures(text: str | None) -> Failures:
    """What `--failed` chooses; errors where it is left out."""
    return ERRORS if text is None else failures_of(text.split(","))


def print_json(document: Any) -> None:
    """The one JSON document on stdout."""
    sys.stdout.write(json.dumps(document, indent=2, default=str) + "\n")


@contextmanager
def errors_for_people() -> Iterator[None]:
    """Turn an error into its message on stderr and the exit code of the contract."""
    try:
        yield
    except (BatchStopped, EngineDown) as error:
        stderr.print(f"[yellow]Interrupted:[/] {escape(str(error))}\nThe same command goes on from there.")
        raise typer.Exit(Exit.INTERRUPTED) from None
    except KeyboardInterrupt:
        stderr.print("[yellow]Interrupted.[/] What is committed stays; the same command goes on from there.")
        raise typer.Exit(Exit.INTERRUPTED) from None
    except BatchError as error:
        stderr.print(f"[red]Error:[/] {escape(str(error))}")
        raise typer.Exit(Exit.UNUSABLE) from None
    except OSError as error:
        stderr.print(f"[red]Error:[/] {escape(str(error))}")
        raise typer.Exit(Exit.UNUSABLE) from None
    except (typer.Exit, typer.Abort, click.exceptions.Exit, click.ClickException, click.Abort):
        raise
    except Exception as error:
        log.exception("unexpected")
        stderr.print(
            f"[red]Error:[/] {type(error).__name__}: {escape(str(error))}. This is a bug; what is committed stays."
        )
        raise typer.Exit(Exit.UNUSABLE) from None


@contextmanager
def replacing(target: Path) -> Iterator[BinaryIO]:
    """A stream that becomes the user's file in one step. A device or a pipe (/dev/null, say) is written to as it is."""
    if target.is_dir():
        raise InputRefused(f"{target} is a folder; name a file.")
    if target.exists() and not target.is_file():
        with target.open("wb") as stream:
            yield stream
        return
    with durable.replacing(target) as stream:
        yield stream


def copy(source: Path, target: Path) -> None:
    with source.open("rb") as content, replacing(target) as stream:
        shutil.copyfileobj(content, stream)


@contextmanager
def progress_bar() -> Iterator[Callable[[BatchProgress], None]]:
    """A bar on a terminal, a line now and then elsewhere. Always on stderr."""
    if not stderr.is_terminal:
        yield _lines()
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[detail]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=stderr, transient=False) as bar:
        tasks: dict[str, Any] = {}

        def show(now: BatchProgress) -> None:
            if now.phase not in tasks:
                tasks[now.phase] = bar.add_task(now.phase, total=now.total, detail="")
            bar.update(tasks[now.phase], completed=now.done, total=now.total, detail=_detail(now))

        yield show


def _lines() -> Callable[[BatchProgress], None]:
    last = time.monotonic()

    def show(now: BatchProgress) -> None:
        nonlocal last
        if time.monotonic() - last >= _LINE_SECONDS:
            last = time.monotonic()
            stderr.print(f"{now.phase}: {now.done} of {now.total} {_detail(now)}")

    return show


def _detail(now: BatchProgress) -> str:
    if now.note:
        return now.note
    parts = [f"{now.failed} errors" if now.failed else ""]
    if now.tokens_per_second:
        parts.append(f"{now.tokens_per_second:.0f} tokens/s")
    elif now.rows_per_second:
        parts.append(f"{now.rows_per_second:.0f} rows/s")
    if now.eta_seconds is not None and now.done < now.total:
        parts.append(f"about {duration(now.eta_seconds)} left")
    return ", ".join(part for part in parts if part)


def duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
