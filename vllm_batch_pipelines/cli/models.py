"""`vllm-batch models`: the catalog, listed and checked without loading anything."""

import typer
from rich.table import Table

from resources.engine.factory import EngineStarter
from resources.settings import settings
from vllm_batch_pipelines.cli import common
from vllm_batch_pipelines.cli.batches import AsJson
from vllm_batch_pipelines.cli.common import Exit


def register(app: typer.Typer) -> None:
    group = typer.Typer(help="The model catalog (models.yaml).", no_args_is_help=True)
    group.command("list")(list_models)
    group.command("check")(check)
    app.add_typer(group, name="models")


def list_models(as_json: AsJson = False) -> None:
    """List the models that requests may name, and which has a server that is up.

    Example:

        vllm-batch models list
    """
    with common.errors_for_people():
        catalog = common.open_catalog()
        config = settings()
        warm = EngineStarter(config.runtime_root, config.data_root / "logs" / "engines").warm(catalog.entries.values())
        if as_json:
            fields = [entry.model_dump(mode="json", exclude={"env"}) for entry in catalog.entries.values()]
            common.print_json([entry | {"warm": entry["name"] in warm} for entry in fields])
            return
        table = Table("model", "engine", "source", "aliases", "", box=None, header_style="bold")
        for entry in catalog.entries.values():
            source, aliases = entry.source or entry.base_url or "", ", ".join(entry.aliases)
            table.add_row(entry.name, entry.engine, source, aliases, "warm" if entry.name in warm else "")
        common.stdout.print(table)


def check() -> None:
    """Check the catalog: its syntax, and that what it names is there. Exits 1 where something is missing.

    Example:

        vllm-batch models check
    """
    with common.errors_for_people():
        catalog = common.open_catalog()
        problems = catalog.problems()
        for name in catalog.entries:
            common.stdout.print(f"{name}: {problems.get(name, 'ok')}", soft_wrap=True)
        common.stderr.print(f"{settings().models_file}: {len(catalog.entries)} models, {len(problems)} with a problem.")
    raise typer.Exit(Exit.WITH_ERRORS if problems else Exit.OK)
