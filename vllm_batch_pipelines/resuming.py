"""What a stopped stack or a dead process left undone after a batch: webhooks, exports, handlers, reviews.

Automation asks for such an asset once for each publication; a run that was cut off would stay missing until a person
looked. Batches themselves are the sweep's.
"""

from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from datetime import datetime

from dagster import AssetKey, DagsterInstance, DagsterRun, DagsterRunStatus, RunRecord, RunRequest, RunsFilter

from assets.partitions import BATCH_FILES
from vllm_batch_pipelines.stack import INTERRUPTED_TAG
from vllm_batch_pipelines.starting import PARTITION_TAG, WITH_A_PROCESS, ended_since, works_on_a_batch

LOST_TIMES_TAG = "vllm_batch/process_gone_times"
MOST_TIMES = 3
"""A run whose process goes away so often is left alone: it may be what kills it."""


@dataclass
class Resumed:
    """What a look asks for, and where the next one begins."""

    cursor: str
    runs: list[RunRequest] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def resume_cut_off(
    instance: DagsterInstance, defined: AbstractSet[AssetKey], cursor: str | None, now: datetime | None = None
) -> Resumed:
    """Ask again for the assets of runs that the stack's stop or the death of their process has cut off, as far as
    batch and assets are still there. A look that repeats an earlier one asks for nothing new, since the run key is made
    of the run that was cut off."""
    ended, looked_to = ended_since(instance, cursor, now)
    batches = set(instance.get_dynamic_partitions(str(BATCH_FILES.name))) if ended else set()
    found = Resumed(looked_to)
    for record in ended:
        run = record.dagster_run
        key = run.tags.get(PARTITION_TAG)
        if key not in batches or not run.asset_selection or not run.asset_selection <= defined:
            continue
        if works_on_a_batch(run) or not _is_cut_off(instance, run):
            continue
        if _was_run_since(instance, record, key):
            continue
        lost = int(run.tags.get(LOST_TIMES_TAG, 0)) + (run.status is DagsterRunStatus.FAILURE)
        names = ", ".join(sorted(asset.to_user_string() for asset in run.asset_selection))
        if lost >= MOST_TIMES:
            found.notes.append(f"{key}: {names}: lost its process {lost} times; left alone")
            continue
        found.notes.append(f"{key}: {names}: was cut off, is run again")
        found.runs.append(
            RunRequest(
                run_key=f"again:{run.run_id}",
                partition_key=key,
                asset_selection=sorted(run.asset_selection),
                tags={LOST_TIMES_TAG: str(lost)},
            )
        )
    return found


def close_dead_runs(instance: DagsterInstance) -> None:
    """Record the end of runs that a power cut, say, has left as going on. For a moment in which no run can live. Those
    of batches are left to the sweep, which knows by their locks."""
    for run in instance.get_runs(RunsFilter(statuses=[DagsterRunStatus.STARTING, *WITH_A_PROCESS])):
        if not works_on_a_batch(run):
            instance.add_run_tags(run.run_id, {INTERRUPTED_TAG: "no process was left"})
            instance.report_run_canceled(run, "The run's process is gone (killed, or the machine went down).")


def _is_cut_off(instance: DagsterInstance, run: DagsterRun) -> bool:
    """Interrupted by us, or failed without a step that failed: then its process went away."""
    if run.status is DagsterRunStatus.CANCELED:
        return INTERRUPTED_TAG in run.tags
    return instance.get_run_stats(run.run_id).steps_failed == 0


def _was_run_since(instance: DagsterInstance, record: RunRecord, key: str) -> bool:
    later = instance.get_runs(RunsFilter(tags={PARTITION_TAG: key}, created_after=record.create_timestamp))
    wanted = record.dagster_run.asset_selection or frozenset()
    return any(wanted & (run.asset_selection or frozenset()) for run in later)
