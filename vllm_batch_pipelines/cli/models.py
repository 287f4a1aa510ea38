"""`vllm-batch models`: the catalog, listed and checked without loading anything."""

from typing import Annotated

import typer
from rich.table import Table

from resources.engine import model_files
from resources.engine.catalog import AdapterEntry, EngineKind, ModelEntry, Residency
from resources.engine.devices import installed_gpus
from resources.engine.factory import EngineStarter
from resources.engine.vllm_command import NO_SLEEP_ON_CPU
from resources.errors import InputRefused
from resources.settings import settings
from vllm_batch_pipelines.cli import common
from vllm_batch_pipelines.cli.batches import AsJson
from vllm_batch_pipelines.cli.common import Exit


def register(app: typer.Typer) -> None:
    group = typer.Typer(help="The model catalog (models.yaml).", no_args_is_help=True)
    group.command("list")(list_models)
    group.command("check")(check)
    group.command("pull")(pull)
    app.add_typer(group, name="models")


def list_models(as_json: AsJson = False) -> None:
    """List the models that requests may name, and which has a server that is up (warm) or asleep.

    Example:

        vllm-batch models list
    """
    with common.errors_for_people():
        catalog = common.open_catalog()
        config = settings()
        engines = EngineStarter(config.runtime_root, config.data_root / "logs" / "engines")
        states = engines.states(catalog.entries.values())
        if as_json:
            fields = [entry.model_dump(mode="json", exclude={"env", "base"}) for entry in catalog.entries.values()]
            flags = [{state: states.get(entry["name"]) == state for state in ("warm", "asleep")} for entry in fields]
            common.print_json([entry | flag for entry, flag in zip(fields, flags, strict=True)])
            return
        table = Table("model", "engine", "source", "aliases", "", box=None, header_style="bold")
        for entry in catalog.entries.values():
            source, aliases = entry.source or entry.base_url or "", ", ".join(entry.aliases)
            if isinstance(entry, AdapterEntry):
                source = f"{entry.adapter} over {entry.base.name}"
            table.add_row(entry.name, entry.engine, source, aliases, states.get(entry.name, ""))
        common.stdout.print(table)


def check() -> None:
    """Check the catalog: its syntax, that the files are there, and that a model fits the device. Loads nothing.

    Exits 1 where something is missing or does not fit.

    Example:

        vllm-batch models check
    """
    with common.errors_for_people():
        catalog = common.open_catalog()
        problems = catalog.problems()
        for name, entry in catalog.entries.items():
            said = "ok"
            if name not in problems and entry.engine is EngineKind.VLLM:
                said, fine = _look_at(entry)
                if not fine:
                    problems[name] = said
            common.stdout.print(f"{name}: {problems.get(name, said)}", soft_wrap=True)
        common.stderr.print(f"{settings().models_file}: {len(catalog.entries)} models, {len(problems)} with a problem.")
    raise typer.Exit(Exit.WITH_ERRORS if problems else Exit.OK)


def pull(
    model: Annotated[str | None, typer.Argument(help="A model of the catalog. Left out: all that are hub ids.")] = None,
) -> None:
    """Fetch the files of hub models at their revision, into the hub's own cache (HF_HOME).

    Example:

        vllm-batch models pull qwen3-8b
    """
    with common.errors_for_people():
        catalog = common.open_catalog()
        hub = [e for e in catalog.entries.values() if e.engine is EngineKind.VLLM and not e.local_source]
        entries = [catalog.get(model).server_entry] if model else [e for e in hub if e is e.server_entry]
        if not entries:
            common.stderr.print("No model of the catalog is a hub id; there is nothing to pull.")
        for entry in entries:
            if entry.engine is not EngineKind.VLLM:
                raise InputRefused(f"`{entry.name}` is on engine {entry.engine}; there is nothing to pull.")
            common.stderr.print(f"{entry.name}: {model_files.pull(entry)}", soft_wrap=True)


def _look_at(entry: ModelEntry) -> tuple[str, bool]:
    """What there is to say of a model's files, and whether all is well."""
    folder = model_files.model_folder(entry)
    if folder is None:
        return f"not here yet; `vllm-batch models pull {entry.name}` fetches it", True
    if missing := model_files.missing_files(folder):
        return f"{folder} lacks {', '.join(missing[:3])}", False
    need = model_files.memory_needed(entry, folder)
    gpus = installed_gpus()
    there = model_files.device_memory(entry, bool(gpus))
    said = f"about {_gigabytes(need.total)} of {_gigabytes(there)} on {'a GPU' if gpus else 'this machine'}"
    if entry.devices_needed > max(len(gpus), 1):
        return f"needs {entry.devices_needed} GPUs; {len(gpus)} are here", False
    if not gpus and entry.residency is Residency.SLEEP:
        said += f"; `residency: sleep`: {NO_SLEEP_ON_CPU}"
    return (f"ok, {said}", True) if need.total < there else (f"does not fit: {said}", False)


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.1f} GB"
