"""`vllm-batch webhooks`: what was not taken, sending it again, and trying a target out. Needs no running stack."""

from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Column, Table

from resources.settings import settings
from resources.targets import all_targets
from resources.webhooks.deliveries import Deliveries, Delivery
from resources.webhooks.target import WebhookTarget
from vllm_batch_pipelines.cli import common
from vllm_batch_pipelines.cli.common import Exit

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]

app = typer.Typer(no_args_is_help=True, help="Webhooks: targets, dead letters, a test event.")


def register(parent: typer.Typer) -> None:
    parent.add_typer(app, name="webhooks")


@app.command("list")
def list_(
    everything: Annotated[bool, typer.Option("--all", help="Dead letters that were taken later too.")] = False,
    as_json: AsJson = False,
) -> None:
    """List the targets, how much waits for each, and the events that were not taken. Shows no URL and no secret.

    Examples:

        vllm-batch webhooks list

        vllm-batch webhooks list --all --json
    """
    with common.errors_for_people():
        targets = all_targets(settings()).webhooks
        deliveries = _deliveries()
        letters = [letter for letter in deliveries.letters.all() if everything or letter.is_open]
        described = [_described(target, deliveries) for target in targets.values()]
        if as_json:
            common.print_json({"targets": described, "dead_letters": [letter.as_dict() for letter in letters]})
            return
        shown = Table("target", Column("goes to", overflow="fold"), "events", "hears of", "waiting")
        for one in described:
            of = "all batches" if one["all_batches"] else "batches that name it"
            shown.add_row(one["name"], one["place"], ", ".join(one["events"]), of, str(one["waiting"]))
        common.stdout.print(shown if described else "No webhook is defined.")
        # No table: an id is there to be copied, and an error to be read.
        common.stdout.print("Dead letters:" if letters else "No dead letters.")
        for letter in letters:
            error = "taken later" if letter.redelivered_at else letter.error or ""
            what = f"{letter.event_id} {letter.type}" + (f" of {letter.batch}" if letter.batch else "")
            how = f"{len(letter.attempts)} attempts until {letter.died_at[:19]}: {escape(error)}"
            common.stdout.print(f"{what} at {letter.target}, {how}", soft_wrap=True)


@app.command()
def redeliver(
    event_ids: Annotated[
        list[str] | None, typer.Argument(help="Events to send again. Left out: all dead letters.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Send dead letters again, with the bytes that were sent and a new signature. Exits 1 where one is not taken.

    Examples:

        vllm-batch webhooks redeliver

        vllm-batch webhooks redeliver msg_0a1b2c3d4e5f60718293a4b5c6d7e8f9
    """
    with common.errors_for_people():
        deliveries = _deliveries()
        _tell(deliveries.redeliver(deliveries.open_letters(event_ids or [])), as_json)


@app.command("test")
def try_out(
    target: Annotated[str, typer.Argument(help="The name of a webhook, as `vllm-batch webhooks list` shows it.")],
    as_json: AsJson = False,
) -> None:
    """Send one event of type webhook.test to a target, once. Exits 1 where it is not taken.

    Example:

        vllm-batch webhooks test ops
    """
    with common.errors_for_people():
        _tell([_deliveries().test(target)], as_json)


def _deliveries() -> Deliveries:
    return Deliveries(settings().data_root, all_targets(settings()).webhooks)


def _described(target: WebhookTarget, deliveries: Deliveries) -> dict[str, Any]:
    return {
        "name": target.name,
        "place": target.place,
        "format": target.format,
        "events": list(target.events),
        "all_batches": target.all_batches,
        "waiting": deliveries.outbox.count(target.name),
    }


def _tell(done: list[Delivery], as_json: bool) -> None:
    if as_json:
        common.print_json([one.as_dict() for one in done])
    else:
        for one in done:
            said = "[green]taken[/]" if one.delivered else f"[red]not taken[/]: {escape(one.error or '')}"
            common.stdout.print(f"{one.event_id} {one.type} at {one.target}: {said}", soft_wrap=True)
        if not done:
            common.stdout.print("No dead letters.")
    raise typer.Exit(Exit.OK if all(one.delivered for one in done) else Exit.WITH_ERRORS)
