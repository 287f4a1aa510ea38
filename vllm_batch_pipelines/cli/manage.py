"""Commands that remove things: rm and prune. Both ask first."""

import re
import shutil
from datetime import UTC, datetime, timedelta
from typing import Annotated

import typer
from rich.markup import escape

from resources import durable
from resources.batch_store import queue
from resources.batch_store.batch import Batch
from resources.errors import BatchLocked, OptionsError
from resources.settings import settings
from vllm_batch_pipelines import stack
from vllm_batch_pipelines.cli import common

Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]


def register(app: typer.Typer) -> None:
    app.command()(rm)
    app.command()(prune)


def rm(key: Annotated[str, typer.Argument(help="The key of a batch.")], yes: Yes = False) -> None:
    """Remove a batch with its snapshot, answers and outputs, and its partition where the stack is up.

    Example:

        vllm-batch rm demo-1a2b3c4d
    """
    with common.errors_for_people():
        store = common.open_store()
        batch = store.get(key)
        if not yes:
            typer.confirm(f"Remove {batch.root} with everything in it?", abort=True)
        store.remove(key)
        queue.withdraw(store, key)
        if stack.stack_state(settings()) is not None:
            from vllm_batch_pipelines import instance

            instance.remove_partition(settings(), key)
        common.stderr.print(f"{key}: removed.")


def prune(
    older_than: Annotated[str, typer.Option(help="Age since the batch was registered, such as 30d or 12h.")],
    everything: Annotated[bool, typer.Option("--all", help="Remove spec and outputs too.")] = False,
    yes: Yes = False,
) -> None:
    """Free the space of completed batches: snapshot, requests and chunks go; spec and outputs stay.

    Examples:

        vllm-batch prune --older-than 30d

        vllm-batch prune --older-than 90d --all --yes
    """
    with common.errors_for_people():
        before = datetime.now(UTC) - _age(older_than)
        store = common.open_store()
        old = [b for b in store if b.spec.registered_at < before and b.is_published() and b.locked_by() is None]
        old = [b for b in old if everything or _prunable(b)]
        if not old:
            common.stderr.print("Nothing to prune.")
            return
        for batch in old:
            common.stderr.print(f"  {batch.key}  registered {batch.spec.registered_at:%Y-%m-%d}")
        what = "everything of" if everything else "snapshot, requests and chunks of"
        if not yes:
            typer.confirm(f"Remove {what} {len(old)} completed batches?", abort=True)
        for batch in old:
            try:
                store.remove(batch.key) if everything else _prune(batch)
            except BatchLocked as locked:
                common.stderr.print(f"[yellow]Left alone:[/] {escape(str(locked))}")
        common.stderr.print("Pruned.")


def _prunable(batch: Batch) -> bool:
    return batch.input_path.exists() or any(batch.results_dir.glob("*/*/chunk-*.parquet"))


def _prune(batch: Batch) -> None:
    with batch.lock("vllm-batch prune"):
        if not batch.is_published() or batch.work().mode:
            return  # begun anew while we asked
        batch.input_path.unlink(missing_ok=True)  # first: what is left then counts as pruned
        durable.sync_folder(batch.root)
        for generation in [p for p in batch.results_dir.glob("*/*") if p.is_dir()]:
            trash = durable.temporary_beside(batch.root / "pruned")
            generation.rename(trash)
            shutil.rmtree(trash)
        for part in batch.requests_dir.glob("part-*.parquet"):
            part.unlink()


def _age(text: str) -> timedelta:
    match = re.fullmatch(r"(\d+)\s*([smhd])", text.strip())
    if not match:
        raise OptionsError(f"--older-than {text}: must be a number and a unit, such as 30d or 12h.")
    unit = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}[match[2]]
    return timedelta(**{unit: int(match[1])})
