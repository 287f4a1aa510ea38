"""A code location of one's own: two assets that come after the outputs of every batch.

It imports nothing of vllm_batch_pipelines. What it relies on is in docs/plugins.md: the key of the asset, the name of
the partitions, the folder of a batch and the columns of its rows.
"""

from dagster import (
    AssetKey,
    AssetSelection,
    AssetSpec,
    AutomationCondition,
    AutomationConditionSensorDefinition,
    DefaultSensorStatus,
    Definitions,
    DynamicPartitionsDefinition,
    MaterializeResult,
    asset,
    in_process_executor,
)

from ticket_reports.published import PublishedBatch, data_root
from ticket_reports.sink import Ticket, count_tickets, database_url, write_tickets
from ticket_reports.tickets import parse_ticket

# The same name is the same set of partitions, in whatever code location it is written.
BATCH_FILES = DynamicPartitionsDefinition(name="batch_files")
AFTER_OUTPUT = AutomationCondition.eager() & AutomationCondition.all_deps_blocking_checks_passed()

# Theirs: said here so that Dagster knows how its partitions and ours belong together.
batch_output = AssetSpec("batch_output", partitions_def=BATCH_FILES)


@asset(deps=[batch_output], partitions_def=BATCH_FILES, automation_condition=AFTER_OUTPUT, group_name="tickets")
def ticket_table(context) -> MaterializeResult:  # type: ignore[no-untyped-def,type-arg]
    """A row a ticket in a table of ours; a batch that is published again replaces its rows."""
    batch = PublishedBatch(data_root(), context.partition_key)
    team = batch.metadata.get("team", "unknown")
    tickets = (Ticket(batch.key, row["line"], team, *parse_ticket(row)) for row in batch.rows())
    written = write_tickets(database_url(), batch.key, tickets)
    return MaterializeResult(metadata={"dagster/row_count": written, "team": team})


@asset(
    deps=[AssetKey("ticket_table")], partitions_def=BATCH_FILES, automation_condition=AFTER_OUTPUT, group_name="tickets"
)
def ticket_report(context) -> MaterializeResult:  # type: ignore[no-untyped-def,type-arg]
    """How many tickets of the batch have an answer, for the UI."""
    answered, failed = count_tickets(database_url(), context.partition_key)
    return MaterializeResult(metadata={"answered": answered, "failed": failed})


automation = AutomationConditionSensorDefinition(
    "ticket_automation",
    target=AssetSelection.assets("ticket_table", "ticket_report"),
    default_status=DefaultSensorStatus.RUNNING,
)

defs = Definitions(
    assets=[batch_output, ticket_table, ticket_report], sensors=[automation], executor=in_process_executor
)
