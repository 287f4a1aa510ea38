"""How batches that failed or were cancelled come to be announced: from the runs of the instance to the outbox.

Not by a run-status sensor, whose cursor moves on past an exception. `announce_endings` looks at the runs that ended
since its own cursor; the cursor moves after everything is in the outbox, durably, and a look that repeats an earlier
one changes nothing, since an event that waits or was sent is known by its id.
"""

from dataclasses import dataclass, field
from datetime import datetime

from dagster import DagsterInstance, DagsterRun, DagsterRunStatus, RunRecord

from assets.reporting import LOCKED_TAG
from resources.batch_store.batch import Batch
from resources.batch_store.store import BatchStore
from resources.engine.catalog import Catalog
from resources.errors import BatchError, BatchNotFound
from resources.webhooks import batch_events, records
from resources.webhooks.deliveries import Deliveries
from vllm_batch_pipelines import starting
from vllm_batch_pipelines.stack import INTERRUPTED_TAG


@dataclass
class Announced:
    """What a look left in the outbox, and where the next one begins."""

    cursor: str
    events: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def announce_endings(
    instance: DagsterInstance,
    store: BatchStore,
    catalog: Catalog | None,
    deliveries: Deliveries,
    cursor: str | None,
    now: datetime | None = None,
) -> Announced:
    """Leave `batch.failed` and `batch.cancelled` for the batches whose run ended since the cursor and that no run takes
    up again by itself. No network. Without a catalog (it cannot be read), a batch that will never complete is told as
    one that fails again and again."""
    ended, looked_to = starting.ended_since(instance, cursor, now)
    found = Announced(looked_to)
    for record in ended:
        key = record.dagster_run.tags.get(starting.PARTITION_TAG)
        if key is None or not starting.works_on_a_batch(record.dagster_run):
            continue
        try:
            _announce(instance, store.get(key), record, catalog, deliveries, found)
        except BatchNotFound:
            continue
        except (BatchError, ValueError) as error:  # one batch that cannot be read, or a target that is gone
            found.notes.append(f"{key}: {error}")
    return found


def _announce(
    instance: DagsterInstance,
    batch: Batch,
    record: RunRecord,
    catalog: Catalog | None,
    deliveries: Deliveries,
    found: Announced,
) -> None:
    run, at = record.dagster_run, starting.in_utc(record.update_timestamp)
    name = "batch.cancelled" if run.status is DagsterRunStatus.CANCELED else "batch.failed"
    event_id = batch_events.ending_id(batch, run.run_id, name)
    new = [
        target
        for target in deliveries.hearing(name, batch.spec.options)
        if not deliveries.outbox.holds(event_id, target.name) and not records.is_known(batch, event_id, target.name)
    ]
    if new and _is_the_end(instance, batch, run, catalog):
        make = batch_events.cancelled if name == "batch.cancelled" else batch_events.failed
        deliveries.announce(make(batch, run.run_id, at), new)
        found.events.append(f"{batch.key}: {name}")


def _is_the_end(instance: DagsterInstance, batch: Batch, run: DagsterRun, catalog: Catalog | None) -> bool:
    """Whether the batch stays as this run left it, by the rules of the sweep."""
    runs = starting.runs_of(instance, batch.key)
    own = next((place for place, other in enumerate(runs) if other.run_id == run.run_id), None)
    if own is None or LOCKED_TAG in run.tags or INTERRUPTED_TAG in run.tags:
        return False
    if batch.is_published() and batch.work().mode is None:
        return False  # it is complete, whatever became of a run that was not needed
    if run.status is DagsterRunStatus.CANCELED:
        return True
    if own == 0 and catalog is not None and starting.cannot_complete(batch, catalog):
        return True
    return starting.is_given_up(runs[own:])
