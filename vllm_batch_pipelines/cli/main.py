"""The command line, `vllm-batch`. One module a command group; nothing here imports Dagster until a command needs it."""

import logging

import typer

from vllm_batch_pipelines.cli import batches, doctor, engine, manage, models, run, stack, webhooks

app = typer.Typer(
    name="vllm-batch",
    help="Offline LLM batches that never lose or repeat work: drop a JSONL file, get every line answered.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")

for module in (run, stack, batches, manage, models, engine, webhooks, doctor):
    module.register(app)

if __name__ == "__main__":
    app()
