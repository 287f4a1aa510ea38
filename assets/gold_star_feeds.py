"""Gold stars for systems that keep examples elsewhere: as events for webhooks, and as rows of a table."""

from functools import partial

from dagster import AssetExecutionContext, Failure, MaterializeResult, asset

from assets.exports import export_each
from assets.gold_stars import gold_stars
from assets.partitions import OWNERS, REVIEW_GROUP
from assets.reporting import failures_for_people, table
from resources.exports.resource import ExportsResource
from resources.label_studio.resource import LabelStudioResource
from resources.webhooks.resource import WebhooksResource
from resources.webhooks.star_events import announce_changes


@asset(deps=[gold_stars], group_name=REVIEW_GROUP, owners=OWNERS, kinds={"webhook"}, code_version="1")
def gold_star_events(
    context: AssetExecutionContext, label_studio: LabelStudioResource, webhooks: WebhooksResource
) -> MaterializeResult:  # type: ignore[type-arg]
    """Each change among the gold stars, left for the webhooks that ask for such events; `deliver_webhooks` sends it."""
    with failures_for_people(context):
        deliveries = webhooks.deliveries()
        told = {target: announce_changes(label_studio.reviews(target), deliveries) for target in label_studio.targets()}
    rows = [
        {"target": target, "webhook": webhook, "events": count}
        for target, counts in told.items()
        for webhook, count in counts.items()
    ]
    return MaterializeResult(
        metadata={
            "events": sum(counts.total() for counts in told.values()),
            "told": table(rows, ["target", "webhook", "events"]),
        }
    )


@asset(deps=[gold_stars], group_name=REVIEW_GROUP, owners=OWNERS, kinds={"sql"}, code_version="1")
def gold_star_tables(
    context: AssetExecutionContext, label_studio: LabelStudioResource, export_targets: ExportsResource
) -> MaterializeResult:  # type: ignore[type-arg]
    """All gold stars in each `gold_stars_table`; what is no star any more leaves it. One that fails, fails alone."""
    with failures_for_people(context):
        reviewed = [name for name in label_studio.targets() if label_studio.reviews(name).state().number]
        wanted = {
            f"{target}, {reviews}": partial(export_targets.export_gold_stars, reviews, target)
            for target in export_targets.gold_star_tables()
            for reviews in reviewed
        }
    tables, failed = export_each(context, wanted)
    if failed:
        raise Failure(
            description=f"{len(failed)} of {len(wanted)} tables failed, the others are done; the next run writes all "
            f"stars. {'; '.join(failed)}",
            metadata={"tables": tables},
            allow_retries=False,
        )
    return MaterializeResult(metadata={"tables": tables})
