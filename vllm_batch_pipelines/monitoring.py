"""How the machine does and what waits, every five minutes: observations of the asset `machine`, which the UI plots.

A sensor, not a run: some counts and a look at a disk need no process of their own.
"""

import shutil

from dagster import (
    AssetObservation,
    AssetSpec,
    DagsterInstance,
    DagsterRunStatus,
    DefaultSensorStatus,
    RunsFilter,
    SensorDefinition,
    SensorEvaluationContext,
    SensorResult,
    sensor,
)

from assets.partitions import OWNERS
from resources.batch_store import queue
from resources.batch_store.store import BatchStore
from resources.engine.hosts import Hosts
from resources.settings import Settings, settings
from resources.webhooks.deliveries import Deliveries

_INTERVAL_SECONDS = 300
_IN_PROGRESS = [DagsterRunStatus.STARTING, DagsterRunStatus.STARTED, DagsterRunStatus.CANCELING]

machine = AssetSpec(
    "machine",
    description="The disk of the data root, model servers, runs, and what waits; observed every five minutes.",
    group_name="monitoring",
    owners=OWNERS,
)


@sensor(
    minimum_interval_seconds=_INTERVAL_SECONDS,
    default_status=DefaultSensorStatus.RUNNING,
    description="Notes how the machine does and what waits as an observation of the asset `machine`. Starts nothing.",
)
def monitoring(context: SensorEvaluationContext) -> SensorResult:
    observed = AssetObservation(machine.key, metadata=facts(context.instance, settings()))
    return SensorResult(asset_events=[observed], skip_reason="observed")


def facts(instance: DagsterInstance, config: Settings) -> dict[str, float | str]:
    """What there is to see. Names as the UI shows them."""
    disk = shutil.disk_usage(config.data_root)
    hosts = Hosts(config.runtime_root)
    servers = hosts.status()
    deliveries = Deliveries(config.data_root, {})
    return {
        "disk_free_gb": round(disk.free / 1e9, 1),
        "disk_free_percent": round(100 * disk.free / disk.total, 1),
        "servers_up": len(servers),
        "servers": ", ".join(f"{server.model} ({server.state})" for server in servers) or "none",
        "runs_waiting_for_a_server": len(hosts.waiting()),
        "runs_queued": instance.get_runs_count(RunsFilter(statuses=[DagsterRunStatus.QUEUED])),
        "runs_in_progress": instance.get_runs_count(RunsFilter(statuses=_IN_PROGRESS)),
        "start_requests_waiting": sum(1 for _ in queue.pending(BatchStore(config.data_root))),
        "webhook_events_waiting": sum(map(deliveries.outbox.count, deliveries.outbox.targets())),
        "dead_letters": len(deliveries.open_letters()),
    }


SENSORS: list[SensorDefinition] = [monitoring]
