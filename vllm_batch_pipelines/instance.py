"""What commands do on the Dagster instance of the running stack. Imports Dagster: load it only when it is needed."""

from dagster import DagsterRunStatus, RunsFilter

from assets.partitions import BATCH_FILES
from resources.settings import Settings
from vllm_batch_pipelines.stack import instance_env
from vllm_batch_pipelines.starting import PARTITION_TAG, RUN_KEY_TAG

_CANCELLABLE = [
    DagsterRunStatus.NOT_STARTED,
    DagsterRunStatus.QUEUED,
    DagsterRunStatus.STARTING,
    DagsterRunStatus.STARTED,
]

_ENDED = [DagsterRunStatus.FAILURE, DagsterRunStatus.CANCELED]


def cancel_runs(settings: Settings, key: str) -> list[str]:
    """Cancel the queued and running runs of a batch; what was done, in words."""
    done = []
    with instance_env(settings) as instance:
        for run in instance.get_runs(RunsFilter(tags={PARTITION_TAG: key}, statuses=_CANCELLABLE)):
            if instance.run_coordinator is not None and instance.run_coordinator.cancel_run(run.run_id):
                done.append(f"cancelled run {run.run_id[:8]} ({run.status.value.lower()})")
    return done


def how_it_ended(settings: Settings, request_id: str) -> str | None:
    """How the run of a start request ended that did not succeed, in words; None where it did, or goes on."""
    with instance_env(settings) as instance:
        for run in instance.get_runs(RunsFilter(tags={RUN_KEY_TAG: request_id}, statuses=_ENDED), limit=1):
            return f"run {run.run_id[:8]} was {run.status.value.lower()}; the web UI has its log"
    return None


def remove_partition(settings: Settings, key: str) -> None:
    """Take a key out of the partitions, if it is one."""
    with instance_env(settings) as instance:
        instance.delete_dynamic_partition(str(BATCH_FILES.name), key)
