"""webhook_deliveries: who wants to hear that a batch is complete has heard it."""

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

from dagster import (
    AssetCheckResult,
    AssetCheckSeverity,
    AssetCheckSpec,
    AssetExecutionContext,
    AutomationCondition,
    MaterializeResult,
    asset,
)

from assets.batch_output import batch_output
from assets.partitions import BATCH_FILES, GROUP, OWNERS
from assets.reporting import failures_for_people, table
from resources.batch_store.resource import BatchStoreResource
from resources.errors import DeliveryFailed
from resources.webhooks.batch_events import completed
from resources.webhooks.deliveries import Delivery
from resources.webhooks.resource import WebhooksResource

POOL = "webhooks"
OLD = timedelta(days=7)
"""Automation tells nobody of what was complete so long before: webhooks may be turned on beside years of batches."""
_AUTOMATION_TAG = "dagster/from_automation_condition"
COLUMNS = ["target", "batch", "type", "delivered", "before", "attempts", "status", "error", "event_id"]


@asset(
    deps=[batch_output],
    partitions_def=BATCH_FILES,
    group_name=GROUP,
    owners=OWNERS,
    kinds={"webhook"},
    pool=POOL,
    code_version="1",
    automation_condition=AutomationCondition.eager() & AutomationCondition.all_deps_blocking_checks_passed(),
    check_specs=[
        AssetCheckSpec(
            "delivered",
            asset="webhook_deliveries",
            partitions_def=BATCH_FILES,
            description="Every webhook that hears of this batch has taken its batch.completed.",
        )
    ],
)
def webhook_deliveries(
    context: AssetExecutionContext, store: BatchStoreResource, webhooks: WebhooksResource
) -> Iterator[AssetCheckResult | MaterializeResult]:  # type: ignore[type-arg]
    """`batch.completed`, signed, at every webhook that hears of the batch. What was taken before is not sent again."""
    with failures_for_people(context):
        batch = store.store().get(context.partition_key)
        event = completed(batch)
        if _AUTOMATION_TAG in context.run.tags and datetime.now(UTC) - event.at > OLD:
            note = f"Completed on {event.at:%Y-%m-%d}: nobody is told unless a person materializes this."
            yield AssetCheckResult(check_name="delivered", passed=True, description=note)
            yield MaterializeResult(metadata={"note": note})
            return
        deliveries = webhooks.deliveries().deliver(batch, event)
        lost = [delivery for delivery in deliveries if not delivery.delivered]
        yield AssetCheckResult(
            check_name="delivered",
            passed=not lost,
            severity=AssetCheckSeverity.ERROR,
            description=in_words(lost)
            or (f"{len(deliveries)} delivered." if deliveries else "Nobody hears of this batch."),
        )
        if lost:
            raise DeliveryFailed(
                f"{in_words(lost)}. Kept as dead letters: `vllm-batch webhooks redeliver` sends them again, and "
                "materializing this asset does."
            )
    yield MaterializeResult(metadata=summary(deliveries))


def in_words(lost: list[Delivery]) -> str:
    """Which events were not taken, and why."""
    return "; ".join(f"`{one.target}` did not take {one.type} in {one.attempts} attempts: {one.error}" for one in lost)


def summary(deliveries: list[Delivery]) -> dict[str, Any]:
    """What a person sees of deliveries; without URLs, which can be secrets."""
    return {
        "delivered": sum(one.delivered and not one.before for one in deliveries),
        "delivered_before": sum(one.before for one in deliveries),
        "not_delivered": sum(not one.delivered for one in deliveries),
        "deliveries": table([one.as_dict() for one in deliveries[:100]], COLUMNS),
    }
