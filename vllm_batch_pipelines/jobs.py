"""Jobs: a batch from its lines to its outputs, the same for failed rows, and the registration of files."""

from collections.abc import Sequence
from pathlib import Path

from dagster import (
    AssetKey,
    AssetSelection,
    Config,
    Failure,
    JobDefinition,
    OpExecutionContext,
    define_asset_job,
    job,
    op,
)
from dagster._core.definitions.unresolved_asset_job_definition import UnresolvedAssetJobDefinition
from pydantic import Field

from assets.webhooks import POOL, in_words, summary
from resources.answering import Mode
from resources.batch_store import queue
from resources.batch_store.resource import BatchStoreResource
from resources.batch_store.store import BatchStore
from resources.chunk_store.retry import FailureKind
from resources.errors import InputRefused
from resources.settings import settings
from resources.targets import all_targets
from resources.webhooks.outbox import PROGRESS
from resources.webhooks.resource import WebhooksResource

BATCH_ASSET_KEYS = [AssetKey("batch_requests"), AssetKey("batch_results"), AssetKey("batch_output")]
BATCH_ASSETS = AssetSelection.assets(*BATCH_ASSET_KEYS)


def mode_config(mode: str, failed: Sequence[str] = ()) -> dict[str, object]:
    """Run config of a batch job for a mode, and for what a retry asks again. All but resume check the lines again."""
    if mode == Mode.RESUME:
        return {}
    results: dict[str, object] = {"mode": Mode(mode).name} | (
        {"failed": [str(kind) for kind in failed]} if failed else {}
    )
    return {"ops": {"batch_requests": {"config": {"recheck": True}}, "batch_results": {"config": results}}}


process_batch = define_asset_job(
    "process_batch",
    selection=BATCH_ASSETS,
    description="Check, answer and publish a batch. What is done already is left alone.",
)

retry_failed_rows = define_asset_job(
    "retry_failed_rows",
    selection=BATCH_ASSETS,
    config=mode_config(Mode.RETRY_FAILED, [FailureKind.ERRORS]),
    description="Check the lines again, ask again for those that failed (`failed`: errors, truncated, schema), publish "
    "the latest answers.",
)


class RegisterConfig(Config):
    paths: list[str] = Field([], description="Files to register; relative ones are taken in the inbox.")
    glob: str = Field("", description="Or a pattern, such as `tickets-*.jsonl`, in the inbox.")


@op(description="Register files of the inbox or an input root as batches, and queue a run of each.")
def register(context: OpExecutionContext, config: RegisterConfig, store: BatchStoreResource) -> None:
    inbox = settings().inbox_dir
    allowed = [inbox, *(root.expanduser().resolve() for root in settings().input_roots)]
    try:
        matched: list[Path] = sorted(inbox.glob(config.glob)) if config.glob else []
    except (ValueError, NotImplementedError) as error:  # an absolute one, or none at all
        raise Failure(description=f"`glob` {config.glob!r} is not a pattern in {inbox}: {error}") from None
    given = [inbox / path for path in config.paths] + matched
    if not given:
        raise Failure(description=f"No file named: set `paths` or a `glob` that matches something in {inbox}.")
    batches = BatchStore(Path(store.data_root), all_targets(settings()))
    refused = []
    for path in given:
        try:
            if not any(path.parent.resolve().is_relative_to(root) for root in allowed):
                raise InputRefused(f"{path} is outside of the inbox and of VLLM_BATCH_INPUT_ROOTS.")
            registration = batches.register(path.parent.resolve() / path.name)
            queue.enqueue(batches, registration.batch.key)
            context.log.info(f"{path.name} is {registration.batch.key}; its run is queued.")
        except Exception as error:  # whatever one file brings about, the others are registered
            refused.append(str(error))
            context.log.error(str(error))  # noqa: TRY400 (the message says it all)
    if refused:
        raise Failure(description=f"{len(refused)} of {len(given)} files refused: " + "; ".join(refused[:5]))


@job(description="For those who have only the UI: register files by path or pattern and start their batches.")
def register_files() -> None:
    register()


@op(pool=POOL, description="Send what waits in the outbox, to every target that no other run sends to.")
def send_waiting(context: OpExecutionContext, webhooks: WebhooksResource) -> None:
    done = webhooks.deliveries().deliver_waiting(f"Dagster run {context.run_id[:8]}")
    context.add_output_metadata(summary(done))
    lost = [one for one in done if not one.delivered and one.type != PROGRESS]
    if lost:
        raise Failure(description=f"{in_words(lost[:5])}. {len(lost)} dead letters in all.")


@job(description="Send the events that wait: batches that failed or were cancelled, and progress.")
def deliver_webhooks() -> None:
    send_waiting()


class RedeliverConfig(Config):
    event_ids: list[str] = Field([], description="Events to send again; all that are dead letters where it is empty.")


@op(pool=POOL, description="Send dead letters again, with the bytes that were sent, and mark those that are taken.")
def send_again(context: OpExecutionContext, config: RedeliverConfig, webhooks: WebhooksResource) -> None:
    deliveries = webhooks.deliveries()
    done = deliveries.redeliver(deliveries.open_letters(config.event_ids))
    context.add_output_metadata(summary(done))
    lost = [one for one in done if not one.delivered]
    if lost:
        raise Failure(description=f"{in_words(lost[:5])}. {len(lost)} of {len(done)} stay dead letters.")


@job(description="Send dead letters again: events that a webhook did not take.")
def redeliver_webhooks() -> None:
    send_again()


WEBHOOK_JOBS: list[JobDefinition | UnresolvedAssetJobDefinition] = [deliver_webhooks, redeliver_webhooks]
JOBS: list[JobDefinition | UnresolvedAssetJobDefinition] = [process_batch, retry_failed_rows, register_files]
